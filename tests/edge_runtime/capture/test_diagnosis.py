"""Why a source cannot be opened, asked of real files and servers."""

import hashlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edge_runtime.capture import Cameras, diagnosis
from edge_runtime.capture.diagnosis import why_not_opened
from edge_runtime.config import CameraConfig
from tests.edge_runtime.capture.helpers import in_background
from tests.listener import until
from tests.rtsp_camera import RtspCamera

USER, PASSWORD, REALM, NONCE = "viewer", "s3cret", "camera", "abc"


@contextmanager
def http_camera(status: int = 200, challenge: str = "") -> Iterator[str]:
    """The address of a server that answers with this status; with a challenge, only to the right user."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if challenge and not self._is_authorized():
                self.send_response(401)
                self.send_header("WWW-Authenticate", challenge)
            else:
                self.send_response(status)
            self.end_headers()

        def _is_authorized(self) -> bool:
            given = self.headers.get("Authorization", "")
            if given.startswith("Basic"):
                return given == "Basic dmlld2VyOnMzY3JldA=="
            first, second = (
                hashlib.md5(text.encode()).hexdigest() for text in (f"{USER}:{REALM}:{PASSWORD}", f"GET:{self.path}")
            )
            expected = hashlib.md5(f"{first}:{NONCE}:{second}".encode()).hexdigest()
            return f'response="{expected}"' in given

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/video?channel=1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def with_user(url: str, password: str) -> str:
    return url.replace("://", f"://{USER}:{password}@")


def test_a_path_that_does_not_exist(tmp_path):
    assert why_not_opened(str(tmp_path / "clip.mp4")).startswith("it does not exist")
    assert why_not_opened("/dev/no-such-camera").startswith("it does not exist")


def test_a_device_without_the_right_to_read_it(tmp_path):
    """Asked in a process of its own, since root may read everything."""
    device = tmp_path / "video0"
    device.touch(mode=0o000)
    script = (
        "import os, sys; from edge_runtime.capture.diagnosis import why_not_opened\n"
        f"if os.getuid() == 0: os.setgroups([]); os.setuid(65534)\nprint(why_not_opened({str(device)!r}))"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == tmp_path.owner() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
        if folder.name.startswith("pytest-of-"):
            break
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("permission denied")


def test_a_file_that_is_no_video(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    assert why_not_opened(str(tmp_path / "clip.mp4")) == "the file is no video that OpenCV can decode"


@pytest.mark.parametrize("scheme", ["http", "rtsp", "tcp", "rtmp"])
def test_an_address_where_nothing_listens(scheme):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"{scheme}://127.0.0.1:{bound.getsockname()[1]}/video"
        assert why_not_opened(address).startswith("connection refused")


def test_a_name_that_is_unknown():
    assert "name" in why_not_opened("rtsp://camera.invalid/video").lower()


def test_a_server_that_says_nothing(monkeypatch):
    monkeypatch.setattr(diagnosis, "DIAGNOSIS_S", 0.1)
    with RtspCamera(hangs=True) as camera:
        assert why_not_opened(camera.url).startswith("no answer within")


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "username and password_file"), (404, "check the path"), (503, ""), (200, "no video")]
)
def test_what_an_http_camera_answers(status, hint):
    with http_camera(status) as url:
        why = why_not_opened(url)
    assert why.startswith(f"the camera answers {status} ")
    assert hint in why


@pytest.mark.parametrize("answer", ["401 Unauthorized", "404 Not Found", "454 Session Not Found"])
def test_what_an_rtsp_camera_answers(answer):
    with RtspCamera(answer) as camera:
        assert why_not_opened(camera.url).startswith(f"the camera answers {answer}: check ")


@pytest.mark.parametrize("challenge", [f'Basic realm="{REALM}"', f'Digest realm="{REALM}", nonce="{NONCE}"'])
@pytest.mark.parametrize(("password", "code"), [(PASSWORD, 404), ("wr%6Fng", 401)])
def test_a_password_in_the_address_is_used_and_never_repeated(challenge, password, code):
    with http_camera(404, challenge) as url:
        why = why_not_opened(with_user(url, password))
    assert why.startswith(f"the camera answers {code} ")
    assert not {USER, password} & set(re.findall(r"\w+", why))


@pytest.mark.parametrize("challenge", ["Digest realm=, nonce=x", "Digest realm=x"])
def test_a_challenge_that_is_incomplete_is_the_reason(challenge):
    with http_camera(404, challenge) as url:
        assert why_not_opened(with_user(url, PASSWORD)).endswith("its challenge is incomplete")


@pytest.mark.parametrize(
    "answer", [b"", b"\r\n", b"220 mail.example ESMTP\r\n", b"HTTP/1.0\r\n", b"HTTP/1.0 x y\r\n", b"H" * 10**6]
)
def test_an_answer_that_is_not_http(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, suppress(ConnectionError):  # nobody reads a megabyte to its end
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert "its answer is not HTTP" in why_not_opened(f"http://127.0.0.1:{server.getsockname()[1]}/")
        thread.join()


@pytest.mark.parametrize("source", ["rtsp://", "rtsp://[::1", "http://host:99999/", "http://h:x/", "srt://1.2.3.4:5"])
def test_a_malformed_address_gives_a_reason(source):
    assert why_not_opened(source)


def test_a_camera_that_cannot_be_opened_logs_one_line_with_the_reason_and_the_libraries_log_nothing(tmp_path):
    """In a process of its own, whose standard error has nothing but our lines."""
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    script = """
import logging, sys, threading
from edge_runtime.capture import Cameras
from edge_runtime.config import CameraConfig
logging.basicConfig(format="%(message)s")
stop = threading.Event()
def changed():
    if all(state.state == "lost" for state in cameras.states().values()):
        stop.set()
configs = [CameraConfig(f"c{number}", source) for number, source in enumerate(sys.argv[1:])]
cameras = Cameras(configs, changed)
list(cameras.frames(stop))
"""
    with RtspCamera("404 Not Found") as rtsp, http_camera(401) as http:
        sources = [rtsp.url, http, str(tmp_path / "clip.mp4"), "/dev/no-such-camera", "rtsp://127.0.0.1:1/"]
        done = subprocess.run([sys.executable, "-c", script, *sources], capture_output=True, text=True, check=True)
    lines = sorted(done.stderr.splitlines())
    for number, reason in enumerate(["answers 404", "answers 401", "is no video", "not exist", "connection refused"]):
        assert re.match(f"camera lost camera=c{number} reason=.*cannot be opened: .*{reason}", lines[number])
    assert len(lines) == len(sources)


def test_control_characters_in_file_names_do_not_reach_the_log(tmp_path, stop, no_pause, caplog):
    name = "evil\x1b[2J\n.mp4"
    (tmp_path / name).write_bytes(b"no video")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/\x1b[2J.jpg").write_bytes(b"no picture")
    cameras = Cameras(
        [CameraConfig("video", str(tmp_path / name)), CameraConfig("photos", str(tmp_path / "photos"), 0)]
    )
    in_background(cameras.frames(stop))
    until(lambda: cameras["video"].counters.reopened > 0 and cameras["photos"].counters.unreadable > 0)
    assert "\x1b" not in caplog.text
    assert "camera=video reason=" in caplog.text
    assert "evil\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}.mp4" in cameras.states()["video"].why
