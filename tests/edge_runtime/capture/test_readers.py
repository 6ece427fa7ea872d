"""One source, read once: real files, a real video, real network cameras that speak MJPEG and H.264."""

import hashlib
import re
import threading
import time
import weakref
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_runtime.capture import Cameras, Counters, Frame
from edge_runtime.capture import frame as frame_module
from edge_runtime.capture.frame import CameraError, NewestFrame
from edge_runtime.capture.live import ArrivalTimes, live_frames
from edge_runtime.capture.mqtt_pictures import MqttPictures
from edge_runtime.capture.readers import file_frames, reader_of, video_frames
from edge_runtime.capture.video_capture import Grabbed, VideoCapture
from edge_runtime.capture.watched_folder import WatchedFolder
from edge_runtime.config import CameraConfig
from edge_runtime.picture_checks import PictureError
from edge_runtime.shutdown import DriverThread, threads_in_driver
from tests.edge_runtime.capture.helpers import (
    MjpegCamera,
    grey,
    in_background,
    jpeg,
    large_jpeg,
    shade_of,
    write_photos,
)
from tests.listener import PATIENCE_S, until
from tests.rtsp_camera import OPENCV, TOLERANCE_S, RtspCamera
from tests.server.costly_jpeg import costly_jpeg

# ---- files ----


def test_photos_are_read_once_in_order(tmp_path, stop):
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


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "it does not exist"), (b"", "is no video"), (b"RIFF....AVI LIST", "is no video")],
)
def test_a_file_that_is_no_video_raises_an_error_with_the_reason(tmp_path, stop, content, reason):
    path = tmp_path / "x.avi"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PictureError, match=rf"x\.avi cannot be opened: .*{reason}"):
        list(video_frames(CameraConfig("door", str(path), repeat=True), stop, Counters()))


# ---- a live camera ----


def test_a_live_camera_gives_its_newest_frame_and_counts_the_skipped(network_camera, stop):
    counters = Counters()
    frames = live_frames(CameraConfig("door", network_camera.url, interval_s=0), stop, counters)
    threading.Thread(target=lambda: network_camera.connection().show(10, 10, 10), daemon=True).start()
    assert shade_of(next(frames)) == 10
    until(lambda: counters.skipped >= 1)  # the rest of the greeting, unseen
    skipped = counters.skipped
    network_camera.all[0].show(*range(20, 110, 10))
    until(lambda: counters.skipped >= skipped + 8)
    assert shade_of(next(frames)) >= 90


def test_an_rtsp_camera_gets_the_login_that_is_in_the_files(stop, tmp_path):
    (tmp_path / "password").write_text("p@ss/w:rd")
    login = {"username": "viewer", "password_file": str(tmp_path / "password")}
    with RtspCamera(challenge='Digest realm="camera", nonce="abc"') as camera:
        next(live_frames(CameraConfig("door", camera.url, interval_s=0, **login), stop, Counters()))
        values = dict(re.findall(r'(\w+)="([^"]*)"', camera.logins[0]))
        stop.set()
    first, second = (
        hashlib.md5(text.encode()).hexdigest() for text in ("viewer:camera:p@ss/w:rd", f"DESCRIBE:{values['uri']}")
    )
    assert values["response"] == hashlib.md5(f"{first}:abc:{second}".encode()).hexdigest()


def test_only_key_frames_are_decoded_if_the_camera_is_configured_so(stop, monkeypatch):
    monkeypatch.setenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_transport;tcp")  # a user's own options stay
    with RtspCamera(fps=50) as camera:
        frames = live_frames(CameraConfig("door", camera.url, interval_s=0, key_frames=True), stop, Counters())
        assert {shade_of(next(frames)) for _ in range(4)} == {0, 140}  # of the first frame and of the 20th
        stop.set()


