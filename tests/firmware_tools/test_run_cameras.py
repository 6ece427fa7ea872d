"""`aiflow run` as a service manager sees it: whatever its cameras do, a signal ends it in order."""

import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from edge_runtime.inference.bundle import Bundle
from edge_runtime.shutdown import SIGNALS
from tests.brokers import Mosquitto
from tests.camera_programs import Programs
from tests.edge_runtime.capture.helpers import large_jpeg
from tests.http_camera import HttpCamera, Request, picture
from tests.listener import PATIENCE_S, until
from tests.rtsp_camera import RtspCamera

CONFIG = """
[board]
id = "b1"
bundle = "{bundle}"
paradigm = "device"
[mqtt]
port = {port}
[[cameras]]
name = "door"
source = "{source}"
interval_s = 0
stall_s = {stall_s}
{more}
"""


class Board:
    """`aiflow run`, and what it logs."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, self.log, self._lines = process, "", queue.Queue[str]()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line)
        self._lines.put("")

    def logs(self, text: str) -> None:
        """Waits until it does."""
        while text not in self.log:
            line = self._lines.get(timeout=PATIENCE_S)
            assert line, self.log
            self.log += line

    def end(self, number: signal.Signals) -> int:
        """Sends the signal; the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(timeout=PATIENCE_S)
        while line := self._lines.get(timeout=PATIENCE_S):
            self.log += line
        return code


@pytest.fixture
def board(tmp_path: Path, board_bundle: Bundle, broker: Mosquitto) -> Iterator[Callable[..., Board]]:
    """A function that starts `aiflow run` with a camera at the given address."""
    with ExitStack() as stack:

        def start(source: str, stall_s: float = 5, more: str = "") -> Board:
            config = tmp_path / "board.toml"
            text = CONFIG.format(bundle=board_bundle.path, port=broker.port, source=source, stall_s=stall_s, more=more)
            config.write_text(text)
            command = [sys.executable, "-m", "firmware_tools", "run", str(config)]
            process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            return Board(process)

        yield start


def assert_ended_in_order(running: Board, number: signal.Signals = signal.SIGTERM) -> None:
    assert running.end(number) == 0, running.log
    assert "board stopped" in running.log
    assert "Traceback" not in running.log


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_board_with_a_live_camera_in_order(board: Callable[..., Board], number: signal.Signals) -> None:
    """At this rate a read returns while the interpreter ends, unless the thread has been waited for."""
    with RtspCamera(fps=30) as camera:
        running = board(camera.url)
        running.logs("camera live")
        assert_ended_in_order(running, number)


def test_a_signal_ends_a_board_whose_camera_has_gone_silent(board: Callable[..., Board]) -> None:
    """OpenCV is inside a read that would last for a minute."""
    with RtspCamera() as camera:
        running = board(camera.url, stall_s=60)
        running.logs("camera live")
        camera.stalls.set()
        camera.wait_silent()
        assert_ended_in_order(running)
        assert "threads left in a driver" not in running.log


def test_a_signal_ends_a_board_whose_camera_hangs_while_it_is_opened(board: Callable[..., Board]) -> None:
    with RtspCamera(hangs=True) as camera:
        running = board(camera.url)
        camera.connected.acquire(timeout=PATIENCE_S)
        assert_ended_in_order(running)
        assert "threads left in a driver" not in running.log


def test_a_signal_ends_a_board_and_the_stopped_process_that_reads_its_camera(board: Callable[..., Board]) -> None:
    with RtspCamera() as camera:
        running = board(camera.url, stall_s=60)
        running.logs("camera live")
        (process,) = psutil.Process(running.process.pid).children()
        process.suspend()
        assert_ended_in_order(running)
        until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


def test_a_signal_ends_a_board_whose_camera_is_being_opened(board: Callable[..., Board]) -> None:
    """OpenCV has the stream's description and collects its first frames."""
    with RtspCamera() as camera:
        running = board(camera.url)
        camera.playing.wait(PATIENCE_S)
        assert_ended_in_order(running)


def test_a_signal_ends_a_board_whose_camera_is_stalled(board: Callable[..., Board]) -> None:
    with RtspCamera() as camera:
        running = board(camera.url, stall_s=1)
        running.logs("camera live")
        camera.stalls.set()
        running.logs("camera stalled")
        assert_ended_in_order(running)


# ---- over HTTP, from a folder, from a program ----


def endless(request: Request) -> None:
    """Headers that never end, as slowly as can be."""
    with suppress(OSError):
        request.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        while not request.camera.closed.wait(0.1):
            request.wfile.write(b"x")


def slow(request: Request) -> None:
    request.give(200, {"Content-Type": "image/jpeg"}, b"\xff\xd8\xff")
    request.camera.closed.wait()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda _: picture(large_jpeg(100)), "camera live"),
        (lambda _: (404, {}, b""), "camera lost"),
        (lambda _: (200, {"Content-Type": "text/html"}, b"<html>"), "camera lost"),
        (endless, ""),
        (slow, ""),
    ],
)
def test_a_signal_ends_a_board_whose_camera_answers_over_http(
    board: Callable[..., Board], answer: Callable[[Request], Any], says: str
) -> None:
    """Its waits end at once, although the camera may take a minute."""
    asked = threading.Event()
    with HttpCamera(lambda request: asked.set() or answer(request)) as camera:
        running = board(camera.url, stall_s=60)
        assert asked.wait(PATIENCE_S)
        running.logs(says)
        assert_ended_in_order(running)
        assert "threads left in a driver" not in running.log


def test_a_signal_ends_a_board_that_watches_a_folder(board: Callable[..., Board], tmp_path: Path) -> None:
    (tmp_path / "cam").mkdir()
    (tmp_path / "cam/a.jpg").write_bytes(large_jpeg(100))
    running = board(f"watch:{tmp_path}/cam", more="existing = true")
    running.logs("camera live")
    assert_ended_in_order(running)


@pytest.mark.parametrize("does", ["runs", "stops", "ignores signals"])
def test_a_signal_ends_a_board_and_the_program_of_its_camera(
    board: Callable[..., Board], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str
) -> None:
    programs = Programs(tmp_path, monkeypatch)
    programs.do(does)
    running = board("rpicam", stall_s=60)
    running.logs("camera live")
    assert_ended_in_order(running)
    until(programs.all_gone)


def test_a_board_that_is_killed_and_started_again_reads_what_came_meanwhile_and_nothing_twice(
    board: Callable[..., Board], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the state directory that systemd names."""
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path}/state:{tmp_path}/other")
    (tmp_path / "cam").mkdir()
    running = board(f"watch:{tmp_path}/cam")
    running.logs("camera waiting")
    (tmp_path / "cam/a.jpg").write_bytes(large_jpeg(100))
    running.logs("camera live")
    (kept,) = (tmp_path / "state/watched/b1").iterdir()
    until(lambda: kept.stat().st_size == 16)  # a.jpg has been handled
    running.end(signal.SIGKILL)
    (tmp_path / "cam/b.jpg").write_bytes(large_jpeg(200))
    running = board(f"watch:{tmp_path}/cam")
    running.logs("camera live")
    until(lambda: kept.stat().st_size == 32)
    assert_ended_in_order(running)
    assert " frames=1 " in running.log
