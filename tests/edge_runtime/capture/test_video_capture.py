"""OpenCV in a process of its own: it hangs, crashes, is stopped or killed, and nothing is left of it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import cv2
import psutil
import pytest

from edge_runtime.capture import Cameras, Counters, Frame, video_capture
from edge_runtime.capture.frame import CameraError
from edge_runtime.capture.live import live_frames
from edge_runtime.capture.video_capture import DriverError, VideoCapture
from edge_runtime.config import CameraConfig
from tests.edge_runtime.capture.helpers import grey, in_background
from tests.listener import PATIENCE_S, until
from tests.rtsp_camera import OPENCV, TOLERANCE_S, VIDEO, RtspCamera

ROOT = Path(__file__).parents[3]
CAMERA = CameraConfig("door", "/dev/video0", interval_s=0, stall_s=600)


def processes(of: int | None = None) -> list[psutil.Process]:
    """Those that read a camera for this process, or for another one."""
    found = []
    for child in psutil.Process(of).children():
        with suppress(psutil.NoSuchProcess):  # it has ended since, or is a zombie
            if "edge_runtime.opencv_process" in child.cmdline():
                found.append(child)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process, and no open file or memory that was shared with one."""
    files = len(os.listdir("/proc/self/fd"))
    yield
    until(lambda: not processes() and len(os.listdir("/proc/self/fd")) <= files)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that says what a device's driver does."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/fake_driver"), prepend=os.pathsep)
    return lambda does: monkeypatch.setenv("FAKE_DRIVER", does)


# ---- the process ----


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (signal.SIGSTOP, "its driver hangs: the process that reads it gave no sign of life for 3 s, and is killed"),
        (signal.SIGKILL, "the process that reads it was ended by SIGKILL"),
    ],
)
def test_a_process_that_is_stopped_or_killed_is_the_reason_and_the_camera_comes_back(stop, no_pause, number, why):
    with RtspCamera() as network_camera:
        cameras = Cameras([CameraConfig("door", network_camera.url, 0, stall_s=1)])
        taken = in_background(cameras.frames(stop))
        taken.get(timeout=PATIENCE_S)
        (process,) = processes()
        process.send_signal(number)
        until(lambda: cameras.states()["door"].state == "stalled")
        assert cameras.states()["door"].why == why
        until(lambda: cameras.states()["door"].state == "live")
        assert cameras["door"].counters.reopened == 1
        assert not process.is_running()
        stop.set()


def test_a_process_that_does_not_start_is_the_reason(stop, monkeypatch):
    monkeypatch.setattr(video_capture, "ROOT", Path("/no-such-place"))
    with pytest.raises(CameraError, match="no process to read it could be started: No such file"):
        VideoCapture(CAMERA, stop)


def test_the_process_loads_neither_the_other_rooms_nor_an_inference_runtime():
    code = "import sys, edge_runtime.opencv_process; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = set(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split())
    assert {module for module in loaded if module.startswith("edge_runtime.")} == {"edge_runtime.opencv_process"}
    assert not loaded & {"msgspec", "onnxruntime", "ai_edge_litert", "paho", "ssl"}


def test_no_password_is_in_the_arguments_or_in_the_environment_of_the_process(stop, tmp_path):
    (tmp_path / "password").write_text("s3cret-word")
    login = {"username": "viewer", "password_file": str(tmp_path / "password")}
    with RtspCamera(challenge='Digest realm="camera", nonce="abc"') as camera:
        with VideoCapture(CameraConfig("door", camera.url, **login), stop):
            (process,) = processes()
            assert "s3cret-word" not in f"{process.cmdline()} {process.environ()}"
        assert camera.logins


@pytest.mark.parametrize("users", [None, "5"])
def test_the_process_has_few_threads_whatever_the_machine_unless_the_user_says_so(stop, monkeypatch, users):
    """firmware_tools/systemd_units.py counts on this."""
    monkeypatch.delenv("OPENCV_FFMPEG_THREADS", raising=False)
    if users:
        monkeypatch.setenv("OPENCV_FFMPEG_THREADS", users)
    with VideoCapture(CameraConfig("door", str(VIDEO)), stop) as capture:
        assert capture.grab()
        (process,) = processes()
        assert process.environ()["OPENCV_FFMPEG_THREADS"] == (users or "2")  # also FFmpeg's default with two cores
        assert (process.num_threads() <= 4) is (users is None)


