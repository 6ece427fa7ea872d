"""The live page's HTTP server: its answers are as docs/ui-openapi.json says, and it holds against strangers."""

import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from edge_runtime.mqtt import Message, MqttConfig, State
from firmware_tools.ui import live as live_module
from firmware_tools.ui import web as web_module
from firmware_tools.ui.history import FOUND, History
from firmware_tools.ui.live import MAX_BROWSERS, MAX_ROWS, Live
from firmware_tools.ui.meaning import Encode, Meaning
from firmware_tools.ui.openapi import openapi
from firmware_tools.ui.site import Answer, Site
from firmware_tools.ui.web import MAX_CONNECTIONS, MAX_FORM, PAGE_FILES, WebServer
from tests.firmware_tools.ui.test_meaning import by_topic, no_model
from tests.firmware_tools.ui.test_site import JPEG, event, server_status
from tests.listener import PATIENCE_S, until

API = json.loads((Path(__file__).parents[3] / "docs" / "ui-openapi.json").read_text())
TOKEN = "a token that is long enough"
START = Path(web_module.__file__).parent / "page"


class Page(WebServer):
    """A whole page without a broker: tests hand it the messages."""

    def say(self, topic: str, payload: bytes) -> None:
        self.live.message_arrived(Message(f"aiflow/home/{topic}", payload, 1, False, None, lambda: None))

    def ask(
        self, path: str, method: str = "GET", body: str | None = None, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        with closing(http.client.HTTPConnection(self.host, self.server_port, timeout=PATIENCE_S)) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def updates(self, **headers: str) -> "Updates":
        return Updates(self.server_port, headers)


class Updates:
    """A browser that reads updates; `with` ends its connection."""

    def __init__(self, port: int, headers: dict[str, str]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        self._connection.request("GET", "/api/updates", headers=headers)
        self.response = self._connection.getresponse()

    def __enter__(self) -> "Updates":
        return self

    def __exit__(self, *_: object) -> None:
        self.response.close()
        self._connection.close()

    def next(self) -> dict[str, Any]:
        line = self.response.readline()
        assert line.startswith(b"data: "), line
        assert self.response.readline() == b"\n"
        update: dict[str, Any] = json.loads(line[6:])
        assert_is(update, {"$ref": "#/components/schemas/Update"})
        return update


def assert_is(value: object, schema: dict[str, Any]) -> None:
    Draft202012Validator(schema | {"components": API["components"]}).validate(value)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Page]]:
    with ExitStack() as running:

        def start(token: str | None = None, load: Callable[[], Encode] = no_model, address: str = "127.0.0.1") -> Page:
            history = running.enter_context(History(None))
            meaning = running.enter_context(Meaning(history, load))
            live = Live(Site("home"), history, meaning, MqttConfig())
            page = running.enter_context(Page((address, 0), live, history, meaning, token))
            thread = threading.Thread(target=page.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            running.callback(thread.join)
            running.callback(page.shutdown)
            running.callback(live.close)
            return page

        yield start


@pytest.fixture
def page(start: Callable[..., Page]) -> Page:
    return start()


def test_the_description_is_that_of_the_code():
    assert openapi() == (Path(__file__).parents[3] / "docs" / "ui-openapi.json").read_bytes(), "run `make schema`"


def test_the_page_s_files_are_served_and_load_nothing_from_elsewhere(page: Page):
    for path, (name, kind) in PAGE_FILES.items():
        status, headers, body = page.ask(path)
        assert (status, body) == (200, (START / name).read_bytes())
        assert headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert not re.search(rb"https?://(?!www.w3.org/2000/svg)|innerHTML|insertAdjacentHTML|<style|onclick=\"", body)


def test_the_first_update_has_everything_and_the_next_only_what_has_changed(page: Page):
    page.say("porch/up/event", event(text="a dog"))
    page.say("server/attic/status", server_status())
    with page.updates() as updates:
        first = updates.next()
        assert first["is_first"]
        assert [board["board"] for board in first["boards"]] == ["porch"]
        assert [server["server"] for server in first["servers"]] == ["attic"]
        page.say("garage/up/event", event(text="a cat"))
        second = updates.next()
        assert not second["is_first"]
        assert [board["board"] for board in second["boards"]] == ["garage"]
        assert second["servers"] == []
        page.live.connection_changed(State.BACKOFF, "Not authorized")
        assert updates.next()["link"]["broker"] == "broker 127.0.0.1:1883 backoff: Not authorized"
        page.say("garage/up/status", b"")
        page.say("server/attic/status", b"")
        last = updates.next()
        assert (last["gone"], last["gone_servers"]) == (["garage"], ["attic"])


def test_a_thousand_boards_come_in_several_updates(page: Page):
    for number in range(3 * MAX_ROWS):
        page.say(f"b{number}/up/event", event(text="a dog"))
    with page.updates() as updates:
        came = [len(updates.next()["boards"]) for _ in range(3)]
    assert came == [MAX_ROWS] * 3


def test_news_for_a_browser_that_is_slow_replace_each_other(page: Page):
    with page.live.updates() as next_update:
        for number in range(300):
            page.say("porch/up/event", event(frame=f"{number:x}", text=f"dog {number}"))
        update = json.loads(next_update() or b"")
        assert [board["cameras"][0]["text"] for board in update["boards"]] == [[["dog 299", False]]]


def test_a_browser_that_is_told_of_too_many_boards_that_come_and_go_connects_again(page: Page, monkeypatch):
    monkeypatch.setattr(live_module, "MAX_CHANGES", 10)
    with page.live.updates() as next_update:
        assert next_update()
        for number in range(11):
            for state in (b'{"state": "online"}', b""):
                page.say(f"b{number}/up/status", state)
        assert next_update() is None
        assert not page.live._browsers


def test_a_browser_that_never_reads_is_disconnected(page: Page, monkeypatch: pytest.MonkeyPatch):
    assert web_module._Handler.timeout == web_module.TIMEOUT_S
    monkeypatch.setattr(web_module._Handler, "timeout", 0.2)
    monkeypatch.setattr(live_module, "PACE_S", 0.0)
    with socket.create_connection(("127.0.0.1", page.server_port)) as browser:
        browser.sendall(f"GET /api/updates HTTP/1.0\r\nHost: 127.0.0.1:{page.server_port}\r\n\r\n".encode())
        until(lambda: len(page.live._browsers) == 1)
        number = 0

        def is_gone() -> bool:
            nonlocal number
            for _ in range(200):
                number += 1
                page.say(f"b{number % 100}/up/event", event(frame=f"{number:x}", text="a dog " * 160))
            return not page.live._browsers

        until(is_gone)


def test_browsers_are_bounded_and_the_next_one_is_told(page: Page):
    with ExitStack() as stack:
        browsers = [stack.enter_context(page.updates()) for _ in range(MAX_BROWSERS)]
        assert all(browser.next()["is_first"] for browser in browsers)
        status, _, body = page.ask("/api/updates")
        assert status == 503
        assert f"{MAX_BROWSERS} browsers are connected" in json.loads(body)["error"]


def test_connections_are_bounded(page: Page):
    with ExitStack() as stack:
        address = ("127.0.0.1", page.server_port)
        idle = [stack.enter_context(socket.create_connection(address)) for _ in range(MAX_CONNECTIONS)]
        until(lambda: page._free._value == 0)
        late = stack.enter_context(socket.create_connection(address))
        late.settimeout(PATIENCE_S)
        assert late.recv(1) == b""  # closed at once
        idle[0].close()
        until(lambda: page._free._value > 0)
        assert page.ask("/page.css")[0] == 200


def test_texts_are_found_by_words_label_and_board(page: Page):
    answers = [Answer(1.0, "porch", "front", f"{n}", f"dog {n}", "beagle") for n in range(FOUND + 1)]
    page.history.add(answers, 1.0)
    status, _, body = page.ask("/api/search?q=dog&label=beag&board=porch")
    found = json.loads(body)
    assert_is(found, {"$ref": "#/components/schemas/Answers"})
    assert (status, len(found["answers"]), found["has_more"]) == (200, FOUND, True)
    rest = json.loads(page.ask(f"/api/search?q=dog&before={found['answers'][-1]['id']}")[2])
    assert ([answer["text"] for answer in rest["answers"]], rest["has_more"]) == (["dog 0"], False)
    assert json.loads(page.ask("/api/search?q=dog&board=garage")[2])["answers"] == []


def test_texts_are_found_by_meaning_if_a_model_is_there_and_the_page_says_if_not(start: Callable[..., Page]):
    page = start(load=lambda: by_topic)
    page.history.add(
        [Answer(1.0, "porch", "front", "1", "a puppy", ""), Answer(1.0, "porch", "front", "2", "a car", "")], 1.0
    )
    until(lambda: len(json.loads(page.ask("/api/search?q=dog&by=meaning")[2]).get("answers", [])) == 1)
    found = json.loads(page.ask("/api/search?q=dog&by=meaning&before=1")[2])
    assert_is(found, {"$ref": "#/components/schemas/Answers"})
    assert ([answer["text"] for answer in found["answers"]], found["has_more"]) == (["a puppy"], False)
    assert json.loads(page.ask("/api/search?q=dog")[2])["answers"] == []
    assert len(json.loads(page.ask("/api/search?q=&by=meaning")[2])["answers"]) == 2  # the newest
    with page.updates() as updates:
        assert updates.next()["link"]["meaning"] == ""
    other = start()
    until(lambda: "no model" in other.meaning.problem)
    status, _, body = other.ask("/api/search?q=dog&by=meaning")
    assert (status, json.loads(body)["error"]) == (404, "no search by meaning: there is no model")
    with other.updates() as updates:
        assert updates.next()["link"]["meaning"] == "there is no model"


@pytest.mark.parametrize(
    "query",
    [
        "by=colour",
        f"q={'x' * 201}&by=meaning",
        f"q={'x' * 201}",
        "board=A/b",
        "board=",
        "before=-1",
        "before=x",
        "&".join(["q=x"] * 20),
    ],
)
def test_a_query_out_of_its_bounds_is_refused(page: Page, query: str):
    status, _, body = page.ask(f"/api/search?{query}")
    assert status == 400
    assert_is(json.loads(body), {"$ref": "#/components/schemas/Error"})


def test_the_last_picture_of_a_camera_is_served(page: Page):
    assert page.ask("/api/picture/porch/front")[0] == 404
    page.say("porch/up/image/front", JPEG)
    status, headers, body = page.ask("/api/picture/porch/front?number=1")
    assert (status, headers["Content-Type"], body) == (200, "image/jpeg", JPEG)
    assert headers["X-Content-Type-Options"] == "nosniff"


PATHS = st.one_of(st.sampled_from([*API["paths"], *PAGE_FILES]), st.from_regex(r"/[!-~]{0,60}", fullmatch=True))


@settings(max_examples=50)
@given(
    path=PATHS.filter(lambda path: path != "/api/updates"), method=st.sampled_from(["GET", "POST", "PUT", "TRACE", "X"])
)
def test_any_request_is_answered_as_described(running: Page, path: str, method: str):
    status, headers, body = running.ask(path, method, "" if method == "POST" else None)
    assert status in (200, 303, 400, 403, 404, 405, 413)
    if status >= 400:
        assert_is(json.loads(body), {"$ref": "#/components/schemas/Error"})
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert (status == 405) == (headers["Allow"] is not None)


@pytest.fixture(scope="module")
def running() -> Iterator[Page]:
    with History(None) as history:
        meaning = Meaning(history, no_model)  # without a thread: it is being loaded for ever
        live = Live(Site("home"), history, meaning, MqttConfig())
        with Page(("127.0.0.1", 0), live, history, meaning) as page:
            thread = threading.Thread(target=page.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            yield page
            page.shutdown()
            thread.join()


def test_a_page_elsewhere_can_neither_ask_nor_point_its_name_here(page: Page):
    assert page.ask("/", Host="evil.example")[0] == 403
    assert page.ask("/api/search", **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert page.ask("/", **{"Sec-Fetch-Site": "cross-site"})[0] == 200  # a link
    assert page.ask("/api/search", Host=f"localhost:{page.server_port}", **{"Sec-Fetch-Site": "same-origin"})[0] == 200


def test_a_page_on_another_loopback_address_or_on_port_80_is_known_by_the_name_in_its_url(start: Callable[..., Page]):
    page = start(address="127.0.0.2")
    assert page.ask("/")[0] == 200
    port, page.server_port = page.server_port, 80  # which is root's
    assert {"localhost", "127.0.0.1:80", "127.0.0.2"} <= page.hosts
    assert f"127.0.0.2:{port}" not in page.hosts


def test_connections_for_which_there_was_no_thread_leave_room_for_later_ones(page: Page, monkeypatch):
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", none_left)
        for _ in range(MAX_CONNECTIONS + 1):
            with pytest.raises(http.client.RemoteDisconnected):
                page.ask("/")
    assert page.ask("/")[0] == 200


def test_with_a_token_nothing_is_seen_before_the_login(start: Callable[..., Page]):
    page = start(TOKEN)
    status, headers, _ = page.ask("/", Host="aiflow.lan")
    assert (status, headers["Location"]) == (303, "/login")
    for path in ("/page.js", "/api/updates", "/api/search?q=dog", "/api/picture/porch/front", "/elsewhere"):
        assert page.ask(path)[0] == 401
        assert page.ask(path, Cookie="aiflow=guessed; x=\x01")[0] == 401
    assert page.ask("/login")[0] == 200
    assert all(secret not in file for file in page.files.values() for secret in (TOKEN.encode(), page.session.encode()))


def test_the_token_opens_the_page_and_a_wrong_one_does_not(start: Callable[..., Page]):
    page = start(TOKEN)
    for wrong in ("", "token=", "token=guessed", "token=%ff", "x" * MAX_FORM):
        status, headers, _ = page.ask("/login", "POST", wrong)
        assert (status, headers["Location"], headers["Set-Cookie"]) == (303, "/login#wrong", None)
    status, headers, _ = page.ask("/login", "POST", f"token={TOKEN.replace(' ', '+')}")
    assert (status, headers["Location"]) == (303, "/")
    cookie, *attributes = headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict"} <= set(attributes)
    assert TOKEN not in cookie
    assert page.ask("/", Cookie=cookie)[0] == 200
    with page.updates(Cookie=cookie) as updates:
        assert updates.next()["is_first"]
    assert page.ask("/login", "POST", "x" * (MAX_FORM + 1))[0] == 413


def test_without_a_token_no_login_succeeds(page: Page):
    assert page.ask("/login", "POST", "token=")[1]["Set-Cookie"] is None
