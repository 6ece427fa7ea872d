"""The model behind the live page: what a message changes, and what hostile messages cannot do."""

import json
import string
from datetime import datetime, timezone
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire import AnsweredBy, Event, EventHop, Explain, TopicError, encode_event
from firmware_tools.ui import site as site_module
from firmware_tools.ui.answer_view import MINUTES
from firmware_tools.ui.rows import MAX_TEXT, CameraRow
from firmware_tools.ui.site import MAX_CAMERAS, MAX_SERVERS, QUIET_S, Change, Site

NOW = 1_800_000_000.0


def jpeg(height: int, width: int) -> bytes:
    return cv2.imencode(".jpg", np.full((height, width, 3), 90, np.uint8))[1].tobytes()


JPEG = jpeg(48, 64)


def site() -> Site:
    return Site("home")


def event(kind: str = "update", frame: str = "01", **fields: Any) -> bytes:
    """A final event, unless it is `new`."""
    least = {"camera": "front", "captured": datetime(2026, 3, 1, tzinfo=timezone.utc), "final": kind != "new"}
    return encode_event(Event(type=kind, frame=frame, **(least | fields)))


def take(to: Site, payload: bytes, kind: str = "event", board: str = "porch", now: float = NOW, **how: bool) -> Change:
    return to.take(f"aiflow/home/{board}/up/{kind}", payload, how.get("retained", False), now)


def front(of: Site, board: str = "porch") -> CameraRow:
    camera = of.boards[board].camera("front")
    assert camera
    return camera


def server_status(name: str = "attic", **fields: Any) -> bytes:
    return json.dumps({"state": "online", "server": name, **fields}).encode()


def test_a_verified_text_and_its_draft_are_marked_against_each_other():
    home = site()
    take(home, event("new", text="a cat laying on a bed"))
    assert front(home).waiting == "a cat laying on a bed"
    change = take(home, event(text="a cat sitting on a bed", label="tabby cat"))
    assert front(home).draft == [("a cat", False), ("laying", True), ("on a bed", False)]
    assert front(home).text == [("a cat", False), ("sitting", True), ("on a bed", False)]
    assert front(home).waiting == ""
    assert change.keys == (("board", "porch"),)
    assert change.answer
    assert (change.answer.text, change.answer.label) == ("a cat sitting on a bed", "tabby cat")


def test_a_newer_draft_does_not_hide_the_last_verified_text():
    home = site()
    take(home, event(text="a dog"))
    take(home, event("new", frame="02", text="a cat"))
    assert front(home).text == [("a dog", False)]
    assert front(home).waiting == "a cat"
    take(home, event(frame="02", text="a cat", final=False))
    assert front(home).waiting == ""
    assert not front(home).is_final
    take(home, event(frame="02", text="two cats"))
    assert front(home).draft == [("a", True), ("cat", True)] or front(home).draft == [("a cat", True)]


def test_a_lost_frame_keeps_its_draft_and_is_counted_but_not_searchable():
    home = site()
    take(home, event("new", text="a dog"))
    assert take(home, event("lost", text="a dog", why="no reply to 2 sent")).answer is None
    shown = front(home)
    assert (shown.type, shown.text, shown.reason) == ("lost", [("a dog", False)], "no reply to 2 sent")
    assert (shown.hour[0].answered, shown.hour[0].lost) == (0, 1)


def test_each_stop_on_the_way_has_its_time():
    home, hops = site(), (EventHop("edge", "hall", 1.0, 12.0), EventHop("cloud", "attic", 2.0, 30.0))
    by = Explain("speculative", "a draft saves passes", {"split": 90.0})
    take(home, event(text="a dog", timings_ms={"head": 8.0, "answer": 75.0}, hops=hops, explain=by))
    assert front(home).latency == [
        ("head", 8.0),
        ("link", 30.0),
        ("edge hall queue", 1.0),
        ("edge hall", 12.0),
        ("cloud attic queue", 2.0),
        ("cloud attic", 30.0),
    ]
    assert (front(home).reason, front(home).expected_ms) == ("a draft saves passes", {"split": 90.0})


def test_an_event_that_comes_twice_counts_once():
    home = site()
    take(home, event(text="a dog"))
    assert take(home, event(text="a dog")) == Change()
    assert take(home, event(text="a dog"), "last", retained=True) == Change()
    assert front(home).hour[0].answered == 1


