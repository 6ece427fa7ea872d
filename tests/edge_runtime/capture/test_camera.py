"""The life cycle of a camera: failures, the motion gate, states, switches."""

import threading
from math import inf
from typing import Any

import cv2
import numpy as np
import pytest

from edge_runtime.capture import Cameras, camera, live
from edge_runtime.config import CameraConfig, MotionConfig
from edge_runtime.errors import ConfigError
from edge_runtime.picture_checks import decode_picture
from tests.edge_runtime.capture.helpers import MjpegCamera, in_background, shade_of, write_photos
from tests.http_camera import HttpCamera
from tests.http_camera import picture as answer_with
from tests.listener import PATIENCE_S, until
from tests.rtsp_camera import OPENCV, TOLERANCE_S, RtspCamera


@pytest.mark.parametrize("fault", ["stalls", "ends"])
def test_a_live_camera_that_stalls_or_ends_is_opened_again(network_camera, stop, fault):
    states: list[str] = []
    config = CameraConfig("door", network_camera.url, 0, stall_s=1)
    cameras = Cameras([config], lambda: states.append(cameras.states()["door"].state))
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
    assert cameras["door"].counters.reopened >= 1
    assert states[:3] == ["live", "stalled", "live"]  # it may stall again: nothing more is shown


def test_a_camera_that_cannot_be_opened_is_tried_again_until_stopped(stop, no_pause):
    with MjpegCamera() as gone:
        pass
    cameras = Cameras([CameraConfig("door", gone.url)])
    assert cameras.states()["door"].state == "starting"
    taken = in_background(cameras.frames(stop))
    until(lambda: cameras["door"].counters.reopened >= 2)
    assert taken.empty()
    assert cameras.states()["door"].state == "lost"
    assert cameras.states()["door"].why.startswith("cannot be opened: connection refused")


@pytest.mark.skipif(OPENCV < (4, 12), reason="before OpenCV 4.12, packets do not carry the time of their arrival")
def test_an_rtsp_camera_that_drops_its_connection_is_opened_again_and_no_frame_is_given_as_a_newer_one(stop, no_pause):
    with RtspCamera() as network_camera:
        states: list[str] = []
        config = CameraConfig("door", network_camera.url, 0, stall_s=2)
        cameras = Cameras([config], lambda: states.append(cameras.states()["door"].state))
        lateness = in_background(map(network_camera.lateness_s, cameras.frames(stop)))
        found = [lateness.get(timeout=PATIENCE_S)]
        network_camera.drops.set()
        until(lambda: states == ["live", "stalled", "live"])
        found += [lateness.get(timeout=PATIENCE_S) for _ in range(lateness.qsize() + 5)]
        assert max(found) <= TOLERANCE_S
        assert cameras["door"].counters.reopened == 1
        stop.set()


def test_an_rtsp_camera_that_refuses_the_login_is_named_until_it_takes_it(stop, no_pause, tmp_path, caplog):
    (tmp_path / "password").write_text("s3cret-word")
    login = {"username": "viewer", "password_file": str(tmp_path / "password")}
    with RtspCamera("401 Unauthorized", challenge='Digest realm="camera", nonce="abc"') as network_camera:
        cameras = Cameras([CameraConfig("door", network_camera.url, 0, **login)])
        taken = in_background(cameras.frames(stop))
        until(lambda: cameras["door"].counters.reopened >= 2)
        state = cameras.states()["door"]
        refused = "cannot be opened: the camera answers 401 Unauthorized: check username and password_file"
        assert (state.state, state.why) == ("lost", refused)
        assert caplog.text.count("camera lost camera=door") == 1
        network_camera.answer = "200 OK"
        taken.get(timeout=PATIENCE_S)
        assert cameras.states()["door"].state == "live"
        assert "s3cret" not in caplog.text
        stop.set()