def test_a_silent_stream_has_stalled_and_gives_no_older_frame_as_a_new_one(stop, monkeypatch):
    """The decoder keeps some frames. After a read timeout FFmpeg returns them, one for each further timeout."""
    reads, grab = [], VideoCapture.grab
    monkeypatch.setattr(VideoCapture, "grab", lambda capture: reads.append(grab(capture)) or reads[-1])
    with RtspCamera() as camera:
        frames = live_frames(CameraConfig("door", camera.url, interval_s=0.5, stall_s=1), stop, Counters())
        seen = [next(frames)]
        camera.stalls.set()
        with pytest.raises(CameraError, match="shows no new frame for 1 s"):
            seen += frames
        assert seen[-1].captured <= camera.sent_at[-1] + TOLERANCE_S
    until(lambda: not threads_in_driver())
    silent = [read for read in reads if read is None or read.ended - read.started >= 1]
    assert len(silent) == 1  # it is stalled after one timeout, not after one for each frame that was kept


@pytest.mark.skipif(OPENCV < (4, 12), reason="before OpenCV 4.12, packets do not carry the time of their arrival")
@pytest.mark.parametrize("key_frames", [False, True])
def test_the_time_of_a_frame_is_never_later_than_its_arrival(stop, key_frames):
    """Its data arrived before the frames that a decoder keeps were returned: at the start, and after a gap."""
    with RtspCamera() as camera:
        config = CameraConfig("door", camera.url, interval_s=0, stall_s=5, key_frames=key_frames)
        frames = live_frames(config, stop, Counters())
        lateness = [camera.lateness_s(next(frames))]
        camera.stalls.set()
        camera.wait_silent()
        last = len(camera.sent_at)
        threading.Timer(1.5, camera.stalls.clear).start()
        while len(camera.sent_at) < last + 4:
            lateness.append(camera.lateness_s(next(frames)))
    assert max(lateness) <= TOLERANCE_S


def test_the_last_picture_from_before_a_gap_is_not_given_as_a_new_one_after_it(stop):
    with MjpegCamera(says_length=False) as camera:
        taken = in_background(live_frames(CameraConfig("door", camera.url, interval_s=0, stall_s=5), stop, Counters()))
        connection = camera.connection()
        for _ in range(8):
            connection.pictures.put(large_jpeg(10))
        while shade_of(taken.get(timeout=PATIENCE_S)) != 10:
            pass
        stop.wait(1.0)  # the gap; one picture is still on its way
        resumed = time.monotonic()
        for _ in range(4):
            connection.pictures.put(large_jpeg(200))
        while (frame := taken.get(timeout=PATIENCE_S)) and shade_of(frame) != 200:
            assert frame.captured < resumed
        stop.set()


def test_times_of_arrival_are_known_or_on_the_early_side_and_a_frame_that_ends_a_gap_has_none():
    arrivals = ArrivalTimes(10.0)
    # Unknown: the first three may have arrived as early as the opening began, later ones arrive as they are read.
    assert [arrivals.next(t - 0.1, t, None) for t in (12.0, 12.1, 12.2)] == [10.0, 10.0, 10.0]
    assert arrivals.next(12.2, 12.3, None) == 12.3
    assert arrivals.next(12.3, 12.4, 0.25) == 12.15
    # A gap: its last frame is dropped, and each one from before it.
    assert arrivals.next(12.4, 14.4, 0.0) is None
    assert arrivals.next(14.4, 14.5, 0.2) is None
    assert arrivals.next(14.5, 14.6, 0.1) == 14.5
    # Reads that usually take long are no gap.
    assert arrivals.next(14.6, 17.6, None) == 17.6


def test_a_capture_thread_that_is_about_to_end_does_not_count_as_hanging(network_camera, stop):
    class Leaving(DriverThread):
        """Goes when it is waited for."""

        def join(self, timeout: float | None = None) -> None:
            may_end.set()
            super().join(timeout)

    may_end = threading.Event()
    Leaving(target=may_end.wait, name="capture-door").start()
    frames = live_frames(CameraConfig("door", network_camera.url, interval_s=0), stop, Counters())
    threading.Thread(target=lambda: network_camera.connection().show(10, 10, 10), daemon=True).start()
    assert shade_of(next(frames)) == 10


