"""A program that writes JPEGs into a pipe: it runs, chatters, writes garbage, stalls, dies, and never outlives us."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.capture import Cameras, Counters
from edge_runtime.capture.frame import CameraError
from edge_runtime.capture.live import live_frames
from edge_runtime.config import CameraConfig
from edge_runtime.errors import ConfigError
from tests.camera_programs import PROGRAMS, Programs
from tests.edge_runtime.capture.helpers import in_background, shade_of
from tests.listener import PATIENCE_S, until


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return Programs(tmp_path, monkeypatch)


def camera(source: str = "rpicam", **settings: object) -> CameraConfig:
    return CameraConfig("door", source, **{"interval_s": 0, "stall_s": 1.0, **settings})


@pytest.mark.parametrize("source", PROGRAMS)
@pytest.mark.parametrize("does", ["runs", "chatters", "garbage"])
def test_a_program_that_writes_pictures_is_a_live_camera_and_ends_with_it(stop, programs, source, does):
    programs.do(does)
    frames = live_frames(camera(source), stop, Counters())
    assert [shade_of(next(frames)) for _ in range(3)] == [100] * 3
    frames.close()
    until(programs.all_gone)


def test_the_programs_are_told_size_and_rate(stop, programs):
    programs.do("runs")
    for source in PROGRAMS:
        frames = live_frames(camera(source, width=640, height=480, fps=5), stop, Counters())
        next(frames)
        frames.close()
        until(programs.all_gone)
    rpicam, nvargus = (" ".join(call) for call in programs.calls())
    for words in ("--codec mjpeg", "--width 640 --height 480 --framerate 5", "--output -", "--timeout 0"):
        assert words in rpicam
    for words in ("nvarguscamerasrc !", "width=640,height=480", "max-rate=5", "jpegenc ! fdsink fd="):
        assert words in nvargus


@pytest.mark.parametrize("does", ["stalls", "stops", "dies"])
def test_a_program_that_stalls_is_stopped_or_dies_is_started_again(stop, programs, no_pause, does):
    programs.do(does)
    whys: list[str] = []  # the state may be another soon
    cameras = Cameras([camera()], lambda: whys.extend(filter(None, [cameras.states()["door"].why])))
    taken = in_background(cameras.frames(stop))
    taken.get(timeout=PATIENCE_S)
    until(lambda: whys != [])
    why = whys[0]
    assert "rpicam-vid has ended with code 0" in why if does == "dies" else "no new frame for 1 s" in why
    programs.do("runs")
    until(lambda: cameras.states()["door"].state == "live")
    assert len(programs.calls()) >= 2
    stop.set()
    until(programs.all_gone)


def test_a_stall_is_seen_long_before_the_next_frame_is_due(stop, programs, no_pause):
    programs.do("stalls")
    cameras = Cameras([camera(interval_s=3600)])
    in_background(cameras.frames(stop)).get(timeout=PATIENCE_S)
    until(lambda: cameras.states()["door"].state == "stalled")
    stop.set()
    until(programs.all_gone)


def test_the_last_words_of_a_program_that_fails_are_the_reason(stop, programs):
    programs.do("fails")
    with pytest.raises(CameraError, match=r"rpicam-vid has ended with code 255: ERROR: \*\*\* no cameras available"):
        next(live_frames(camera(), stop, Counters()))


def test_an_endless_stream_without_a_picture_is_an_error_and_the_program_is_ended(stop, programs):
    programs.do("endless")
    with pytest.raises(CameraError, match="bytes without a complete JPEG"):
        next(live_frames(camera(), stop, Counters()))
    until(programs.all_gone)


def test_a_program_that_ignores_signals_is_killed(stop, programs):
    programs.do("ignores signals")
    frames = live_frames(camera(), stop, Counters())
    next(frames)
    frames.close()
    until(programs.all_gone)


@pytest.mark.parametrize(("source", "package"), [("rpicam", "rpicam-apps-lite"), ("nvargus", "gstreamer1.0-tools")])
def test_a_missing_program_is_an_error_at_the_start_that_names_its_package(tmp_path, monkeypatch, source, package):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"camera door: .*{PROGRAMS[source]}: sudo apt install {package}"):
        Cameras([camera(source)]).check()


def test_the_older_name_of_the_program_is_known(stop, programs, tmp_path, monkeypatch):
    programs.do("runs")
    (tmp_path / "rpicam-vid").rename(tmp_path / "libcamera-vid")
    frames = live_frames(camera(), stop, Counters())
    next(frames)
    frames.close()
    until(programs.all_gone)


def test_a_program_ends_with_the_thread_that_reads_it_even_if_that_dies(stop, programs, run_and_kill):
    programs.do("stalls")
    run_and_kill()
    until(programs.all_gone)


@pytest.fixture
def run_and_kill(programs: Programs) -> Callable[[], None]:
    """Starts a process with a camera, and kills it after its first frame."""
    import subprocess

    script = """
import threading
from edge_runtime.capture import Counters
from edge_runtime.capture.live import live_frames
from edge_runtime.config import CameraConfig
frames = live_frames(CameraConfig("door", "rpicam", 0, stall_s=600), threading.Event(), Counters())
next(frames)
print("live", flush=True)
threading.Event().wait()
"""

    def run() -> None:
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"live\n"
            process.kill()

    return run


def test_no_threads_are_left(programs, stop):
    programs.do("runs")
    frames = live_frames(camera(), stop, Counters())
    next(frames)
    frames.close()
    until(lambda: not [t for t in threading.enumerate() if t.name == "capture-door"])
