"""All cameras of a board together."""

import re
import signal
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest

from edge_runtime.capture import Cameras, Frame, camera
from edge_runtime.capture.frigate import FrigateTopics
from edge_runtime.capture.mqtt_pictures import MAX_PICTURE, MqttPictures
from edge_runtime.config import CameraConfig
from edge_runtime.errors import ConfigError
from tests.edge_runtime.capture.helpers import grey, in_background, jpeg, shade_of, write_photos
from tests.listener import PATIENCE_S, until
from tests.rtsp_camera import RtspCamera


def test_frames_of_several_cameras_come_until_all_have_ended(tmp_path, stop):
    shades = {"a": (10, 20, 30), "b": (100,), "c": (200, 210)}
    cameras = [CameraConfig(name, write_photos(tmp_path / name, *s), interval_s=0) for name, s in shades.items()]
    frames = list(Cameras(cameras).frames(stop))
    for name, expected in shades.items():
        assert [shade_of(f) for f in frames if f.camera == name] == list(expected)
    assert len(frames) == 6


def test_the_memory_of_a_frame_is_free_before_the_next_one_is_decoded(tmp_path, stop):
    source = write_photos(tmp_path / "photos", 10, 20, 30)
    size = 3 * 4000 * 4000  # larger than the buffer of 32 MB with which a file is read
    for path in Path(source).iterdir():
        path.write_bytes(cv2.imencode(".jpg", grey(10, 4000))[1].tobytes())
    frames = Cameras([CameraConfig("door", source, interval_s=0)]).frames(stop)
    tracemalloc.start()
    try:
        deque(frames, maxlen=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size <= peak < 2 * size


def test_a_slow_board_gets_the_newest_frame_and_none_is_queued(stop, monkeypatch):
    asked_again = threading.Event()

    class Asked(MqttPictures):
        def frames(self, stop: threading.Event) -> Iterator[Frame]:
            for frame in super().frames(stop):
                yield frame
                asked_again.set()

    monkeypatch.setattr(camera, "MqttPictures", Asked)
    cameras = Cameras([CameraConfig("door", "mqtt")])
    frames = cameras.frames(stop)
    cameras.arrived(None, jpeg(10))
    assert shade_of(next(frames)) == 10
    assert not asked_again.wait(0.1)
    for shade in (20, 30, 40, 50):  # while the first is being handled
        cameras.arrived(None, jpeg(shade))
    assert shade_of(next(frames)) == 50
    assert cameras.totals().skipped == 3


def test_every_source_that_can_never_work_is_named_before_any_is_opened(tmp_path):
    (tmp_path / "v.avi").write_bytes(b"no video")
    (tmp_path / "p.jpg").write_bytes(b"no picture")
    (tmp_path / "notes").write_bytes(b"no tar")
    sources = {
        "good": write_photos(tmp_path / "p", 10),
        "away": "rtsp://127.0.0.1:1/x",
        "unplugged": "/dev/no-such-camera",
        "mqtt": "mqtt",
        "video": str(tmp_path / "v.avi"),
        "picture": str(tmp_path / "p.jpg"),
        "tar": str(tmp_path / "notes"),
        "typo": "rtps://camera/1",
        "zero": "a\0.jpg",
        "folder": "watch:a\0",
    }
    with pytest.raises(ConfigError) as raised:
        Cameras([CameraConfig(*pair) for pair in sources.items()]).check()
    for name, fault in {
        "video": "v.avi cannot be opened: the file is no video",
        "picture": "does not start a JPEG, PNG or WebP",
        "tar": "notes is no tar",
        "typo": "rtps:// is an unknown kind of stream",
        "zero": "its source contains a zero byte",
        "folder": "its source contains a zero byte",
    }.items():
        assert re.search(f"camera {name}: [^;]*{fault}", str(raised.value))
    assert str(raised.value).count("camera ") == 6
    assert not [t for t in threading.enumerate() if t.name.startswith("source-")]


def test_a_source_that_may_appear_later_is_a_warning(tmp_path):
    (tmp_path / "empty").mkdir()
    sources = {
        "good": write_photos(tmp_path / "p", 10),
        "away": "rtsp://127.0.0.1:1/x",
        "unplugged": "/dev/no-such-camera",
        "unmounted": str(tmp_path / "disk/photos"),
        "video": str(tmp_path / "later.mp4"),
        "empty": str(tmp_path / "empty"),
    }
    warnings = Cameras([CameraConfig(*pair) for pair in sources.items()]).check()
    assert [re.sub(rf"{tmp_path}/", "", warning).split(" (")[0] for warning in warnings] == [
        "camera unplugged: /dev/no-such-camera does not exist yet",
        "camera unmounted: disk/photos does not exist yet",
        "camera video: later.mp4 does not exist yet",
        "camera empty: empty holds no picture",
    ]


def test_a_directory_with_one_damaged_photo_is_accepted(tmp_path):
    camera = CameraConfig("door", write_photos(tmp_path / "p", 10, 20))
    (tmp_path / "p/0.jpg").write_bytes(b"")
    Cameras([camera]).check()


def test_a_missing_or_empty_directory_is_tried_again_while_the_other_cameras_go_on(tmp_path, stop, no_pause, caplog):
    (tmp_path / "empty").mkdir()
    paths = {name: tmp_path / name for name in ("unmounted", "empty")}
    cameras = Cameras(
        [
            *(CameraConfig(name, str(path), interval_s=0, repeat=True) for name, path in paths.items()),
            CameraConfig("other", write_photos(tmp_path / "o", 200), interval_s=0, repeat=True),
        ]
    )
    cameras.check()
    frames = cameras.frames(stop)
    while [cameras.states()[name].state for name in paths] != ["lost", "lost"]:
        assert next(frames).camera == "other"
    assert "unmounted does not exist" in cameras.states()["unmounted"].why
    assert "empty holds no picture" in cameras.states()["empty"].why
    assert caplog.text.count("opened again until it works") == len(paths)
    write_photos(tmp_path / "mounted", 10)
    (tmp_path / "mounted").rename(paths["unmounted"])
    (paths["empty"] / "0.jpg").write_bytes(jpeg(10))
    missing = set(paths)
    while missing:
        missing -= {next(frames).camera}


def test_a_camera_that_hangs_while_it_is_opened_does_not_delay_the_others(stop, network_camera):
    with RtspCamera(hangs=True) as hanging:
        cameras = Cameras([CameraConfig("hung", hanging.url), CameraConfig("good", network_camera.url, 0)])
        taken = in_background(cameras.frames(stop))
        assert hanging.connected.acquire(timeout=PATIENCE_S)
        network_camera.connection().show(10, 10, 10)
        assert taken.get(timeout=PATIENCE_S).camera == "good"
        assert not hanging.connected.acquire(blocking=False)  # the second connection asks why it cannot be opened


def test_a_signal_whose_handler_takes_longer_than_a_wait_for_frames_ends_them(stop, monkeypatch):
    """`aiflow run` waits for frames on its main thread, and Python handles signals there."""
    wait_s = 0.2
    monkeypatch.setattr("edge_runtime.capture.cameras.POLL_S", wait_s)

    def on_signal(*_: object) -> None:
        time.sleep(2 * wait_s)
        stop.set()

    before = signal.signal(signal.SIGUSR1, on_signal)
    sender = threading.Timer(wait_s / 2, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
    sender.start()
    try:
        assert not list(Cameras([CameraConfig("door", "mqtt")]).frames(stop))
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)


def test_a_picture_over_mqtt_goes_to_the_camera_of_its_topic():
    cameras = Cameras([CameraConfig("door", "mqtt"), CameraConfig("yard", "mqtt"), CameraConfig("disk", "photos")])
    assert cameras.mqtt_cameras() == ["door", "yard"]
    frames = cameras.frames(threading.Event())
    assert cameras.arrived("yard", jpeg(10))
    first = next(frames)
    assert cameras.arrived("door", jpeg(20))
    second = next(frames)
    frames.close()
    assert [(frame.camera, shade_of(frame)) for frame in (first, second)] == [("yard", 10), ("door", 20)]
    assert cameras.totals().skipped == 0


def test_topics_with_pictures_take_large_packets_and_a_board_without_frigates_reviews_works():
    sources = {"disk": "photos", "door": "mqtt", "gate": "frigate"}
    cameras = Cameras([CameraConfig("yard", "mqtt", topic="cam/y"), *(CameraConfig(*each) for each in sources.items())])
    routes = [*cameras.routes("home", "b1"), *FrigateTopics("frigate", cameras).routes()]
    pictures = {route.filter for route in routes if route.max_packet == MAX_PICTURE}
    assert pictures == {"cam/y", "aiflow/home/b1/down/frame/#", "frigate/gate/+/snapshot"}
    assert [route.filter for route in routes if route.optional] == ["frigate/reviews"]
    others = Cameras([CameraConfig("disk", "photos")])
    assert others.routes("home", "b1") == FrigateTopics("frigate", others).routes() == []


def test_a_picture_without_a_cameras_name_is_for_the_only_camera_with_pictures_over_mqtt(stop):
    cameras = Cameras([CameraConfig("door", "mqtt"), CameraConfig("disk", "photos")])
    frames = cameras.frames(stop)
    assert cameras.arrived(None, jpeg(10))
    assert next(frames).camera == "door"


def test_a_picture_for_no_camera_is_not_taken():
    cameras = Cameras([CameraConfig("door", "mqtt"), CameraConfig("yard", "mqtt"), CameraConfig("disk", "photos")])
    assert [cameras.arrived(name, jpeg(10)) for name in (None, "attic", "disk", "door")] == [False, False, False, True]
    assert not Cameras([CameraConfig("disk", "photos")]).arrived(None, jpeg(10))


def test_files_that_vanish_are_tried_again_while_the_other_cameras_go_on(tmp_path, stop, no_pause):
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


def test_a_frame_that_waits_for_its_turn_is_dropped_when_its_camera_is_switched_off(stop):
    cameras = Cameras([CameraConfig("a", "mqtt"), CameraConfig("b", "mqtt")])
    frames = cameras.frames(stop)
    cameras.arrived("a", jpeg(10))
    assert next(frames).camera == "a"
    cameras.arrived("b", jpeg(20))
    until(lambda: cameras["b"].counters.frames == 1)
    cameras["b"].switch(enabled=False)
    cameras.arrived("b", jpeg(20))
    cameras.arrived("a", jpeg(30))
    assert next(frames).camera == "a"
    assert cameras["b"].counters.frames == 1