# ---- the driver ----


def test_a_driver_that_hangs_is_killed_and_the_frames_before_are_given(stop, driver):
    driver("hangs")
    frames = live_frames(CameraConfig("door", "/dev/video0", interval_s=0, stall_s=1), stop, Counters())
    assert next(frames).pixels.shape == (60, 80, 3)
    with pytest.raises(CameraError, match=r"its driver hangs: .* no sign of life for 3 s"):
        list(frames)


def test_a_driver_that_hangs_while_it_is_opened_is_killed(stop, driver, monkeypatch):
    driver("hangs when opened")
    monkeypatch.setattr(video_capture, "OPEN_S", 0.3)
    with pytest.raises(DriverError, match="its driver hangs"):
        VideoCapture(CAMERA, stop)


@pytest.mark.parametrize("does", ["hangs when opened", "hangs at its first frame"])
def test_a_video_that_hangs_at_the_start_is_a_warning_since_it_is_tried_again(driver, monkeypatch, tmp_path, does):
    driver(does)
    monkeypatch.setattr(video_capture, "OPEN_S", 0.3)
    monkeypatch.setattr(video_capture, "GRACE_S", 0.3)
    (tmp_path / "v.mp4").touch()
    (warning,) = Cameras([CameraConfig("door", str(tmp_path / "v.mp4"), stall_s=1)]).check()
    assert "v.mp4: its driver hangs" in warning


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("crashes", "the process that reads it was ended by SIGSEGV"),
        ("raises", "the process that reads it has ended with code 1"),
        ("sends too large frames", "sends frames of 8000 x 8000 pixels"),
    ],
)
def test_a_driver_that_breaks_is_the_reason_and_not_the_end_of_the_board(stop, driver, does, why):
    driver(does)
    with pytest.raises(CameraError, match=why):
        list(live_frames(CAMERA, stop, Counters()))


def test_frames_of_changing_size_are_whole_and_kept_ones_do_not_change(stop, driver):
    driver("changes size")
    with VideoCapture(CAMERA, stop) as capture:
        frames = []
        for _ in range(7):
            assert capture.grab()
            frames.append(capture.retrieve())
    for number, pixels in enumerate(frames, 1):
        assert pixels.shape == (60 + number // 3, 80, 3)
        assert (pixels == number).all()


def test_the_memory_of_a_frame_is_used_again_when_nobody_has_the_frame_any_more(stop, driver):
    def frames_in_memory() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.split()[4] for line in lines if "memfd:aiflow-frame" in line}  # the inode

    driver("runs")
    with VideoCapture(CAMERA, stop) as capture:
        capture.grab()
        pixels = capture.retrieve()
        a_part, first = pixels[10:20, ::2], frames_in_memory()
        capture.grab()
        pixels = capture.retrieve()
        assert (a_part == 1).all()
        assert (pixels == 2).all()
        second = frames_in_memory() - first
        del pixels, a_part
        capture.grab()
        assert (capture.retrieve() == 3).all()
        capture.grab()
        pixels = capture.retrieve()
        assert (pixels == 4).all()
        assert frames_in_memory() == second


def test_a_frame_is_free_while_the_next_one_is_not_due(stop, driver):
    driver("runs")
    frames = live_frames(CameraConfig("door", "/dev/video0", interval_s=3600), stop, Counters())
    pixels = weakref.ref(next(frames).pixels)
    in_background(frames)
    until(lambda: pixels() is None)


def test_memory_that_could_become_shorter_is_refused(stop, driver):
    """Reading it would end the board."""
    driver("does not seal its memory")
    with pytest.raises(CameraError, match="has sent memory that is not sealed"):
        list(live_frames(CAMERA, stop, Counters()))


