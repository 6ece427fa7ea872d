"""Which keys go with which source; passwords in addresses are refused, and never shown."""

import re
from pathlib import Path

import pytest

from edge_runtime.capture import Cameras
from edge_runtime.capture.login import Login, login_of, with_login
from edge_runtime.config import CameraConfig, RuntimeConfig, load_toml
from edge_runtime.config.camera_source import kind_of
from edge_runtime.errors import ConfigError

LOGIN = {"username": "viewer", "password_file": "/no/such/file"}


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        *(
            ("mqtt", "mqtt"),
            ("frigate", "frigate"),
            ("rpicam", "rpicam"),
            ("nvargus", "nvargus"),
            ("watch:/srv/ftp", "watch"),
        ),
        *(("rtsp://h/x", "address"), ("HTTP://h/x.mp4", "address"), ("/dev/v4l/by-id/usb-cam", "device")),
        *(("clip.MP4", "video"), ("photos", "pictures"), ("photos.tar", "pictures"), ("mqtt/photos", "pictures")),
    ],
)
def test_the_form_of_a_source_decides_its_kind(source, kind):
    assert kind_of(source) == kind


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        ("photos", {"snapshot": True}),
        ("rtsp://h/x", {"snapshot": True}),
        ("/dev/video0", {"key_frames": True}),
        ("mqtt", LOGIN),
        ("udp://h:1", LOGIN),
        ("photos", {"topic": "a/b"}),
        ("photos", {"existing": True}),
        ("rtsp://h/x", {"repeat": True}),
        ("mqtt", {"frigate_camera": "front"}),
        ("mqtt", {"wait_s": 0.0}),
        ("frigate", {"topic": "a/b"}),
        ("/dev/video0", {"width": 640}),
        ("rtsp://h/x", {"username": "viewer"}),
        ("rtsp://h/x", {"password_file": "/etc/x"}),
        ("http://h/?u={username}", {}),
        ("watch:", {}),
        *(("mqtt", {"topic": topic}) for topic in ("a/#", "a/+/b", "aiflow/home/b1/down/frame", "$SYS/x", "a\0")),
    ],
)
def test_a_key_that_does_not_go_with_its_source_is_refused(source, keys):
    with pytest.raises(ConfigError, match=f"camera door: .*({'|'.join(keys) or 'username|watch'})"):
        CameraConfig("door", source, **keys)


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        ("http://h/x.jpg", {"snapshot": True, **LOGIN}),
        ("rtsp://h:554/x", {"key_frames": True, **LOGIN}),
        ("http://[::1]:80/x@y", {}),
        ("http://h/?u={username}&pwd={password}", LOGIN),
        ("mqtt", {"topic": "frigate/front door/person/snapshot"}),
        ("watch:/srv/ftp", {"existing": True}),
        ("clip.mp4", {"repeat": True}),
        ("frigate", {"frigate_camera": "front_door", "wait_s": 0.0}),
        ("rpicam", {"width": 640, "height": 480, "fps": 5}),
        *((path, {}) for path in ("photos@home", "/srv/a:b@c", "./a:b@c", "photo?.jpg")),
    ],
)
def test_a_key_that_goes_with_its_source_is_accepted(source, keys):
    CameraConfig("door", source, **keys)


@pytest.mark.parametrize(
    "source",
    [
        "rtsp://admin:pa55w0rd@camera.lan/stream",
        "http://admin:pa55w0rd@camera.lan:8080/x",
        "rtsp://pa55w0rd@camera.lan/",
        "rtsp://admin:pa55/w0rd@camera.lan/x",
        "rtsp://admin:pa55#w0rd@camera.lan/x",
        "rtsp://admin:@pa55w0rd@camera.lan/x",
        "http://camera.lan/snap.cgi?user=admin&pwd=pa55w0rd",
        "http://camera.lan/snap.cgi?Password=pa55w0rd",
        "mms://admin:pa55w0rd@camera.lan/x",
    ],
)
def test_a_password_in_an_address_is_refused_with_what_to_write_and_without_the_password(tmp_path, source):
    path = tmp_path / "board.toml"
    path.write_text(f'[board]\nid = "b1"\nbundle = "x"\n[[cameras]]\nname = "door"\nsource = "{source}"\n')
    with pytest.raises(ConfigError, match=r"camera door: the address in source contains .*password_file") as raised:
        load_toml(path, RuntimeConfig)
    assert not re.search("pa55|w0rd|admin", str(raised.value))