def test_an_error_of_a_driver_is_the_reason_and_the_camera_is_opened_again(stop, no_pause, monkeypatch):
    def broken(*_: object) -> None:
        raise ValueError("no such register")

    monkeypatch.setattr(live, "VideoCapture", broken)
    cameras = Cameras([CameraConfig("door", "/dev/video0")])
    in_background(cameras.frames(stop))
    until(lambda: cameras["door"].counters.reopened >= 2)
    assert cameras.states()["door"].why == "ValueError: no such register"


def test_a_driver_that_cannot_be_killed_has_one_thread_after_any_number_of_tries(stop, no_pause, monkeypatch):
    let_go = threading.Event()
    monkeypatch.setattr(live, "FIRST_FRAME_S", -0.9)  # with stall_s: a tenth of a second
    monkeypatch.setattr(live, "LEAVE_S", 0.1)
    monkeypatch.setattr(live, "VideoCapture", lambda *_: let_go.wait() and None)
    cameras = Cameras([CameraConfig("hung", "/dev/video0", stall_s=1)])
    in_background(cameras.frames(stop))
    until(lambda: cameras["hung"].counters.reopened >= 4)
    assert [thread.name for thread in threading.enumerate()].count("capture-hung") == 1
    assert cameras.states()["hung"].why == "the last try to read from it still hangs"
    let_go.set()


# ---- gate, states and switches of a camera ----


def pixels(shade: int | None) -> np.ndarray:
    """A wall with a box of the given shade, or without."""
    wall = np.full((120, 160, 3), 100, np.uint8)
    wall[:, ::8] = 140
    if shade is not None:
        wall[40:80, 40:80] = shade
    return wall


def scene(shade: int | None) -> bytes:
    return cv2.imencode(".png", pixels(shade))[1].tobytes()


class Arriving:
    """One camera over MQTT, and what comes of its pictures."""

    def __init__(self, stop: threading.Event, **settings: Any) -> None:
        self.cameras = Cameras([CameraConfig("door", "mqtt", **settings)])
        self.camera = self.cameras["door"]
        self.taken = in_background(self.cameras.frames(stop))

    def show(self, picture: bytes) -> None:
        """Returns when the camera has looked at it."""
        frames = self.camera.counters.frames
        self.cameras.arrived(None, picture)
        until(lambda: self.camera.counters.frames == frames + 1)

    @property
    def state(self) -> str:
        return self.cameras.states()["door"].state


def test_only_motion_passes_the_gate_of_a_camera_with_motion_detection(stop):
    door = Arriving(stop, motion=MotionConfig(enabled=True))
    for picture in (scene(None), scene(None), scene(250), scene(None)):
        door.show(picture)
    assert door.taken.get(timeout=PATIENCE_S).encoded == scene(250)
    assert (door.camera.counters.still, door.taken.empty()) == (3, True)
    door.camera.gate.enabled = False
    door.show(scene(None))
    assert door.taken.get(timeout=PATIENCE_S).encoded == scene(None)


def test_a_jpeg_of_a_live_camera_is_decoded_whole_only_if_it_passes_the_gate(network_camera, stop, monkeypatch):
    whole = []
    monkeypatch.setattr(live, "decode_picture", lambda data: whole.append(data) or decode_picture(data))
    cameras = Cameras([CameraConfig("door", network_camera.url, 0, motion=MotionConfig(enabled=True))])
    taken = in_background(cameras.frames(stop))
    connection = network_camera.connection()
    pictures = [cv2.imencode(".jpg", pixels(shade))[1].tobytes() for shade in (None, None, 250)]
    for number, picture in enumerate(pictures, 1):
        connection.pictures.put(picture)
        until(lambda number=number: cameras["door"].counters.frames == number)
    frame = taken.get(timeout=PATIENCE_S)
    assert np.array_equal(frame.pixels, decode_picture(pictures[2]))
    assert whole == pictures[2:]


