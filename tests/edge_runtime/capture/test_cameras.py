"""Sources of frames: real files, a real video, and a real camera of the kind that speaks MJPEG over HTTP."""

import queue
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_runtime.capture import cameras as sources
from edge_runtime.capture.cameras import (
    ArrivingFrames,
    Cameras,
    Counters,
    Frame,
    Newest,
    camera_frames,
    file_frames,
    frames_of,
    video_frames,
)
from edge_runtime.capture.picture_checks import PictureError
from edge_runtime.config import CameraConfig, ConfigError, MotionConfig
from tests.listener import PATIENCE_S, until


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set when the test ends, so that no source outlives it, nor what the test has patched."""
    event, before = threading.Event(), set(threading.enumerate())
    yield event
    event.set()
    until(lambda: set(threading.enumerate()) <= before)


def grey(shade: int, size: int = 16) -> np.ndarray:
    return np.full((size, size, 3), shade, np.uint8)


def jpeg(shade: int) -> bytes:
    return cv2.imencode(".jpg", grey(shade))[1].tobytes()


def shade_of(frame: Frame) -> int:
    """The nearest multiple of ten: JPEG and video are not exact."""
    return round(float(frame.pixels.mean()) / 10) * 10


def write_photos(folder: Path, *shades: int) -> str:
    folder.mkdir()
    for number, shade in enumerate(shades):
        (folder / f"{number}.jpg").write_bytes(jpeg(shade))
    return str(folder)


# ---- files ----


def test_photos_come_in_order_as_they_are_and_end(tmp_path, stop):
    camera = CameraConfig("door", write_photos(tmp_path / "p", 10, 200, 100), interval_s=0)
    before = time.monotonic()
    frames = list(file_frames(camera, stop, Counters()))
    assert [(f.camera, f.name, shade_of(f)) for f in frames] == [
        ("door", f"{i}.jpg", s) for i, s in enumerate([10, 200, 100])
    ]
    assert frames[1].encoded == jpeg(200)
    assert before <= frames[0].captured <= frames[2].captured <= time.monotonic()


def test_an_unreadable_photo_is_counted_and_the_rest_goes_on(tmp_path, stop, caplog):
    camera = CameraConfig("door", write_photos(tmp_path / "p", 10, 20, 30), interval_s=0)
    (tmp_path / "p/1.jpg").write_bytes(jpeg(20)[:-50])
    counters = Counters()
    assert [f.name for f in file_frames(camera, stop, counters)] == ["0.jpg", "2.jpg"]
    assert counters.unreadable == 1
    assert "camera=door name=1.jpg" in caplog.text


def test_photos_repeat_until_stopped(tmp_path, stop):
    camera = CameraConfig("door", write_photos(tmp_path / "p", 10, 20), interval_s=0, repeat=True)
    frames = file_frames(camera, stop, Counters())
    assert [next(frames).name for _ in range(5)] == ["0.jpg", "1.jpg", "0.jpg", "1.jpg", "0.jpg"]
    stop.set()
    assert list(frames) == []


def test_a_stop_does_not_wait_for_the_interval(tmp_path, stop):
    frames = file_frames(CameraConfig("door", write_photos(tmp_path / "p", 1, 2), interval_s=86400), stop, Counters())
    next(frames)
    threading.Timer(0.05, stop.set).start()
    assert list(frames) == []


# ---- a video ----


@pytest.fixture
def video(tmp_path: Path) -> str:
    """Two seconds at ten frames a second, each a shade lighter."""
    path = str(tmp_path / "v.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for number in range(20):
        writer.write(grey(10 * number, 64))
    writer.release()
    return path


def test_a_video_gives_frames_at_the_interval_in_its_own_time_and_ends(video, stop, monkeypatch):
    monkeypatch.setattr(stop, "wait", lambda _: False)  # its own time is what counts here, not ours
    frames = list(video_frames(CameraConfig("door", video, interval_s=0.5), stop, Counters()))
    assert [(f.name, shade_of(f)) for f in frames] == [(f"v.avi#{n}", 10 * n) for n in (0, 5, 10, 15)]


def test_a_video_gives_every_frame_without_an_interval_and_repeats(video, stop):
    frames = video_frames(CameraConfig("door", video, interval_s=0, repeat=True), stop, Counters())
    assert [shade_of(next(frames)) for _ in range(22)] == [10 * (n % 20) for n in range(22)]
    stop.set()
    assert list(frames) == []


@pytest.mark.parametrize("content", [None, b"", b"RIFF....AVI LIST"])
def test_what_is_no_video_is_refused(tmp_path, stop, content):
    path = tmp_path / "x.avi"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PictureError, match=r"x\.avi cannot be read as a video"):
        list(video_frames(CameraConfig("door", str(path), repeat=True), stop, Counters()))


# ---- a live camera ----


class MjpegCamera:
    """A network camera: each connection gets the pictures that the test shows it, and hangs in between."""

    def __init__(self) -> None:
        self.connections: queue.Queue[MjpegCamera.Connection] = queue.Queue()
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                connection = MjpegCamera.Connection()
                camera.connections.put(connection)
                while (picture := connection.pictures.get()) is not None:
                    head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(picture)
                    try:
                        self.wfile.write(head + picture + b"\r\n")
                    except OSError:  # the board went away
                        connection.hung_up.set()
                        return

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.url = f"http://127.0.0.1:{self.server.server_port}/video.mjpg"
        self.all: list[MjpegCamera.Connection] = []

    class Connection:
        def __init__(self) -> None:
            self.pictures: queue.Queue[bytes | None] = queue.Queue()
            self.hung_up = threading.Event()

        def show(self, *shades: int) -> None:
            for shade in shades:
                self.pictures.put(jpeg(shade))

    def connection(self) -> "MjpegCamera.Connection":
        self.all.append(self.connections.get(timeout=PATIENCE_S))
        return self.all[-1]

    def __enter__(self) -> "MjpegCamera":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        while not self.connections.empty():
            self.connection()
        for connection in self.all:
            connection.pictures.put(None)
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def network_camera(stop: threading.Event, monkeypatch: pytest.MonkeyPatch) -> Iterator[MjpegCamera]:
    monkeypatch.setattr(sources, "MIN_PAUSE_S", 0.01)
    with MjpegCamera() as camera:
        yield camera
        stop.set()


def in_background(frames: Iterator[Frame]) -> "queue.Queue[Frame]":
    """Takes frames as they come."""
    taken: queue.Queue[Frame] = queue.Queue()
    threading.Thread(target=lambda: [taken.put(frame) for frame in frames], daemon=True).start()
    return taken


def test_a_live_camera_gives_its_newest_frame_and_counts_the_skipped(network_camera, stop):
    counters = Counters()
    frames = camera_frames(CameraConfig("door", network_camera.url, interval_s=0), stop, counters)
    threading.Thread(target=lambda: network_camera.connection().show(10, 10, 10), daemon=True).start()
    assert shade_of(next(frames)) == 10
    until(lambda: counters.skipped >= 1)  # the rest of the greeting, unseen
    skipped = counters.skipped
    network_camera.all[0].show(*range(20, 110, 10))
    until(lambda: counters.skipped >= skipped + 8)
    assert shade_of(next(frames)) >= 90


@pytest.mark.parametrize("fault", ["stalls", "ends"])
def test_a_live_camera_that_stalls_or_ends_is_opened_again(network_camera, stop, fault):
    cameras = Cameras([CameraConfig("door", network_camera.url, 0, stall_s=1)])
    taken = in_background(cameras.frames(stop))
    first = network_camera.connection()
    first.show(10, 10, 10)
    assert shade_of(taken.get(timeout=PATIENCE_S)) == 10
    if fault == "ends":
        first.pictures.put(None)
    second = network_camera.connection()
    assert cameras.states()["door"].state == "stalled"
    assert "no new frame for 1 s" in cameras.states()["door"].why
    second.show(200, 200, 200)
    until(lambda: shade_of(taken.get(timeout=PATIENCE_S)) == 200)
    assert (cameras["door"].counters.reopened, cameras.states()["door"].state) == (1, "live")


def test_a_capture_that_is_just_ending_is_waited_for_and_not_taken_for_one_that_hangs(network_camera, stop):
    class Leaving(threading.Thread):
        """Goes when it is waited for."""

        def join(self, timeout: float | None = None) -> None:
            may_end.set()
            super().join(timeout)

    may_end = threading.Event()
    Leaving(target=may_end.wait, name="capture-door", daemon=True).start()
    frames = camera_frames(CameraConfig("door", network_camera.url, interval_s=0), stop, Counters())
    threading.Thread(target=lambda: network_camera.connection().show(10, 10, 10), daemon=True).start()
    assert shade_of(next(frames)) == 10


def test_a_camera_that_cannot_be_opened_is_tried_again_until_stopped(stop, monkeypatch):
    monkeypatch.setattr(sources, "MIN_PAUSE_S", 0.01)
    with MjpegCamera() as gone:
        pass
    cameras = Cameras([CameraConfig("door", gone.url)])
    assert cameras.states()["door"].state == "starting"
    taken = in_background(cameras.frames(stop))
    until(lambda: cameras["door"].counters.reopened >= 2)
    assert taken.empty()
    assert (cameras.states()["door"].state, "cannot be opened" in cameras.states()["door"].why) == ("lost", True)


def test_what_a_driver_raises_is_said_and_the_camera_opened_again(stop, monkeypatch):
    def broken(_: CameraConfig) -> None:
        raise ValueError("no such register")

    monkeypatch.setattr(sources, "MIN_PAUSE_S", 0.01)
    monkeypatch.setattr(sources, "_open", broken)
    cameras = Cameras([CameraConfig("door", "/dev/video0")])
    in_background(cameras.frames(stop))
    until(lambda: cameras["door"].counters.reopened >= 2)
    assert cameras.states()["door"].why == "ValueError: no such register"


def test_a_driver_that_hangs_has_one_thread_however_often_it_is_tried(stop, monkeypatch):
    let_go = threading.Event()
    monkeypatch.setattr(sources, "MIN_PAUSE_S", 0.01)
    monkeypatch.setattr(sources, "OPEN_TIMEOUT_S", -0.9)  # with stall_s: a tenth of a second
    monkeypatch.setattr(sources, "_open", lambda _: let_go.wait() and None)
    cameras = Cameras([CameraConfig("hung", "/dev/video0", stall_s=1)])
    in_background(cameras.frames(stop))
    until(lambda: cameras["hung"].counters.reopened >= 4)
    assert [thread.name for thread in threading.enumerate()].count("capture-hung") == 1
    assert cameras.states()["hung"].why == "the driver of the last try hangs"
    let_go.set()


@pytest.mark.parametrize(
    ("source", "reader"),
    [
        ("rtsp://camera/1", camera_frames),
        ("http://camera/clip.mp4", camera_frames),
        ("/dev/video0", camera_frames),
        ("clip.MP4", video_frames),
        ("photos", file_frames),
        ("photos.tar", file_frames),
        ("photo.jpg", file_frames),
    ],
)
def test_the_look_of_a_source_says_how_it_is_read(source, reader):
    assert frames_of(CameraConfig("door", source)) is reader


# ---- the slot, arriving pictures, several sources ----


def test_a_slot_keeps_the_newest_frame_and_counts_what_it_replaces(stop):
    counters = Counters()
    slot = Newest(counters)
    for shade in (10, 20, 30):
        slot.put(Frame("door", grey(shade), 0, 0))
    frame = slot.take(PATIENCE_S, stop)
    assert frame is not None
    assert shade_of(frame) == 30
    assert counters.skipped == 2
    assert slot.take(0, stop) is None


@pytest.mark.parametrize("wake", [lambda slot: slot.put(Frame("door", grey(1), 0, 0)), Newest.close])
def test_whoever_waits_at_a_slot_is_woken_by_a_frame_or_a_close(stop, monkeypatch, wake):
    monkeypatch.setattr(sources, "LOOK_S", 1e6)
    slot = Newest(Counters())
    threading.Timer(0.05, wake, [slot]).start()
    slot.take(1e6, stop)


def test_whoever_waits_at_a_slot_sees_a_stop(stop):
    threading.Timer(0.05, stop.set).start()
    assert Newest(Counters()).take(1e6, stop) is None


def test_of_arriving_pictures_the_newest_is_decoded_when_it_is_taken(stop):
    counters = Counters()
    source = ArrivingFrames(CameraConfig("door", "mqtt"), counters)
    for data in (jpeg(10), jpeg(20)):
        source.arrived(data)
    frame = next(source.frames(stop))
    assert (shade_of(frame), frame.camera, frame.encoded) == (20, "door", jpeg(20))
    assert counters.skipped == 1


def test_an_arriving_picture_that_is_none_is_counted_and_the_next_one_comes(stop):
    counters = Counters()
    source = ArrivingFrames(CameraConfig("door", "mqtt"), counters)
    taken = in_background(source.frames(stop))
    source.arrived(b"garbage")
    until(lambda: counters.unreadable == 1)
    source.arrived(jpeg(30))
    assert shade_of(taken.get(timeout=PATIENCE_S)) == 30


def test_all_frames_of_several_cameras_come_and_the_end_is_their_last(tmp_path, stop):
    shades = {"a": (10, 20, 30), "b": (100,), "c": (200, 210)}
    cameras = [CameraConfig(name, write_photos(tmp_path / name, *s), interval_s=0) for name, s in shades.items()]
    frames = list(Cameras(cameras).frames(stop))
    for name, expected in shades.items():
        assert [shade_of(f) for f in frames if f.camera == name] == list(expected)
    assert len(frames) == 6


def test_a_slow_board_gets_the_newest_frame_and_no_queue_of_old_ones(stop, monkeypatch):
    asked_again = threading.Event()

    class Asked(ArrivingFrames):
        def frames(self, stop: threading.Event) -> Iterator[Frame]:
            for frame in super().frames(stop):
                yield frame
                asked_again.set()

    monkeypatch.setattr(sources, "ArrivingFrames", Asked)
    cameras = Cameras([CameraConfig("door", "mqtt")])
    frames = cameras.frames(stop)
    cameras.arrived(jpeg(10))
    assert shade_of(next(frames)) == 10
    assert not asked_again.wait(0.1)
    for shade in (20, 30, 40, 50):  # while the first is being handled
        cameras.arrived(jpeg(shade))
    assert shade_of(next(frames)) == 50
    assert cameras.totals().skipped == 3


def test_every_source_that_can_never_work_is_named_before_any_is_opened(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "v.avi").write_bytes(b"no video")
    sources = {
        "good": write_photos(tmp_path / "p", 10),
        "away": "rtsp://127.0.0.1:1/x",
        "unplugged": "/dev/no-such-camera",
        "mqtt": "mqtt",
        "absent": str(tmp_path / "absent"),
        "empty": str(tmp_path / "empty"),
        "video": str(tmp_path / "v.avi"),
        "typo": "rtps://camera/1",
    }
    with pytest.raises(PictureError) as raised:
        Cameras([CameraConfig(*pair) for pair in sources.items()]).check()
    for name, fault in {
        "absent": "absent does not exist",
        "empty": "empty holds no picture",
        "video": "v.avi cannot be read as a video",
        "typo": "rtps:// is no kind of stream that is known",
    }.items():
        assert re.search(f"camera {name}: [^;]*{fault}", str(raised.value))
    assert str(raised.value).count("camera ") == 4
    assert not [t for t in threading.enumerate() if t.name in ("source-good", "source-away")]


def test_one_file_of_many_photos_that_is_damaged_is_no_reason_to_refuse_a_source(tmp_path):
    camera = CameraConfig("door", write_photos(tmp_path / "p", 10, 20))
    (tmp_path / "p/0.jpg").write_bytes(b"")
    Cameras([camera]).check()


def test_files_that_vanish_are_waited_for_while_the_other_cameras_go_on(tmp_path, stop, monkeypatch):
    monkeypatch.setattr(sources, "MIN_PAUSE_S", 0.01)
    write_photos(tmp_path / "p", 10)
    cameras = Cameras(
        [
            CameraConfig("disk", str(tmp_path / "p"), interval_s=0, repeat=True),
            CameraConfig("other", write_photos(tmp_path / "o", 200), interval_s=0, repeat=True),
        ]
    )
    frames = cameras.frames(stop)

    def come_from(name: str) -> None:
        while next(frames).camera != name:
            pass

    come_from("disk")
    (tmp_path / "p").rename(tmp_path / "gone")
    while cameras.states()["disk"].state != "lost":
        come_from("other")
    assert "does not exist" in cameras.states()["disk"].why
    (tmp_path / "gone").rename(tmp_path / "p")
    come_from("disk")
    assert cameras.states()["disk"].state == "live"


def test_a_stop_ends_the_frames_of_several_cameras_and_their_threads(tmp_path, stop):
    cameras = [
        CameraConfig("photos", write_photos(tmp_path / "p", 10), interval_s=0, repeat=True),
        CameraConfig("arriving", "mqtt"),
    ]
    frames = Cameras(cameras).frames(stop)
    next(frames)
    stop.set()
    assert list(frames) == []
    until(lambda: not [t for t in threading.enumerate() if t.name in ("source-photos", "source-arriving")])


def test_pictures_that_arrive_faster_than_the_interval_are_skipped_and_uneven_ones_are_not(stop, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sources.time, "monotonic", lambda: now[0])
    counters = Counters()
    source = ArrivingFrames(CameraConfig("door", "mqtt", interval_s=1), counters)
    taken = in_background(source.frames(stop))
    for number, at in enumerate([0, 0.9, 2.1, 2.9, 3.0, 3.1, 3.5, 4.2, 9, 9.4]):
        now[0] = at
        source.arrived(jpeg(10 * number))
        until(lambda n=number: taken.qsize() + counters.skipped == n + 1)
    assert [shade_of(taken.get_nowait()) // 10 for _ in range(taken.qsize())] == [0, 1, 2, 3, 7, 8]


# ---- gate, states and switches of a camera ----


def scene(shade: int | None) -> bytes:
    """A JPEG of a wall with a box of the given shade, or without."""
    pixels = np.full((120, 160, 3), 100, np.uint8)
    pixels[:, ::8] = 140
    if shade is not None:
        pixels[40:80, 40:80] = shade
    return cv2.imencode(".png", pixels)[1].tobytes()


class Arriving:
    """One camera over MQTT, and what comes of its pictures."""

    def __init__(self, stop: threading.Event, **settings: Any) -> None:
        self.cameras = Cameras([CameraConfig("door", "mqtt", **settings)])
        self.camera = self.cameras["door"]
        self.taken = in_background(self.cameras.frames(stop))

    def show(self, picture: bytes) -> None:
        """Returns when the camera has looked at it."""
        frames = self.camera.counters.frames
        self.cameras.arrived(picture)
        until(lambda: self.camera.counters.frames == frames + 1)

    @property
    def state(self) -> str:
        return self.cameras.states()["door"].state


def test_only_motion_passes_the_gate_of_a_camera_that_asks_for_it(stop):
    door = Arriving(stop, motion=MotionConfig(enabled=True))
    for picture in (scene(None), scene(None), scene(250), scene(None)):
        door.show(picture)
    assert door.taken.get(timeout=PATIENCE_S).encoded == scene(250)
    assert (door.camera.counters.still, door.taken.empty()) == (3, True)
    door.camera.gate.enabled = False
    door.show(scene(None))
    assert door.taken.get(timeout=PATIENCE_S).encoded == scene(None)


def test_a_picture_that_stands_still_is_reported_and_not_opened_again(stop, caplog):
    door = Arriving(stop, frozen_s=0.001)
    door.show(scene(None))
    assert door.state == "live"
    until(lambda: door.show(scene(None)) or door.state == "frozen")
    door.show(scene(None))
    assert caplog.text.count("camera frozen") == 1
    door.show(scene(7))
    assert (door.state, door.camera.counters.reopened, door.camera.counters.still) == ("live", 0, 0)


def test_a_camera_that_is_off_says_so_and_goes_on_when_it_is_on_again(stop):
    door = Arriving(stop)
    door.show(scene(1))
    door.taken.get(timeout=PATIENCE_S)
    door.camera.switch(enabled=False)
    assert door.state == "off"
    door.camera.switch(enabled=True)
    assert door.state == "starting"
    door.show(scene(3))
    assert door.taken.get(timeout=PATIENCE_S).encoded == scene(3)
    assert door.state == "live"


def test_what_a_camera_saw_just_before_and_while_it_was_off_is_not_kept_for_later():
    cameras = Cameras([CameraConfig("door", "mqtt")])
    cameras.arrived(scene(1))
    cameras["door"].switch(enabled=False)
    cameras.arrived(scene(2))
    cameras["door"].switch(enabled=True)
    assert cameras.totals().skipped == 2


def test_a_frame_that_waits_for_its_turn_is_dropped_when_its_camera_is_switched_off(stop):
    cameras = Cameras([CameraConfig("a", "mqtt"), CameraConfig("b", "mqtt")])
    frames = cameras.frames(stop)
    cameras.arrived(scene(1))
    first = next(frames).camera
    other = cameras["b" if first == "a" else "a"]
    until(lambda: other.counters.frames == 1)
    other.switch(enabled=False)
    cameras.arrived(scene(2))
    assert next(frames).camera == first
    assert other.counters.frames == 1


def test_a_network_camera_that_is_switched_off_is_hung_up_on_and_called_again_when_it_is_on(network_camera, stop):
    cameras = Cameras([CameraConfig("door", network_camera.url, 0)])
    taken = in_background(cameras.frames(stop))
    first = network_camera.connection()
    first.show(10, 10, 10)
    taken.get(timeout=PATIENCE_S)
    cameras.pause(True)
    assert (cameras.states()["door"].state, cameras.states()["door"].why) == ("off", "paused")
    until(lambda: first.show(20) or first.hung_up.is_set())
    assert network_camera.connections.empty()
    cameras.pause(False)
    network_camera.connection().show(200, 200, 200)
    until(lambda: shade_of(taken.get(timeout=PATIENCE_S)) == 200)
    assert (cameras.states()["door"].state, cameras["door"].counters.reopened) == ("live", 0)


def test_a_camera_switched_off_stays_off_when_the_board_goes_on_from_a_pause(stop):
    door = Arriving(stop)
    door.camera.switch(enabled=False)
    door.cameras.pause(True)
    door.cameras.pause(False)
    assert door.state == "off"


def test_files_end_and_stay_ended_whatever_is_switched(tmp_path, stop):
    cameras = Cameras([CameraConfig("door", write_photos(tmp_path / "p", 10, 20), interval_s=0)])
    assert len(list(cameras.frames(stop))) == 2
    cameras["door"].switch(enabled=False)
    cameras["door"].switch(enabled=True)
    assert (cameras.states()["door"].state, cameras.totals().frames) == ("ended", 2)


def test_a_mask_that_hides_everything_is_refused_with_the_cameras_name():
    with pytest.raises(ConfigError, match=r"camera door: motion\.mask covers the whole picture"):
        Cameras([CameraConfig("door", "mqtt", motion=MotionConfig(mask=("0,0,1,0,1,1,0,1",)))])
