"""Sources of frames: real files, a real video, and a real camera of the kind that speaks MJPEG over HTTP."""

import queue
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_runtime import sources
from edge_runtime.config import CameraConfig
from edge_runtime.preprocess import PictureError
from edge_runtime.sources import (
    ArrivingFrames,
    Counters,
    Frame,
    Newest,
    camera_frames,
    file_frames,
    frames_of,
    merged_frames,
    video_frames,
)
from tests.listener import PATIENCE_S, until


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    """Set when the test ends, so that no source outlives it."""
    event = threading.Event()
    yield event
    event.set()


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
    counters = Counters()
    taken = in_background(camera_frames(CameraConfig("door", network_camera.url, 0, stall_s=1), stop, counters))
    first = network_camera.connection()
    first.show(10, 10, 10)
    assert shade_of(taken.get(timeout=PATIENCE_S)) == 10
    if fault == "ends":
        first.pictures.put(None)
    network_camera.connection().show(200, 200, 200)
    until(lambda: shade_of(taken.get(timeout=PATIENCE_S)) == 200)
    assert counters.reopened == 1


def test_a_camera_that_cannot_be_opened_is_tried_again_until_stopped(stop, monkeypatch):
    monkeypatch.setattr(sources, "MIN_PAUSE_S", 0.01)
    counters = Counters()
    with MjpegCamera() as gone:
        pass
    taken = in_background(camera_frames(CameraConfig("door", gone.url), stop, counters))
    until(lambda: counters.reopened >= 2)
    assert taken.empty()


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


def test_whoever_waits_at_a_slot_is_woken_by_a_frame_a_close_or_a_stop(stop):
    for wake in (lambda slot: slot.put(Frame("door", grey(1), 0, 0)), Newest.close, lambda _: stop.set()):
        slot = Newest(Counters())
        threading.Timer(0.05, wake, [slot]).start()
        slot.take(1e6, stop)


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
    frames = list(merged_frames(cameras, {}, stop, Counters()))
    for name, expected in shades.items():
        assert [shade_of(f) for f in frames if f.camera == name] == list(expected)
    assert len(frames) == 6


def test_a_slow_board_gets_the_newest_frame_and_no_queue_of_old_ones(stop):
    asked_again = threading.Event()

    class Asked(ArrivingFrames):
        def frames(self, stop: threading.Event) -> Iterator[Frame]:
            for frame in super().frames(stop):
                yield frame
                asked_again.set()

    counters = Counters()
    camera = CameraConfig("door", "mqtt")
    source = Asked(camera, counters)
    frames = merged_frames([camera], {"door": source}, stop, counters)
    source.arrived(jpeg(10))
    assert shade_of(next(frames)) == 10
    assert not asked_again.wait(0.1)
    for shade in (20, 30, 40, 50):  # while the first is being handled
        source.arrived(jpeg(shade))
    assert shade_of(next(frames)) == 50
    assert counters.skipped == 3


def test_a_source_that_fails_tells_whoever_takes_its_frames(tmp_path, stop):
    cameras = [
        CameraConfig("good", write_photos(tmp_path / "p", 10), interval_s=0, repeat=True),
        CameraConfig("bad", str(tmp_path / "absent")),
    ]
    with pytest.raises(PictureError, match="absent does not exist"):
        list(merged_frames(cameras, {}, stop, Counters()))


def test_a_stop_ends_merged_frames_and_their_threads(tmp_path, stop):
    cameras = [
        CameraConfig("photos", write_photos(tmp_path / "p", 10), interval_s=0, repeat=True),
        CameraConfig("arriving", "mqtt"),
    ]
    arriving = {"arriving": ArrivingFrames(cameras[1], Counters())}
    frames = merged_frames(cameras, arriving, stop, Counters())
    next(frames)
    stop.set()
    assert list(frames) == []
    until(lambda: not [t for t in threading.enumerate() if t.name in ("source-photos", "source-arriving")])