@pytest.mark.parametrize(
    "source",
    [
        "admin:pa55w0rd@camera.lan/stream",
        "//admin:pa55w0rd@camera.lan/stream",
        "rtsp:/admin:pa55/w0rd@camera.lan/clip.mp4",
        "watch:ftp://admin:pa55w0rd@nas.lan/cam",
        "camera.lan/x?user=admin&password=pa55w0rd",
        "/snap.cgi?pwd=pa55w0rd",
    ],
)
def test_a_password_in_an_address_without_a_scheme_is_refused_and_not_shown(source):
    with pytest.raises(ConfigError, match=r"camera door: source contains a password.*password_file") as raised:
        CameraConfig("door", source)
    assert not re.search("pa55|w0rd|admin", str(raised.value))


@pytest.mark.parametrize(
    "source",
    [
        '["admin:pa55w0rd@camera.lan/x", "photos"]',
        '"""admin:"pa55"w0rd@camera.lan/' + 2048 * "x" + '"""',
        '["camera.lan/x?user=me&Password=pa55w0rd&pwd=pa55w0rd"]',
        '["rtsp://admin:pa55w0rd@camera.lan/x"]',
    ],
)
def test_a_source_of_the_wrong_type_or_size_is_shown_without_its_password(tmp_path, source):
    path = tmp_path / "board.toml"
    path.write_text(f'[board]\nid = "b1"\nbundle = "x"\n[[cameras]]\nname = "door"\nsource = {source}\n')
    with pytest.raises(ConfigError, match=r"cameras\[0\].source = .*camera.lan/x") as raised:
        load_toml(path, RuntimeConfig)
    assert not re.search("pa55|w0rd|admin", str(raised.value))


def test_two_cameras_with_one_topic_are_refused(tmp_path):
    path = tmp_path / "board.toml"
    cameras = "".join(f'[[cameras]]\nname = "{name}"\nsource = "mqtt"\ntopic = "a/b"\n' for name in "xy")
    path.write_text(f'[board]\nid = "b1"\nbundle = "x"\n{cameras}')
    with pytest.raises(ConfigError, match="two cameras have the same topic"):
        load_toml(path, RuntimeConfig)


@pytest.mark.parametrize(
    ("content", "why"), [(None, "cannot be read"), (b"", "first line is empty"), (b"\xff", "not UTF-8")]
)
def test_a_password_file_that_cannot_be_used_is_found_at_the_start(tmp_path: Path, content: bytes | None, why: str):
    if content is not None:
        (tmp_path / "password").write_bytes(content)
    with pytest.raises(ConfigError, match=f"camera door password_file = .*{why}"):
        Cameras([CameraConfig("door", "rtsp://h/x", username="v", password_file=str(tmp_path / "password"))])


def test_a_login_is_put_into_an_address_for_libraries_and_never_shown(tmp_path):
    (tmp_path / "password").write_text("p@ss/ w:rd\n")
    camera = CameraConfig("door", "rtsp://h:554/x", username="a:b", password_file=str(tmp_path / "password"))
    login = login_of(camera)
    assert login == Login("a:b", "p@ss/ w:rd")
    assert "p@ss" not in repr(login)
    assert with_login(camera.source, login) == "rtsp://a%3Ab:p%40ss%2F%20w%3Ard@h:554/x"
    assert with_login("http://h/?u={username}&p={password}", login) == "http://h/?u=a%3Ab&p=p%40ss%2F%20w%3Ard"
    assert login_of(CameraConfig("door", "rtsp://h/x")) is None