def test_the_retained_last_event_fills_an_empty_page_and_a_fresh_one_is_not_read_twice():
    home = site()
    assert take(home, event(text="a dog"), "last") == Change()
    assert not home.boards
    take(home, event(text="a dog"), "last", retained=True)
    assert front(home).text == [("a dog", False)]


def test_the_hour_has_a_mean_per_minute_and_forgets_what_is_older():
    home = site()
    for number, after_ms in enumerate((10.0, 30.0)):
        take(home, event(frame=f"a{number}", text="x", after_ms=after_ms))
    assert front(home).hour[0].mean_ms == 20.0
    for minute in range(1, 3 * MINUTES):
        take(home, event(frame=f"b{minute}", text="x"), now=NOW + 60 * minute)
    assert len(front(home).hour) == MINUTES


def test_a_board_that_goes_keeps_what_its_status_said():
    home = site()
    online = {
        "state": "online",
        "version": "0.2.0",
        "cameras": {"front": "live"},
        "problems": {"metrics": "port in use"},
    }
    take(home, json.dumps(online).encode(), "status")
    take(home, b'{"state": "offline"}', "status")
    board = home.boards["porch"]
    assert (board.state, board.version, board.problems) == ("offline", "0.2.0", {"metrics": "port in use"})
    assert front(home).state == "live"


def test_a_camera_that_a_board_has_no_more_is_forgotten_and_makes_room():
    home = site()
    take(home, JPEG, "image/c0")
    for number in range(MAX_CAMERAS + 1):
        status = {"state": "online", "cameras": {f"c{number}": "live"}}
        assert take(home, json.dumps(status).encode(), "status").keys == (("board", "porch"),)
        assert [camera.name for camera in home.boards["porch"].cameras] == [f"c{number}"]
    assert not home.pictures
    assert home.counts["ignored"] == 0


def test_a_server_shows_its_queue_its_prices_and_how_many_proposed_tokens_its_answers_kept():
    home = site()
    fields = {
        "share_proven": True,
        "accepting": True,
        "queue": {"waiting": 3, "capacity": 64},
        "engine": {"busy_s": 0.5, "batches": 6},
        "price_ms": {"batch": 40.0, "pass": 3.0},
        "usage": {"cost": 0.5, "cost_today": 0.1, "budget_per_day": None, "currency": "EUR", "calls": {}},
        "counts": {"received": 9, "replies": {"ok": 7}},
    }
    home.take("aiflow/home/server/attic/status", server_status(**fields), True, NOW)
    change = take(home, event(text="a dog", accepted=5, proposed=8, answered_by=AnsweredBy("cloud", "attic")))
    assert ("server", "attic") in change.keys
    home.take("aiflow/home/server/attic/status", server_status(**fields), False, NOW + 10)
    row = home.servers["attic"]
    assert (row.is_taking, row.waiting, row.capacity, row.batch_ms, row.pass_ms) == (True, 3, 64, 40.0, 3.0)
    assert (row.busy_s, row.batches) == (0.5, 6)
    assert (row.received, row.answered, row.accepted, row.proposed) == (9, 7, 5, 8)
    assert (row.cost, row.cost_today, row.budget_per_day, row.currency) == (0.5, 0.1, None, "EUR")


HOSTILE = {
    "HTML": ("<script>alert(1)</script>", "<script>alert(1)</script>"),
    "newlines": ("a\nb\x1b[2J", "a\ufffdb\ufffd[2J"),
    "bidirectional": ("dog \u202egod", "dog \ufffdgod"),
}