@pytest.mark.parametrize(
    ("source", "reader"),
    [
        ("rtsp://camera/1", live_frames),
        ("http://camera/clip.mp4", live_frames),
        ("/dev/video0", live_frames),
        ("rpicam", live_frames),
        ("nvargus", live_frames),
        ("clip.MP4", video_frames),
        ("photos", file_frames),
        ("photos.tar", file_frames),
        ("photo.jpg", file_frames),
    ],
)
def test_the_form_of_a_source_decides_how_it_is_read(source, reader):
    assert reader_of(CameraConfig("door", source)) is reader


# ---- the slot, pictures over MQTT ----


def test_a_slot_keeps_the_newest_frame_and_counts_what_it_replaces(stop):
    counters = Counters()
    slot = NewestFrame(counters)
    for shade in (10, 20, 30):
        slot.put(Frame("door", grey(shade), 0, 0))
    frame = slot.take(PATIENCE_S, stop)
    assert frame is not None
    assert shade_of(frame) == 30
    assert counters.skipped == 2
    assert slot.take(0, stop) is None


@pytest.mark.parametrize("wake", [lambda slot: slot.put(Frame("door", grey(1), 0, 0)), NewestFrame.close])
def test_a_frame_or_a_close_ends_the_waiting_at_a_slot(stop, monkeypatch, wake):
    monkeypatch.setattr(frame_module, "POLL_S", 1e6)
    slot = NewestFrame(Counters())
    threading.Timer(0.05, wake, [slot]).start()
    slot.take(1e6, stop)


def test_a_stop_ends_the_waiting_at_a_slot(stop):
    threading.Timer(0.05, stop.set).start()
    assert NewestFrame(Counters()).take(1e6, stop) is None


class StopAfterFrame(threading.Event):
    """Looks, when a source asks it after its first frame, whether that one's pixels are free; then it is set."""

    pixels: "weakref.ref[np.ndarray] | None" = None
    found_free = False

    def is_set(self) -> bool:
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> bool:
        if self.pixels and not super().is_set():
            self.found_free = self.pixels() is None
            self.set()
        return super().wait(timeout)


@pytest.mark.parametrize("kind", ["photos", "video", "folder", "mqtt"])
def test_a_frame_is_free_before_its_source_reads_the_next_one(kind, video, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg(50))
    source = {"photos": str(tmp_path / "photos"), "video": video, "folder": f"watch:{tmp_path / 'photos'}"}.get(kind)
    camera, stop, counters = (
        CameraConfig("door", source or kind, existing=kind == "folder"),
        StopAfterFrame(),
        Counters(),
    )
    if kind == "mqtt":
        pictures = MqttPictures(camera, counters)
        pictures.put(jpeg(50))
        frames = pictures.frames(stop)
    elif kind == "folder":
        frames = WatchedFolder(camera, counters).frames(stop)
    else:
        frames = reader_of(camera)(camera, stop, counters)
    held = [next(frames)]
    stop.pixels = weakref.ref(held.pop().pixels)
    assert next(frames, None) is None
    assert stop.found_free


def test_the_newest_picture_over_mqtt_is_decoded_when_it_is_taken(stop):
    counters = Counters()
    source = MqttPictures(CameraConfig("door", "mqtt"), counters)
    for data in (jpeg(10), jpeg(20)):
        source.put(data)
    frame = next(source.frames(stop))
    assert (shade_of(frame), frame.camera, frame.encoded) == (20, "door", jpeg(20))
    assert counters.skipped == 1


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (b"garbage", "does not start a JPEG"),
        (cv2.imencode(".png", np.zeros((4000, 4001), np.uint8))[1].tobytes(), "at most 16000000 are decoded"),
        (costly_jpeg(64, 100), "scans"),
    ],
    ids=["garbage", "large", "costly"],
)
def test_a_picture_over_mqtt_that_is_unreadable_or_costly_is_counted_and_the_next_one_is_given(
    stop, caplog, picture, reason
):
    counters = Counters()
    source = MqttPictures(CameraConfig("door", "mqtt"), counters)
    taken = in_background(source.frames(stop))
    source.put(picture)
    until(lambda: counters.unreadable == 1)
    until(lambda: reason in caplog.text)
    source.put(jpeg(30))
    assert shade_of(taken.get(timeout=PATIENCE_S)) == 30


