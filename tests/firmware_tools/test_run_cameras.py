"""`aiflow run` as a service manager sees it: whatever its cameras do, a signal ends it in order."""

import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge_runtime.inference.bundle import Bundle
from edge_runtime.shutdown import SIGNALS
from tests.brokers import Mosquitto
from tests.listener import PATIENCE_S
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

        def start(source: str, stall_s: float = 5) -> Board:
            config = tmp_path / "board.toml"
            text = CONFIG.format(bundle=board_bundle.path, port=broker.port, source=source, stall_s=stall_s)
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
    """The capture thread is inside a read that would last for a minute."""
    with RtspCamera() as camera:
        running = board(camera.url, stall_s=60)
        running.logs("camera live")
        camera.stalls.set()
        camera.wait_silent()
        assert_ended_in_order(running)
        assert "threads left in a driver names=capture-door" in running.log


def test_a_signal_ends_a_board_whose_camera_hangs_while_it_is_opened(board: Callable[..., Board]) -> None:
    with RtspCamera(hangs=True) as camera:
        running = board(camera.url)
        camera.connected.acquire(timeout=PATIENCE_S)
        assert_ended_in_order(running)
        assert "threads left in a driver names=capture-door" in running.log


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