@pytest.mark.parametrize(("text", "shown"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_shown_as_text_without_control_characters(text: str, shown: str):
    home = site()
    take(home, event(text=text, camera=text, label=text, scores={text: 0.5}, answers={text: {text: 1.0}}))
    take(home, event("trigger", camera=text, trigger=text))
    (camera,) = home.boards["porch"].cameras
    assert (camera.name, camera.label, camera.trigger) == (shown, shown, shown)
    assert camera.text == [(" ".join(shown.split()), False)]
    assert (camera.scores, camera.answers) == ([(shown, 0.5)], [(shown, shown, 1.0)])


def test_a_long_text_is_cut_and_not_compared():
    home, text = site(), "a b " * 2000
    take(home, event("new", text=text))
    take(home, event(text=text[1:]))
    ((shown, differs),) = front(home).text
    assert (len(shown), differs) == (MAX_TEXT + 1, False)


NONSENSE = [b"\xff", b"[" * 50_000, b"{}", event()[:-1], b'{"state": "elsewhere"}', b"x" * (10 << 20)]


@pytest.mark.parametrize("kind", ["event", "last", "status", "image/front", "image", "elsewhere"])
def test_what_is_no_message_of_a_board_is_counted_and_changes_nothing(kind: str):
    home = site()
    for payload in NONSENSE:
        assert take(home, payload, kind, retained=True) == Change()
    assert home.counts["ignored"] == len(NONSENSE)
    assert not home.boards


ENDS = ["porch/up/event", "porch/up/status", "server/attic/status", "x"]


@given(st.binary(min_size=1, max_size=200), st.sampled_from(ENDS))
def test_any_payload_is_shown_or_counted(payload: bytes, end: str):
    home = site()
    home.take(f"aiflow/home/{end}", payload, False, NOW)
    assert home.counts["ignored"] == 1


@given(st.text(alphabet=string.printable, max_size=80))
def test_any_other_topic_is_counted(topic: str):
    home = site()
    home.take(topic, event(), False, NOW)
    home.take("aiflow/home/server/up/event", event(), False, NOW)  # no board may have this name
    assert home.counts["ignored"] == 2


def test_ten_thousand_boards_do_not_displace_those_that_are_heard_from(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(site_module, "MAX_BOARDS", 100)
    home, same = site(), event(text="x")
    for number in range(10_000):
        take(home, same, board=f"b{number}")
    assert list(home.boards) == [f"b{number}" for number in range(100)]
    assert home.counts["not_shown"] == 9_900
    take(home, event(frame="02", text="x"), board="b0", now=NOW + QUIET_S)
    change = take(home, event(text="x"), board="late", now=NOW + QUIET_S)
    assert change.keys == (("board", "late"), ("board", "b1"))
    assert "b0" in home.boards
    assert "b1" not in home.boards


def test_a_board_or_server_whose_retained_status_is_removed_is_forgotten():
    home = site()
    take(home, event(text="a dog"))
    take(home, JPEG, "image/front")
    home.take("aiflow/home/server/attic/status", server_status(), True, NOW)
    take(home, b"", "last")
    assert (take(home, b"", "status").keys, home.boards, home.pictures) == ((("board", "porch"),), {}, {})
    assert home.take("aiflow/home/server/attic/status", b"", False, NOW).keys == (("server", "attic"),)
    assert (home.servers, home.counts["ignored"]) == ({}, 0)
    assert take(home, b"", "status") == Change()
    take(home, event(text="a dog"))
    assert "porch" in home.boards  # it has come back


def test_cameras_and_servers_are_bounded():
    home = site()
    for number in range(2 * MAX_CAMERAS):
        take(home, event(camera=f"c{number}", text="x"))
    for number in range(2 * MAX_SERVERS):
        home.take(f"aiflow/home/server/s{number}/status", server_status(f"s{number}"), False, NOW)
    assert (len(home.boards["porch"].cameras), len(home.servers)) == (MAX_CAMERAS, MAX_SERVERS)
    assert home.counts["ignored"] == MAX_CAMERAS + MAX_SERVERS


def test_a_server_speaks_only_for_itself():
    home = site()
    home.take("aiflow/home/server/attic/status", server_status("hall"), False, NOW)
    assert (home.servers, home.counts["ignored"]) == ({}, 1)


def test_pictures_are_bounded_together_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(site_module, "MAX_PICTURES", 2 * len(JPEG))
    home = site()
    for board in ("a", "b", "c"):
        change = take(home, JPEG, "image/front", board)
    assert change.keys == (("board", "c"), ("board", "a"))
    assert list(home.pictures) == [("b", "front"), ("c", "front")]
    assert front(home, "a").picture == 0
    assert front(home, "c").picture == 3


@pytest.mark.parametrize(
    "data",
    [jpeg(641, 640), JPEG[:-2], b"\x89PNG", b"", b"<svg onload='x'/>"],
    ids=["large", "cut", "png", "empty", "svg"],
)
def test_a_picture_that_a_browser_shall_not_decode_is_not_kept(data: bytes):
    home = site()
    take(home, data, "image/front")
    assert (home.pictures, home.counts["ignored"]) == ({}, 1)


@pytest.mark.parametrize("name", ["+", "a/b", "", "Home"])
def test_a_name_that_is_no_sites_is_refused(name: str):
    with pytest.raises(TopicError, match="site"):
        Site(name)