def test_pictures_faster_than_the_interval_are_skipped_and_uneven_ones_are_not(stop, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(frame_module.time, "monotonic", lambda: now[0])
    counters = Counters()
    source = MqttPictures(CameraConfig("door", "mqtt", interval_s=1), counters)
    taken = in_background(source.frames(stop))
    for number, at in enumerate([0, 0.9, 2.1, 2.9, 3.0, 3.1, 3.5, 4.2, 9, 9.4]):
        now[0] = at
        source.put(jpeg(10 * number))
        until(lambda n=number: taken.qsize() + counters.skipped == n + 1)
    assert [shade_of(taken.get_nowait()) // 10 for _ in range(taken.qsize())] == [0, 1, 2, 3, 7, 8]


# ---- only what is due ----


def put_all(slot: NewestFrame, stop: threading.Event, times: list[float]) -> list[float]:
    """Shows frames of these times to somebody who waits for each. Returns the times of those that were taken."""
    taken = []
    for captured in times:
        if slot.is_due(captured):
            assert slot.put(Frame("door", grey(1), 0, captured))
            frame = slot.take(0, stop)
            assert frame is not None
            taken.append(frame.captured)
    return taken


def test_frames_that_are_not_due_are_skipped_and_the_rate_is_right_on_average(stop):
    counters = Counters()
    taken = put_all(NewestFrame(counters, interval_s=1), stop, [100 + 0.4 * number for number in range(26)])
    assert taken == pytest.approx([100, 101.2, 102, 103.2, 104, 105.2, 106, 107.2, 108, 109.2, 110])
    assert counters.skipped == 26 - len(taken)


def test_after_a_gap_frames_do_not_come_faster_to_make_up_for_it(stop):
    assert put_all(NewestFrame(Counters(), interval_s=1), stop, [0, 10.5, 10.9, 11.4, 11.6]) == [0, 10.5, 11.6]


def test_a_frame_that_was_captured_before_it_was_due_is_never_kept(stop):
    """It would be old when it is taken."""
    slot = NewestFrame(Counters(), interval_s=10)
    assert slot.put(Frame("door", grey(1), 0, 100))
    assert slot.take(0, stop)
    assert not slot.put(Frame("door", grey(1), 0, 101))
    assert slot.take(-1e6, stop) is None


def test_opencv_converts_only_frames_that_are_due(stop, monkeypatch):
    class Device:
        """Counts what it is asked for."""

        grabbed = retrieved = 0
        opened_at = 0.0

        def grab(self) -> Grabbed | None:
            Device.grabbed += 1
            now = time.monotonic()
            return None if stop.wait(0.001) else Grabbed(now, now, 0.0)

        def retrieve(self) -> np.ndarray:
            Device.retrieved += 1
            return grey(50)

    monkeypatch.setattr("edge_runtime.capture.live.VideoCapture", lambda *_: nullcontext(Device()))
    counters = Counters()
    frames = live_frames(CameraConfig("door", "/dev/video0", interval_s=3600), stop, counters)
    next(frames)
    in_background(frames)
    until(lambda: Device.grabbed >= 50)
    assert Device.retrieved <= 2  # the first one may be replaced before it is taken
    assert counters.skipped >= 40


def test_a_camera_that_is_opened_again_keeps_its_interval(stop, no_pause):
    with MjpegCamera() as camera:
        cameras = Cameras([CameraConfig("door", camera.url, interval_s=3600)])
        taken = in_background(cameras.frames(stop))
        first = camera.connection()
        first.show(10)
        taken.get(timeout=PATIENCE_S)
        first.pictures.put(None)
        camera.connection().show(20, 30)
        until(lambda: cameras["door"].counters.skipped == 2)
        assert taken.empty()
        stop.set()
