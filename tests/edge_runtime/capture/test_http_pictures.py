"""Snapshots and MJPEG over HTTP, from a web server that answers well, badly, endlessly or slowly."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import pytest

from edge_runtime.capture import Cameras, Counters, Frame, http_pictures, live
from edge_runtime.capture.frame import CameraError
from edge_runtime.capture.live import live_frames
from edge_runtime.config import CameraConfig
from tests.edge_runtime.capture.helpers import grey, in_background, jpeg, shade_of
from tests.http_camera import BASIC, DIGEST, PASSWORD, USER, Answer, HttpCamera, Request, picture
from tests.listener import PATIENCE_S, until


def shades(*values: int) -> Callable[[Request], Answer]:
    """Snapshots of these shades, one after the other, then the last one for ever."""
    left = itertools.chain(values, itertools.repeat(values[-1]))
    return lambda _: picture(jpeg(next(left)))


def frames_of(camera: HttpCamera, stop: threading.Event, counters: Counters, **settings: Any) -> Iterator[Frame]:
    config = CameraConfig("door", settings.pop("source", camera.url), interval_s=0, **settings)
    return live_frames(config, stop, counters)


@pytest.fixture
def password_file(tmp_path: Path) -> str:
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    return str(tmp_path / "password")


# ---- snapshots ----


def test_snapshots_are_asked_for_again_and_again_and_the_camera_stays_live(stop, caplog):
    changes = []
    with HttpCamera(shades(10, 50, 100, 150, 200)) as camera:
        cameras = Cameras([CameraConfig("door", camera.url, 0)], lambda: changes.append(1))
        taken = in_background(cameras.frames(stop))
        assert [shade_of(taken.get(timeout=PATIENCE_S)) for _ in range(5)] == [10, 50, 100, 150, 200]
        assert cameras.states()["door"].state == "live"
        assert len(changes) == 1
        stop.set()


def test_a_picture_that_has_not_changed_is_not_given_again_and_is_no_stall(stop):
    counters = Counters()
    with HttpCamera(shades(10, 10, 10, 10, 10, 200)) as camera:
        frames = frames_of(camera, stop, counters, stall_s=1)
        assert [shade_of(next(frames)) for _ in range(2)] == [10, 200]
        assert counters.skipped >= 4
        stop.set()


def test_a_picture_may_stay_unchanged_for_longer_than_a_stall(stop, monkeypatch):
    monkeypatch.setattr(http_pictures, "MIN_POLL_S", 1.2)
    monkeypatch.setattr("edge_runtime.capture.live.GRACE_S", 0.0)
    with HttpCamera(shades(10, 10, 200)) as camera:
        frames = frames_of(camera, stop, Counters(), stall_s=1)
        assert [shade_of(next(frames)) for _ in range(2)] == [10, 200]
        stop.set()


def test_a_camera_that_knows_an_etag_is_not_asked_for_the_same_picture_again(stop):
    def answer(request: Request) -> Answer:
        if request.headers.get("If-None-Match") == '"1"':
            return 304, {}, b""
        return picture(jpeg(10), ETag='"1"')

    counters = Counters()
    with HttpCamera(answer) as camera:
        frames = frames_of(camera, stop, counters)
        assert shade_of(next(frames)) == 10
        in_background(frames)
        until(lambda: counters.skipped >= 3)
        stop.set()


def test_a_snapshot_is_asked_for_only_when_one_is_due(stop):
    with HttpCamera(shades(10, 20)) as camera:
        frames = live_frames(CameraConfig("door", camera.url, interval_s=3600), stop, Counters())
        next(frames)
        in_background(frames)
        assert not stop.wait(3 * http_pictures.MIN_POLL_S)
        assert camera.asked.qsize() == 1
        stop.set()


def test_the_time_of_a_snapshot_is_no_later_than_the_beginning_of_its_answer(stop):
    rest_sent = []

    def answer(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "image/jpeg")
        request.end_headers()
        data = jpeg(10)
        request.wfile.write(data[:100])
        request.camera.closed.wait(1.5)  # long enough for a busy reader to see that the answer has begun
        rest_sent.append(time.monotonic())
        request.wfile.write(data[100:])

    with HttpCamera(answer) as camera:
        assert next(frames_of(camera, stop, Counters())).captured < rest_sent[0]
        stop.set()


def test_a_camera_that_answers_faster_than_before_loses_no_picture(stop):
    """Its next picture would else come before it is due."""
    delays, number, counters = iter([0.4, 0.2]), itertools.count(1), Counters()

    def answer(request: Request) -> Answer:
        request.camera.closed.wait(next(delays, 0))
        return picture(jpeg(10 * next(number)))

    with HttpCamera(answer) as camera:
        frames = live_frames(CameraConfig("door", camera.url, interval_s=0.5), stop, counters)
        assert [shade_of(next(frames)) for _ in range(4)] == [10, 20, 30, 40]
        stop.set()
    assert counters.skipped == 0


def test_an_address_that_does_not_name_its_content_is_a_snapshot_if_the_user_says_so(stop):
    with HttpCamera(lambda _: (200, {}, jpeg(10))) as camera:
        assert shade_of(next(frames_of(camera, stop, Counters(), snapshot=True))) == 10
        stop.set()


WRONG_TYPES = [
    {},
    *({"Content-Type": kind} for kind in ("text/plain", "application/octet-stream", "jpeg", "text/html")),
]


@pytest.mark.parametrize("headers", WRONG_TYPES)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_a_snapshot_address_may_send_no_content_type_or_a_wrong_one_with_every_picture(stop, headers, suffix):
    number = itertools.count()

    def answer(_: Request) -> Answer:
        shade = 10 + next(number) * 40 % 240
        return 200, headers, cv2.imencode(suffix, grey(shade), [cv2.IMWRITE_WEBP_QUALITY, 90])[1].tobytes()

    with HttpCamera(answer) as camera:
        frames = frames_of(camera, stop, Counters(), snapshot=True)
        assert [shade_of(next(frames)) for _ in range(3)] == [10, 50, 90]
        stop.set()


def test_a_camera_may_send_its_content_type_with_its_first_picture_only(stop):
    answers = itertools.chain([picture(jpeg(10))], itertools.repeat((200, {}, jpeg(50))))
    with HttpCamera(lambda _: next(answers)) as camera:
        frames = frames_of(camera, stop, Counters())
        assert [shade_of(next(frames)) for _ in range(2)] == [10, 50]
        stop.set()


def test_a_damaged_picture_is_counted_and_the_next_one_is_given(stop):
    answers = iter([picture(b"\xff\xd8\xff no picture"), picture(jpeg(30))])
    counters = Counters()
    with HttpCamera(lambda _: next(answers)) as camera:
        assert shade_of(next(frames_of(camera, stop, counters))) == 30
        stop.set()
    assert counters.unreadable == 1


def test_a_camera_that_sends_only_damaged_pictures_has_failed(stop):
    number = itertools.count()
    with (
        HttpCamera(lambda _: picture(b"\xff\xd8\xff no picture %d" % next(number))) as camera,
        pytest.raises(CameraError, match="sends only pictures that cannot be decoded"),
    ):
        next(frames_of(camera, stop, Counters(), stall_s=1))


# ---- logins and redirects ----


def locked(challenges: list[str], given: Answer) -> Callable[[Request], Answer | None]:
    def answer(request: Request) -> Answer | None:
        if request.is_authorized:
            return given
        request.send_response(401)
        for challenge in challenges:
            request.send_header("WWW-Authenticate", challenge)
        request.end_headers()
        return None

    return answer


@pytest.mark.parametrize(
    ("challenges", "scheme"), [([BASIC], "Basic"), ([DIGEST], "Digest"), ([BASIC, DIGEST], "Digest")]
)
def test_a_login_is_used_in_the_best_way_that_the_camera_offers(stop, password_file, challenges, scheme):
    login = {"username": USER, "password_file": password_file}
    with HttpCamera(locked(challenges, picture(jpeg(70)))) as camera:
        assert shade_of(next(frames_of(camera, stop, Counters(), **login))) == 70
        assert camera.asked.get(timeout=PATIENCE_S).headers.get("Authorization") is None
        assert camera.asked.get(timeout=PATIENCE_S).headers["Authorization"].startswith(scheme)
        stop.set()


@pytest.mark.parametrize("challenges", [[BASIC], [DIGEST], ['Digest realm="x", nonce="1", algorithm=SHA-512'], [""]])
def test_a_refused_login_says_where_to_look_and_shows_no_password(stop, tmp_path, no_pause, caplog, challenges):
    (tmp_path / "password").write_text("wr0ng")
    login = {"username": USER, "password_file": str(tmp_path / "password")}
    with HttpCamera(locked(challenges, picture(jpeg(70)))) as camera:
        cameras = Cameras([CameraConfig("door", camera.url, 0, **login)])
        in_background(cameras.frames(stop))
        until(lambda: cameras.states()["door"].state == "lost")
        why = cameras.states()["door"].why
        stop.set()
    assert "check username and password_file" in why or "login that is not supported" in why
    assert "wr0ng" not in caplog.text
    assert USER not in caplog.text


def test_a_password_file_is_read_again_at_each_try(stop, tmp_path, no_pause):
    path = tmp_path / "password"
    path.write_text("old")
    with HttpCamera(locked([DIGEST], picture(jpeg(70)))) as camera:
        cameras = Cameras([CameraConfig("door", camera.url, 0, username=USER, password_file=str(path))])
        taken = in_background(cameras.frames(stop))
        until(lambda: cameras.states()["door"].state == "lost")
        path.write_text(PASSWORD)
        assert shade_of(taken.get(timeout=PATIENCE_S)) == 70
        stop.set()


def test_a_login_in_the_query_is_filled_in(stop, password_file):
    with HttpCamera(shades(10)) as camera:
        source = f"http://127.0.0.1:{camera.port}/snap?user={{username}}&pwd={{password}}"
        next(frames_of(camera, stop, Counters(), source=source, username=USER, password_file=password_file))
        assert camera.asked.get(timeout=PATIENCE_S).path == f"/snap?user={USER}&pwd=s3cret%2F%40%3A"
        stop.set()


def test_an_address_that_cannot_be_sent_is_not_shown_with_its_password(stop, password_file):
    login = {"username": USER, "password_file": password_file}
    with HttpCamera(shades(10)) as camera:
        source = f"http://127.0.0.1:{camera.port}/my snap?pwd={{password}}"
        with pytest.raises(CameraError, match="contains a space") as raised:
            next(frames_of(camera, stop, Counters(), source=source, **login))
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("etag", ['"1"\r\n folded', '"\xe9"', ""])
def test_an_etag_that_cannot_be_sent_back_is_ignored(stop, etag):
    number = itertools.count(1)
    with HttpCamera(lambda _: picture(jpeg(10 * next(number)), ETag=etag)) as camera:
        frames = frames_of(camera, stop, Counters())
        assert [shade_of(next(frames)) for _ in range(3)] == [10, 20, 30]
        stop.set()


def test_a_redirect_is_followed_and_the_password_stays_at_its_server(stop, password_file):
    login = {"username": USER, "password_file": password_file}
    with (
        HttpCamera(locked([BASIC], picture(jpeg(70)))) as other,
        HttpCamera(lambda _: (302, {"Location": other.url}, b"")) as camera,
    ):
        with pytest.raises(CameraError, match="answers 401"):
            next(frames_of(camera, stop, Counters(), **login))
        assert other.asked.get(timeout=PATIENCE_S).headers.get("Authorization") is None
    with HttpCamera(
        lambda request: (
            (302, {"Location": "/new"}, b"") if request.path != "/new" else locked([BASIC], picture(jpeg(70)))(request)
        )
    ) as camera:
        assert shade_of(next(frames_of(camera, stop, Counters(), **login))) == 70
        stop.set()


@pytest.mark.parametrize(
    ("location", "why"), [("/again", "redirects more than 3 times"), ("file:///etc/passwd", "not HTTP")]
)
def test_redirects_have_a_bound(stop, location, why):
    with HttpCamera(lambda _: (301, {"Location": location}, b"")) as camera, pytest.raises(CameraError, match=why):
        next(frames_of(camera, stop, Counters()))


# ---- answers that are no pictures ----


def endless(request: Request) -> None:
    request.send_response(200)
    request.send_header("Content-Type", "image/jpeg")
    request.end_headers()
    with suppress(OSError):
        while not request.camera.closed.is_set():
            request.wfile.write(bytes(1 << 16))


def slow(request: Request) -> None:
    request.send_response(200)
    request.send_header("Content-Type", "image/jpeg")
    request.end_headers()
    with suppress(OSError):
        while not request.camera.closed.wait(0.05):
            request.wfile.write(b"x")


def slow_headers(request: Request) -> None:
    with suppress(OSError):
        request.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        while not request.camera.closed.wait(0.05):
            request.wfile.write(b"x")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda _: (404, {}, b""), "the camera answers 404 Not Found: check the path"),
        (lambda _: (401, {}, b""), "the camera answers 401"),
        (lambda _: (503, {}, b""), "the camera answers 503"),
        (lambda _: (302, {}, b""), "the camera answers 302"),
        (lambda _: (200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>login"), r"a page \(text/html\)"),
        (lambda _: picture(b""), "hangs up in the middle of a picture"),
        (lambda _: (200, {"Content-Type": "image/jpeg", "Content-Length": "5000"}, jpeg(1)), "hangs up in the middle"),
        (lambda request: request.wfile.write(b"\x00 no HTTP\r\n") and None, "its answer is not HTTP: are protocol and"),
        (lambda _: None, "it closed the connection: are protocol and port of the address right"),
        (lambda request: request.wfile.write(b"HTTP/1.0 200 OK\r\n" + b"X: y\r\n" * 1000) and None, "cannot be opened"),
        (endless, "sends a picture of more than"),
        (slow, "does not complete its picture within 1 s"),
        (slow_headers, "is open, but shows nothing"),
    ],
)
def test_an_answer_that_is_no_picture_is_an_error_that_says_so(stop, monkeypatch, answer, why):
    monkeypatch.setattr(http_pictures, "MAX_PICTURE_BYTES", 1_000_000)
    monkeypatch.setattr(http_pictures, "ANSWER_S", 1.0)
    if answer is slow_headers:
        monkeypatch.setattr(live, "FIRST_FRAME_S", 2.0)
    with HttpCamera(answer) as camera, pytest.raises(CameraError, match=why):
        next(frames_of(camera, stop, Counters(), stall_s=1))


PAGE = b"\n<!DOCTYPE html>\n<html><title>Login"
XHTML = b'<?xml version="1.0" encoding="UTF-8"?>\r\n<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Strict//EN" "x">'


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize(
    ("kind", "page"),
    [
        ("text/html; charset=utf-8", PAGE),
        ("application/xhtml+xml", XHTML),
        ("", PAGE),
        ("", XHTML),
        ("", b"\xef\xbb\xbf<HTML lang=en>"),
        ("application/octet-stream", b" " * 100 + b"<html>"),
        ("image/jpeg", PAGE),
    ],
)
def test_a_page_is_reported_as_a_page_whatever_its_type_is(stop, snapshot, kind, page):
    headers = {"Content-Type": kind} if kind else {}
    shown = rf" \({kind.partition(';')[0]}\)".replace("+", r"\+") if kind else ""
    with (
        HttpCamera(lambda _: (200, headers, page)) as camera,
        pytest.raises(CameraError, match=f"answers with a page{shown}, not with a picture: does it want a login"),
    ):
        next(frames_of(camera, stop, Counters(), snapshot=snapshot))


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_text_that_is_no_page_is_reported_with_its_type(stop, snapshot):
    with (
        HttpCamera(lambda _: (200, {"Content-Type": "application/json"}, b'{"error": "busy"}')) as camera,
        pytest.raises(CameraError, match="answers with application/json, not with a picture"),
    ):
        next(frames_of(camera, stop, Counters(), snapshot=snapshot))


@pytest.mark.parametrize(("snapshot", "headers"), [(False, {"Content-Type": "text/html"}), (True, {}), (False, {})])
def test_a_camera_that_becomes_a_login_page_is_stalled_and_then_lost_with_the_reason(
    stop, no_pause, caplog, snapshot, headers
):
    answers = itertools.chain([picture(jpeg(10))], itertools.repeat((200, headers, PAGE)))
    with HttpCamera(lambda _: next(answers)) as camera:
        cameras = Cameras([CameraConfig("door", camera.url, 0, snapshot=snapshot)])
        in_background(cameras.frames(stop))
        until(lambda: cameras.states()["door"].state == "lost")
        assert "answers with a page" in cameras.states()["door"].why
        stop.set()
    assert "camera stalled camera=door reason=the camera answers with a page" in caplog.text


# ---- MJPEG ----


def test_the_pictures_of_a_stream_are_decoded_only_when_they_are_due(stop, network_camera, monkeypatch):
    decoded = []
    monkeypatch.setattr("edge_runtime.capture.live.decode_picture", lambda data: decoded.append(data) or 0)
    counters = Counters()
    taken = in_background(live_frames(CameraConfig("door", network_camera.url, 3600), stop, counters))
    connection = network_camera.connection()
    connection.show(10)
    taken.get(timeout=PATIENCE_S)
    connection.show(*range(20, 120, 10))
    until(lambda: counters.skipped == 10)
    assert decoded == [jpeg(10)]


def test_a_damaged_picture_of_a_stream_costs_no_interval(stop, network_camera):
    counters = Counters()
    taken = in_background(live_frames(CameraConfig("door", network_camera.url, 3600), stop, counters))
    connection = network_camera.connection()
    connection.pictures.put(b"\xff\xd8\xff\xe0\0\4xx\xff\xd9")  # markers without a picture between them
    until(lambda: counters.unreadable == 1)
    connection.show(30)
    assert shade_of(taken.get(timeout=PATIENCE_S)) == 30


def test_a_stream_that_is_no_mjpeg_is_read_by_opencv(stop, tmp_path):
    path = tmp_path / "v.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 64))
    for _ in range(10):
        writer.write(grey(100, 64))
    writer.release()
    with HttpCamera(lambda _: (200, {"Content-Type": "video/x-msvideo"}, path.read_bytes())) as camera:
        assert shade_of(next(frames_of(camera, stop, Counters()))) == 100
        stop.set()


def test_bytes_that_never_become_a_picture_are_a_stall(stop):
    def trickle(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "multipart/x-mixed-replace; boundary=x")
        request.end_headers()
        with suppress(OSError):
            request.wfile.write(jpeg(10))
            while not request.camera.closed.wait(0.05):
                request.wfile.write(b"x")

    with HttpCamera(trickle) as camera:
        frames = live_frames(CameraConfig("door", camera.url, 3600, stall_s=1), stop, Counters())
        next(frames)
        with pytest.raises(CameraError, match="no new frame for 1 s"):
            next(frames)


def test_a_camera_that_is_abandoned_hangs_up_at_once(stop, network_camera):
    taken = in_background(live_frames(CameraConfig("door", network_camera.url, 0, stall_s=600), stop, Counters()))
    connection = network_camera.connection()
    connection.show(10)
    taken.get(timeout=PATIENCE_S)
    stop.set()
    until(lambda: not [t for t in threading.enumerate() if t.name == "capture-door"])