@pytest.mark.parametrize("does", ["runs", "hangs", "hangs when opened", "hangs when closed"])
def test_a_camera_that_is_closed_leaves_no_process_whatever_its_driver_does(stop, driver, does):
    driver(does)
    taken = in_background(live_frames(CAMERA, stop, Counters()))
    if does != "hangs when opened":
        taken.get(timeout=PATIENCE_S)
    until(processes)
    stop.set()
    until(lambda: not processes())


def test_a_process_that_is_stopped_is_killed_when_its_camera_is_closed(stop, driver):
    driver("runs")
    frames = live_frames(CAMERA, stop, Counters())
    next(frames)
    processes()[0].suspend()
    frames.close()
    until(lambda: not processes())


@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_process_ends_with_a_board_that_is_killed(driver, is_stopped):
    driver("runs")
    code = """
import threading
from edge_runtime.capture.video_capture import VideoCapture
from edge_runtime.config import CameraConfig
with VideoCapture(CameraConfig("door", "/dev/video0"), threading.Event()) as capture:
    capture.grab()
    capture.retrieve()
    print("live", flush=True)
    threading.Event().wait()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as board:
        assert board.stdout is not None
        assert board.stdout.readline() == b"live\n"
        (process,) = processes(board.pid)
        if is_stopped:
            process.suspend()
        board.kill()
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler is installed")
@pytest.mark.parametrize("clock", ["monotonic", "time", ""])
def test_a_frame_of_a_device_has_the_time_that_its_driver_gives(stop, tmp_path, monkeypatch, clock):
    """In OpenCV's own V4L2 code, of the clock that drivers use; there is none from another clock or without a time."""
    library, captured = tmp_path / "v4l2.so", getattr(time, clock)() - 0.5 if clock else 0.0
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, ROOT / "tests/fake_driver/v4l2.c"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("FAKE_TIMESTAMP_US", str(int(1e6 * captured)))
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as device:
        device.write(bytes([200]) * 64 * 48 * 3)
        device.flush()
        with VideoCapture(CameraConfig("door", device.name, stall_s=PATIENCE_S), stop) as capture:
            read = capture.grab()
            assert read
            assert (capture.retrieve() == 200).all()
    assert read.age_s == (pytest.approx(read.ended - captured, abs=1e-5) if clock == "monotonic" else None)


# ---- a stream ----


@pytest.mark.skipif(OPENCV < (4, 12), reason="before OpenCV 4.12, packets do not carry the time of their arrival")
@pytest.mark.parametrize("grows", [True, False])
def test_an_h264_stream_that_changes_its_size_is_scaled_to_the_first_one_and_no_frame_is_damaged_or_late(stop, grows):
    """FFmpeg's decoder goes on, and OpenCV keeps the size that the stream had when it was opened."""
    with RtspCamera() as camera:
        if not grows:
            camera.is_large.set()

        def seen(frame: Frame) -> tuple[tuple[int, ...], float, float]:
            return frame.pixels.shape[:2], float(frame.pixels.std()), camera.lateness_s(frame)

        taken = in_background(map(seen, live_frames(CameraConfig("door", camera.url, 0), stop, Counters())))
        frames = [taken.get(timeout=PATIENCE_S)]
        (camera.is_large.set if grows else camera.is_large.clear)()
        assert camera.changed.wait(PATIENCE_S)
        frames += [taken.get(timeout=PATIENCE_S) for _ in range(taken.qsize() + 10)]
        stop.set()
    assert {shape for shape, _, _ in frames} == {(64, 64) if grows else (80, 96)}
    assert max(deviation for _, deviation, _ in frames) < 3  # each is of one colour
    assert max(lateness for _, _, lateness in frames) <= TOLERANCE_S


def test_a_stream_whose_pictures_change_their_size_goes_on(stop):
    """FFmpeg reads JPEGs from a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        taken = in_background(live_frames(CameraConfig("door", source, 0), stop, Counters()))
        connection, _ = server.accept()
        with connection, suppress(OSError):
            for size in (64, 128):
                picture = cv2.imencode(".jpg", grey(100, size))[1].tobytes()
                while taken.empty() or taken.get().pixels.shape != (size, size, 3):
                    connection.sendall(picture)
                    stop.wait(0.01)
        stop.set()