def test_a_camera_with_always_the_same_picture_is_reported_and_not_opened_again(stop, caplog):
    door = Arriving(stop, frozen_s=0.001)
    door.show(scene(None))
    assert door.state == "live"
    until(lambda: door.show(scene(None)) or door.state == "frozen")
    door.show(scene(None))
    assert caplog.text.count("camera frozen") == 1
    door.show(scene(7))
    assert (door.state, door.camera.counters.reopened, door.camera.counters.still) == ("live", 0, 0)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("mqtt", "over MQTT: does the camera's software publish on its topic?"),
        ("frigate", "with an event of Frigate: are frigate_camera and the prefix those of Frigate?"),
    ],
)
def test_a_camera_without_a_first_picture_is_waiting_and_the_log_says_so_once(
    stop, monkeypatch, caplog, source, reason
):
    caplog.set_level("INFO")
    monkeypatch.setattr(camera, "FIRST_PICTURE_S", 0.0)
    cameras = Cameras([CameraConfig("door", source)])
    in_background(cameras.frames(stop))
    until(lambda: cameras.states()["door"].state == "waiting")
    assert cameras.states()["door"].why == f"no picture has come {reason}"
    cameras["door"].tell_if_nothing_comes(inf)
    assert caplog.text.count(f"camera waiting camera=door reason=no picture has come {reason}") == 1


def test_pictures_that_cannot_be_decoded_are_no_first_picture(stop, monkeypatch):
    monkeypatch.setattr(camera, "FIRST_PICTURE_S", 0.0)
    cameras = Cameras([CameraConfig("door", "mqtt")])
    cameras.arrived(None, b"no picture")
    in_background(cameras.frames(stop))
    until(lambda: cameras["door"].counters.unreadable == 1)
    cameras["door"].switch(enabled=False)
    cameras["door"].switch(enabled=True)
    until(lambda: cameras.states()["door"].state == "waiting")
    assert cameras.states()["door"].why == "none of 1 picture(s) could be decoded"
    cameras.arrived(None, scene(1))
    until(lambda: cameras.states()["door"].state == "live")


def test_an_address_that_gives_only_a_picture_that_cannot_be_decoded_is_waiting(stop, monkeypatch):
    monkeypatch.setattr(camera, "FIRST_PICTURE_S", 0.0)
    with HttpCamera(lambda _: answer_with(b"no picture")) as door:
        cameras = Cameras([CameraConfig("door", door.url, 0)])
        in_background(cameras.frames(stop))
        until(lambda: cameras["door"].counters.unreadable == 1)
        until(lambda: cameras.states()["door"].state == "waiting")
        stop.set()


def test_a_camera_that_is_off_has_that_state_and_goes_on_when_it_is_on_again(stop):
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


def test_pictures_from_just_before_and_while_a_camera_was_off_are_skipped():
    cameras = Cameras([CameraConfig("door", "mqtt")])
    cameras.arrived(None, scene(1))
    cameras["door"].switch(enabled=False)
    cameras.arrived(None, scene(2))
    cameras["door"].switch(enabled=True)
    assert cameras.totals().skipped == 2


def test_a_network_camera_is_disconnected_when_it_is_switched_off_and_connected_again_when_it_is_on(
    network_camera, stop
):
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


def test_a_camera_that_is_switched_off_stays_off_after_a_pause_of_the_board(stop):
    door = Arriving(stop)
    door.camera.switch(enabled=False)
    door.cameras.pause(True)
    door.cameras.pause(False)
    assert door.state == "off"


def test_files_that_have_ended_stay_ended_when_the_camera_is_switched(tmp_path, stop):
    cameras = Cameras([CameraConfig("door", write_photos(tmp_path / "p", 10, 20), interval_s=0)])
    assert len(list(cameras.frames(stop))) == 2
    cameras["door"].switch(enabled=False)
    cameras["door"].switch(enabled=True)
    assert (cameras.states()["door"].state, cameras.totals().frames) == ("ended", 2)


def test_a_mask_over_the_whole_picture_is_an_error_with_the_cameras_name():
    with pytest.raises(ConfigError, match=r"camera door: motion\.mask covers the whole picture"):
        Cameras([CameraConfig("door", "mqtt", motion=MotionConfig(mask=("0,0,1,0,1,1,0,1",)))])
