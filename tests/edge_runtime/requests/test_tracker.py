"""Every request ends in exactly one further event: against a real broker, with a server that does as it is told."""

import itertools
import logging
import queue
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_runtime.config import OutboxConfig
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import MqttClient, MqttSettings
from edge_runtime.reporting.events import Events
from edge_runtime.requests import ByteBudget, NewRequest, RequestTracker
from edge_runtime.requests.lifecycle import RequestLifecycle
from edge_runtime.requests.outbox import Outbox, Row
from edge_runtime.requests.thread import QUEUE
from edge_runtime.wire import (
    AnsweredBy,
    CheckedObject,
    ContentKind,
    Event,
    Hop,
    Options,
    Paradigm,
    Reply,
    Request,
    Status,
    Tier,
    decode_event,
    decode_request,
    encode_reply,
    encode_request,
    topics,
)
from edge_runtime.wire.envelope import MAX_TOKEN, MAX_VIA, encode_tokens
from tests.brokers import PLAIN, Mosquitto
from tests.listener import PATIENCE_S, QUICK, Listener, until

SITE, BOARD = "home", "b1"
DRAFT = (7, 8, 2)
FOREVER_S = 600.0  # a deadline that no test waits for
SOON_S = 3.0  # one that passes, but not before the request has left


class Board:
    """The board's side without its pipeline: what asks, and what hears the events."""

    def __init__(
        self,
        port: int,
        bundle: Bundle,
        capacity: int = 8,
        resend_s: float = 60.0,
        outbox: OutboxConfig | None = None,
        bytes_per_minute: int = 0,
        silence: str = "",
    ) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.bundle = bundle
        self.client = MqttClient(
            MqttSettings("127.0.0.1", port, client_id=BOARD, keepalive_s=2),
            subscriptions=[(topics.reply(SITE, BOARD), 1)],
            on_message=lambda message: self.tracker.reply_arrived(message.payload),
            timing=QUICK,
        )
        self.listener: Callable[[Event], None] = self.events.put
        events = Events(self.client, SITE, BOARD, self.heard)
        self.budget = ByteBudget(bytes_per_minute)
        self.tracker = RequestTracker(
            self.client,
            bundle,
            SITE,
            BOARD,
            events,
            capacity,
            resend_s,
            outbox,
            byte_budget=self.budget,
            find_silence=lambda: self.silence,
        )
        self.asked, self.silence = 0, silence

    def heard(self, event: Event) -> None:
        if event.type != "new":  # one for each request: test_pipeline.py
            self.listener(event)

    def ask(
        self,
        deadline_s: float = FOREVER_S,
        keeps: bool = False,
        announces: bool = True,
        options: Options | None = None,
        content_kind: ContentKind = ContentKind.LATENT,
        has_draft: bool | None = None,
    ) -> Request:
        """One more request; its id is its number. Without `announces`, its draft or its features are still to come."""
        self.asked += 1
        has_draft = announces if has_draft is None else has_draft
        request = Request(
            id=self.asked.to_bytes(8, "big"),
            bundle=self.bundle.id,
            paradigm=Paradigm.SPECULATIVE,
            age_ms=10,
            budget_ms=int(1e3 * deadline_s),
            content_kind=content_kind,
            content=b"symbols",
            draft=encode_tokens(DRAFT),
            options=options,
        )
        seen = Event(
            type="new",
            frame=request.id.hex(),
            camera="door",
            captured=datetime.now(timezone.utc),
            text="word7 word8" if has_draft else "",
            tokens=DRAFT if has_draft else (),
            timings_ms={"head": 1.0},
        )
        payload = encode_request(request)
        now = time.monotonic()
        assert self.tracker.submit(NewRequest(request, payload, seen, now, now + deadline_s, keeps))
        if announces:
            self.tracker.announce(seen)
        return request

    def next_event(self) -> Event:
        return self.events.get(timeout=PATIENCE_S)

    def __enter__(self) -> "Board":
        self.client.start()
        assert self.client.wait_online(PATIENCE_S)
        self.running = ExitStack()
        self.running.enter_context(self.tracker)
        return self

    def stop(self) -> None:
        """As the runtime does it: the answers first, then the client."""
        self.running.close()

    def __exit__(self, *_: object) -> None:
        """Whatever the test was about: no event too many, and every request accounted for."""
        self.stop()
        self.client.close()
        counts = self.tracker.summary()
        assert counts["accepted"] == self.asked
        assert counts["accepted"] + counts["found"] == counts["answered"] + counts["lost"] + counts["kept"]
        assert counts["open"] == 0
        assert self.events.empty()


class Server(Listener):
    """Hears the board's requests and replies as the test says."""

    def __init__(self, port: int) -> None:
        super().__init__(port, topics.request(SITE, BOARD))

    def request(self) -> Request:
        return decode_request(self.next())

    def reply(self, request: Request, status: Status = Status.OK, **fields: Any) -> None:
        reply = Reply(id=request.id, status=status, tier=Tier.CLOUD, server="s1", **fields)
        self.say(encode_reply(reply))

    def say(self, payload: bytes) -> None:
        self.client.publish(topics.reply(SITE, BOARD), payload)


@pytest.fixture
def server(broker: Mosquitto) -> Iterator[Server]:
    with Server(broker.port) as server:
        yield server


@pytest.fixture
def board(broker: Mosquitto, board_bundle: Bundle) -> Iterator[Board]:
    with Board(broker.port, board_bundle) as board:
        yield board


def answer_one_more(board: Board, server: Server) -> None:
    """A request whose answer shows that everything said before has been heard: messages keep their order."""
    board.ask()
    server.reply(server.request())
    assert board.next_event().frame == board.asked.to_bytes(8, "big").hex()


def test_a_reply_becomes_a_final_update_with_all_that_it_says(board, server):
    request = board.ask()
    assert server.request() == request
    server.reply(
        request,
        tokens=encode_tokens((7, 9, 2)),
        accepted=1,
        proposed=3,
        hops=(Hop(Tier.CLOUD, "s1", 1.0, 2.0, {"tail": 0.5}),),
        label="dog",
        scores={"dog": 0.75},
        confidence=0.25,
        unsure=True,
        is_cut=True,
        answers={"door": {"open": 0.75, "shut": 0.25}},
    )
    event = board.next_event()
    assert (event.type, event.final, event.frame, event.camera) == ("update", True, request.id.hex(), "door")
    assert (event.text, event.tokens) == ("word7 word9", (7, 9, 2))
    assert event.answered_by is not None
    assert (event.answered_by.tier, event.answered_by.server) == ("cloud", "s1")
    assert (event.accepted, event.proposed, event.label, event.scores) == (1, 3, "dog", {"dog": 0.75})
    assert (event.confidence, event.unsure, event.cut) == (0.25, True, True)
    assert event.answers == {"door": {"open": 0.75, "shut": 0.25}}
    assert event.hops[0].stages_ms == {"tail": 0.5}
    assert event.bytes_up == len(encode_request(request))
    assert set(event.timings_ms) == {"head", "answer"}
    summary = board.tracker.summary()
    assert (summary["request_bytes"], summary["answer_seconds"]["count"]) == (event.bytes_up, 1)


def test_a_question_that_no_server_knows_is_logged_once(board, server, caplog):
    for _ in range(2):
        board.ask(options=Options(questions=("door", "dorr")))
        request = server.request()
        server.say(not_final(request, "a dog", 7))  # the tier above may know both
        server.reply(request, answers={"door": {"open": 0.75}})
        assert [board.next_event().final for _ in range(2)] == [False, True]
    unanswered = [record.getMessage() for record in caplog.records if "question not answered" in record.message]
    assert ["question=dorr camera=door server='s1'" in line for line in unanswered] == [True]


def test_an_answer_that_is_not_final_is_followed_by_the_higher_tiers(board, server):
    board.ask()
    request = server.request()
    server.say(encode_reply(Reply(id=request.id, status=Status.OK, text="a dog", server="e1", final=False)))
    first = board.next_event()
    assert (first.type, first.final, first.text) == ("update", False, "a dog")
    assert first.answered_by == AnsweredBy("edge", "e1")
    server.reply(request, text="a wet dog")
    last = board.next_event()
    assert (last.type, last.final, last.text) == ("update", True, "a wet dog")
    assert last.answered_by == AnsweredBy("cloud", "s1")
    assert last.after_ms > first.after_ms
    server.reply(request, text="a cat")  # a third one changes nothing
    answer_one_more(board, server)
    assert board.tracker.summary()["duplicate"] == 1


def test_a_draft_that_comes_behind_an_answer_that_is_not_final_does_not_replace_it(board, server):
    request = board.ask(deadline_s=SOON_S, announces=False)
    server.say(not_final(request, "a dog", 7))
    first = board.next_event()
    draft = msgspec.structs.replace(first, type="new", final=False, text="late draft", tokens=DRAFT)
    board.tracker.announce(draft)
    last = board.next_event()
    assert [(event.type, event.text) for event in (first, last)] == [("update", "a dog")] * 2
    assert last.final
    assert board.tracker.summary()["reply"]["overtaken"] == 1


def test_an_answer_that_nobody_improves_is_the_last_word_at_the_deadline(board, server):
    request = board.ask(deadline_s=SOON_S)
    server.say(encode_reply(Reply(id=request.id, status=Status.OK, text="a dog", server="e1", final=False)))
    first, last = board.next_event(), board.next_event()
    assert (first.final, last.final, last.type, last.text) == (False, True, "update", "a dog")
    assert (last.answered_by, last.why) == (AnsweredBy("edge", "e1"), "no higher tier answered in time")


def not_final(request: Request, text: str, token: int) -> bytes:
    tokens = encode_tokens([token])
    return encode_reply(Reply(id=request.id, status=Status.OK, tokens=tokens, text=text, server="e1", final=False))


def test_the_same_answer_again_is_no_news_and_counted(board, server):
    request = board.ask()
    for _ in range(4):  # as a server answers each copy of a request
        server.say(not_final(request, "a dog", 7))
    server.say(not_final(request, "a cat", 8))
    server.reply(request, text="a cow")
    assert [board.next_event().text for _ in range(3)] == ["a dog", "a cat", "a cow"]
    assert board.tracker.summary()["reply"]["not_final_again"] == 3


def test_a_server_that_never_comes_to_an_end_is_heard_so_often_as_there_can_be_tiers(board, server):
    request = board.ask()
    for number in range(10):
        server.say(not_final(request, f"word{number}", number))
    server.reply(request, text="a cow")
    texts = [board.next_event().text for _ in range(MAX_VIA + 2)]
    assert texts == [*(f"word{number}" for number in range(MAX_VIA + 1)), "a cow"]
    assert board.tracker.summary()["reply"]["not_final_again"] == 10 - MAX_VIA - 1


def test_of_answers_that_wait_for_a_higher_tier_there_are_as_many_as_open_requests(broker, board_bundle, server):
    with Board(broker.port, board_bundle, capacity=2) as board:
        for number in range(3):
            server.say(not_final(board.ask(), f"word{number}", number))
            assert board.next_event().text == f"word{number}"
        stands = board.next_event()
        assert (stands.frame, stands.final) == ((1).to_bytes(8, "big").hex(), True)
        assert stands.why == "too many wait for a higher tier"
        board.stop()
        assert [board.next_event().final for _ in range(2)] == [True, True]


def test_an_answer_that_is_not_final_becomes_so_when_the_board_stops(broker, board_bundle, server):
    with Board(broker.port, board_bundle) as board:
        request = board.ask()
        server.say(encode_reply(Reply(id=request.id, status=Status.OK, text="a dog", server="e1", final=False)))
        assert not board.next_event().final
        board.stop()
        last = board.next_event()
        assert (last.final, last.type, last.text) == (True, "update", "a dog")


def test_an_update_is_published_and_retained_as_the_last_event(board, server, broker):
    with Listener(broker.port, topics.last(SITE, BOARD)) as live:
        server.reply(board.ask(), text="a dog")
        assert [decode_event(live.next()).text for _ in range(2)] == ["word7 word8", "a dog"]
    with Listener(broker.port, topics.last(SITE, BOARD)) as late:
        assert decode_event(late.next()).text == "a dog"
    assert board.next_event().text == "a dog"


@pytest.mark.parametrize("status", [Status.STALE, Status.BAD_REQUEST, Status.FAILED])
def test_a_refusal_loses_the_request_at_once_and_says_who_and_why(board, server, status):
    board.ask()
    server.reply(server.request(), status, error="try this")
    event = board.next_event()
    assert (event.type, event.final) == ("lost", True)
    assert event.why == f"server s1: {status.name.lower()}: try this"
    assert (event.text, event.tokens) == ("word7 word8", DRAFT)  # the draft stands
    assert board.tracker.summary()["reply"][status.name.lower()] == 1


@pytest.mark.parametrize(
    "said",
    [
        {"status": Status.FAILED, "error": "\x1b]0;title\x07 \u202etxt"},
        {"status": Status.OK, "text": "[2]", "checked": CheckedObject("door", True)},  # claims an object
    ],
)
def test_a_servers_words_give_no_orders_to_the_terminal_that_shows_the_log(board, server, caplog, said):
    caplog.set_level(logging.INFO)
    board.ask()
    server.say(encode_reply(Reply(id=server.request().id, tier=Tier.CLOUD, server="s\x1b[2J\n1", **said)))
    assert board.next_event().why.startswith("server s\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}1: ")
    (lost,) = (text for record in caplog.records if (text := record.getMessage()).startswith("request lost"))
    assert lost.isprintable()


def test_a_loss_waits_for_a_draft_that_never_comes_until_the_deadline(board, server):
    board.ask(deadline_s=SOON_S, announces=False)
    server.reply(server.request(), Status.FAILED, error="try this")
    event = board.next_event()
    assert (event.type, event.final, event.why) == ("lost", True, "server s1: failed: try this")
    assert event.after_ms >= 1e3 * SOON_S


def test_a_loss_waits_for_a_draft_that_never_comes_until_the_board_stops(board, server):
    board.ask(announces=False)
    server.reply(server.request(), Status.FAILED)
    until(lambda: board.tracker.summary()["lost"] == 1)
    board.stop()
    assert board.next_event().type == "lost"


def test_without_a_reply_a_request_is_lost_at_its_deadline(board, server):
    request = board.ask(deadline_s=SOON_S)
    event = board.next_event()
    assert (event.type, event.why) == ("lost", "no reply to 1 sent")
    assert event.bytes_up == len(encode_request(request))


def test_a_late_reply_is_counted_and_changes_nothing(board, server):
    request = board.ask(deadline_s=SOON_S)
    assert board.next_event().type == "lost"
    server.request()
    server.reply(request)
    answer_one_more(board, server)
    assert board.tracker.summary()["late"] == 1


def test_a_duplicate_reply_is_counted_and_changes_nothing(board, server):
    board.ask()
    request = server.request()
    server.reply(request)
    server.reply(request)
    assert board.next_event().type == "update"
    answer_one_more(board, server)
    assert board.tracker.summary()["duplicate"] == 1


def test_a_refusal_after_the_answer_changes_nothing(board, server):
    board.ask()
    request = server.request()
    server.reply(request)
    server.reply(request, Status.FAILED)
    assert board.next_event().type == "update"
    answer_one_more(board, server)
    assert board.tracker.summary()["duplicate"] == 1


def test_a_busy_server_is_asked_again_and_its_answer_counts(board, server):
    board.ask()
    first = server.request()
    server.reply(first, Status.BUSY, retry_after_ms=20)
    second = server.request()
    assert second.id == first.id
    server.reply(second, text="a dog")
    event = board.next_event()
    assert (event.type, event.text) == ("update", "a dog")
    assert event.bytes_up == len(encode_request(first)) + len(encode_request(second))
    assert board.tracker.summary()["busy"] == 1


def test_a_resend_has_the_same_id_and_content_and_says_how_old_it_has_become(broker, board_bundle, server):
    with Board(broker.port, board_bundle, resend_s=0.05) as board:
        board.ask(deadline_s=60)
        sent = [server.request() for _ in range(3)]
        server.reply(sent[0])
        assert board.next_event().type == "update"
        for earlier, later in itertools.pairwise(sent):
            assert (later.id, later.content, later.draft) == (earlier.id, earlier.content, earlier.draft)
            assert later.age_ms > earlier.age_ms
            assert later.budget_ms < earlier.budget_ms
        sums = [each.age_ms + each.budget_ms for each in sent[1:]]
        assert max(sums) - min(sums) <= 2  # rounded
        assert board.tracker.summary()["resent"] >= 2


def test_a_request_whose_server_died_is_answered_when_sent_again(broker, board_bundle):
    with Board(broker.port, board_bundle, resend_s=0.2) as board:
        with Server(broker.port) as first:
            board.ask()
            first.request()
        with Server(broker.port) as second:
            second.reply(second.request())
            assert board.next_event().type == "update"


@pytest.mark.parametrize("garbage", [b"", b"garbage", bytes(64), b"\x93\x01"])
def test_what_is_no_reply_is_counted_and_changes_nothing(board, server, garbage):
    server.say(garbage)
    answer_one_more(board, server)
    assert board.tracker.summary()["reply"]["unreadable"] == 1


def test_a_reply_to_nothing_we_asked_is_counted_and_changes_nothing(board, server):
    for status in Status:
        server.say(encode_reply(Reply(id=b"stranger", status=status, server="s1")))
    answer_one_more(board, server)
    assert board.tracker.summary()["unknown"] == len(Status)


def test_a_valid_reply_becomes_an_object_and_an_invalid_one_stays_a_text(board, server):
    for text, valid, found in (('{"people": 2}', True, {"people": 2}), ("two", False, None)):
        board.ask()
        server.reply(server.request(), text=text, checked=CheckedObject("door", valid))
        event = board.next_event()
        assert (event.type, event.text, event.object, event.schema, event.valid) == (
            "update",
            text,
            found,
            "door",
            valid,
        )


@pytest.mark.parametrize("text", ["two", "[2]", '{"a":' * 20 + "1" + "}" * 20, "", '{"a": 1e999}'])
def test_a_reply_that_claims_an_object_and_has_none_loses_its_request_and_no_other(board, server, text):
    board.ask()
    server.reply(server.request(), text=text, checked=CheckedObject("door", True))
    event = board.next_event()
    assert (event.type, event.final, event.object) == ("lost", True, None)
    assert "server s1: " in event.why
    answer_one_more(board, server)


def test_a_busy_reply_that_claims_an_object_is_busy_all_the_same(board, server):
    board.ask()
    server.reply(server.request(), Status.BUSY, retry_after_ms=20, checked=CheckedObject("door", True))
    server.reply(server.request(), text="a dog")
    assert board.next_event().text == "a dog"


def test_a_reply_too_large_for_an_event_loses_its_request_and_no_other(board, server):
    board.ask()
    names = {chr(n) * 64: 0.5 for n in range(1, 32)}  # as JSON each letter is six
    server.reply(server.request(), text="\x01" * 8192, tokens=encode_tokens([MAX_TOKEN] * 1024), scores=names)
    event = board.next_event()
    assert event.type == "lost"
    assert "at most 65536 are read" in event.why
    answer_one_more(board, server)


@pytest.mark.parametrize(
    ("config", "outcome"),
    [
        (PLAIN + "acl_file {folder}/acl\n", "refused"),
        (PLAIN + "max_packet_size 80\n", "oversized"),
    ],
)
def test_a_request_that_the_broker_refuses_is_lost_at_once(start_broker, tmp_path, board_bundle, config, outcome):
    (tmp_path / "acl").write_text(f"topic read #\ntopic write {topics.event(SITE, BOARD)}\n")
    with Board(start_broker(config).port, board_bundle) as board:
        board.ask()
        event = board.next_event()
        assert (event.type, event.why) == ("lost", f"broker: {outcome}")


def test_one_request_too_many_is_lost_unsent_and_those_that_wait_are_answered(broker, board_bundle, server):
    with Board(broker.port, board_bundle, capacity=2) as board:
        asked = [board.ask() for _ in range(3)]
        event = board.next_event()
        assert (event.frame, event.type, event.why) == (asked[2].id.hex(), "lost", "2 requests wait already")
        for request in asked[:2]:
            server.reply(request)
            assert board.next_event().frame == request.id.hex()


def test_a_loss_says_why_no_server_could_answer_and_the_log_says_it_once(broker, board_bundle, caplog):
    with Board(broker.port, board_bundle, silence="nobody is there") as board:
        board.ask(deadline_s=0.0)
        assert board.next_event().why == "nobody is there"
        board.ask()
        board.stop()
        assert board.next_event().why == "the board stops: nobody is there"
    assert caplog.text.count("no answer: nobody is there") == 1


def test_while_no_server_can_answer_a_request_is_sent_once(broker, board_bundle):
    with Board(broker.port, board_bundle, resend_s=0.05, silence="all servers are offline") as board:
        board.ask(deadline_s=SOON_S)
        assert board.next_event().type == "lost"
        assert board.tracker.summary()["resent"] == 0


def test_a_copy_that_a_server_asks_for_is_sent_whatever_the_statuses_say(broker, board_bundle, server):
    with Board(broker.port, board_bundle, silence="all servers are offline") as board:
        board.ask()
        first = server.request()
        server.reply(first, Status.BUSY, retry_after_ms=0)
        server.reply(server.request())
        assert board.next_event().final


def test_what_was_kept_waits_until_a_server_can_answer(broker, board_bundle, server, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_runtime.requests.lifecycle.AWAY_S", 0.0)
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path), silence="all servers are offline") as board:
        kept = board.ask(keeps=True)
        board.ask(deadline_s=SOON_S)
        assert "kept, asked again later" in board.next_event().why
        assert board.tracker.summary()["replayed"] == 0
        assert server.request().id != kept.id
        board.silence = ""
        for _ in range(2):
            server.reply(server.request())
            assert board.next_event().final


def test_a_request_that_never_left_is_no_bytes_and_has_no_copies(broker, board_bundle):
    with Board(broker.port, board_bundle, resend_s=0.05) as board:
        broker.kill()
        until(lambda: not board.client.wait_online(0))
        board.ask(deadline_s=SOON_S)
        event = board.next_event()
        assert (event.type, event.bytes_up) == ("lost", 0)
        assert board.tracker.summary()["resent"] == 0
    assert board.tracker.summary()["request_bytes"] == 0


def test_a_board_that_stops_loses_what_is_open(board, server):
    board.ask()
    server.request()
    board.stop()
    event = board.next_event()
    assert (event.type, event.why) == ("lost", "the board stops")


def test_a_frozen_broker_delays_no_deadline(board, broker):
    broker.freeze()
    asked = [board.ask(deadline_s=0.3) for _ in range(5)]
    events = [board.next_event() for _ in asked]
    assert [(e.frame, e.type) for e in events] == [(r.id.hex(), "lost") for r in asked]
    broker.thaw()


def test_a_listener_that_raises_ends_nothing(board, server, caplog):
    def put_and_raise(event: Event) -> None:
        board.events.put(event)
        raise RuntimeError("mine")

    board.listener = put_and_raise
    answer_one_more(board, server)
    answer_one_more(board, server)
    assert "event listener raised" in caplog.text


# ---- waiting for the last answers, and a flood ----


def after(seconds: float, action: Callable[[], Any]) -> None:
    threading.Timer(seconds, action).start()


def test_waiting_ends_when_the_last_request_has_its_event(board, server):
    requests = [board.ask() for _ in range(2)]
    after(0.1, lambda: [server.reply(request) for request in requests])
    board.tracker.wait_until_settled(FOREVER_S, threading.Event())
    assert board.tracker.summary()["answered"] == 2
    assert [board.next_event().type for _ in requests] == ["update", "update"]


def test_a_request_is_waited_for_before_it_is_registered(board, monkeypatch):
    gate, on_request = threading.Event(), RequestLifecycle.on_request

    def accept_later(*arguments: Any, **keywords: Any) -> Any:
        gate.wait(PATIENCE_S)
        return on_request(*arguments, **keywords)

    monkeypatch.setattr(RequestLifecycle, "on_request", accept_later)
    board.ask(deadline_s=0)  # lost as soon as it is open
    after(0.1, gate.set)
    board.tracker.wait_until_settled(FOREVER_S, threading.Event())
    assert board.tracker.summary()["lost"] == 1
    assert board.next_event().type == "lost"


def test_waiting_ends_with_its_time_or_with_a_stop(board):
    board.ask()
    board.tracker.wait_until_settled(0.05, threading.Event())
    stop = threading.Event()
    after(0.05, stop.set)
    board.tracker.wait_until_settled(FOREVER_S, stop)
    board.stop()
    assert board.next_event().why == "the board stops"


def test_a_flood_of_replies_never_blocks_the_network_thread(board_bundle):
    client = MqttClient(MqttSettings("127.0.0.1", 1, client_id=BOARD))
    events = Events(client, SITE, BOARD)
    tracker = RequestTracker(client, board_bundle, SITE, BOARD, events, 8, 1.0)  # its thread is not started
    for _ in range(QUEUE + 3):
        tracker.reply_arrived(b"x")
    assert tracker.summary()["reply"]["overflow"] == 3
    client.close()


def outbox_in(folder: Path, **settings: Any) -> OutboxConfig:
    return OutboxConfig(str(folder / "outbox.sqlite"), replay_per_s=100.0, **settings)


def test_with_an_outbox_the_draft_stands_for_now_and_the_request_is_asked_again(broker, board_bundle, server, tmp_path):
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path)) as board:
        first = board.ask(deadline_s=SOON_S)
        assert server.request() == first
        kept = board.next_event()
        assert (kept.type, kept.final, kept.text) == ("update", False, "word7 word8")
        assert kept.why == "no reply to 1 sent: kept, asked again later"
        again = server.request()
        assert (again.id, again.content, again.draft) == (first.id, first.content, first.draft)
        assert again.age_ms > first.age_ms
        server.reply(again, text="a dog")
        update = board.next_event()
        assert (update.type, update.final, update.text, update.frame) == ("update", True, "a dog", first.id.hex())
        summary = board.tracker.summary()
        assert summary["kept"] == 0
        assert summary["answer_seconds"]["count"] == 0  # an outage would be most of them


def test_what_was_kept_outlives_the_board(broker, board_bundle, server, tmp_path):
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path)) as board:
        first = board.ask()
        assert server.request() == first
        board.stop()
        assert board.next_event().why == "the board stops: kept, asked again later"
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path)) as board:
        again = server.request()
        assert again.id == first.id
        server.reply(again, text="a dog")
        update = board.next_event()
        assert (update.type, update.final, update.text) == ("update", True, "a dog")
        assert update.after_ms > 0
        assert board.tracker.summary()["found"] == 1


def test_a_reply_to_a_request_that_an_earlier_run_has_sent_answers_it_without_a_made_up_answer_time(
    broker, board_bundle, server, tmp_path
):
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path)) as board:
        first = board.ask()
        board.stop()
        board.next_event()
    board = Board(broker.port, board_bundle, outbox=outbox_in(tmp_path), bytes_per_minute=1000)
    assert board.budget.take(600, time.monotonic())  # so that nothing is retried
    with board:
        until(lambda: board.tracker.summary()["kept"] == 1)
        server.reply(first, text="a dog")
        event = board.next_event()
        assert (event.type, event.final, event.text, set(event.timings_ms)) == ("update", True, "a dog", {"head"})


def test_a_request_that_was_paid_for_and_never_sent_gives_its_bytes_back(broker, board_bundle, server):
    with Board(broker.port, board_bundle, capacity=1, bytes_per_minute=1000) as board:
        first = board.ask()
        assert server.request() == first
        for _ in range(3):
            board.ask()
            assert board.next_event().why == "1 requests wait already"
        assert board.budget.spent(time.monotonic()) == len(encode_request(first))
        server.reply(first)
        board.next_event()


def test_what_need_not_be_sent_now_waits_for_the_link(broker, board_bundle, server, tmp_path):
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path)) as board:
        first = board.ask(keeps=True)
        again = server.request()
        assert again.id == first.id
        server.reply(again, text="a dog")
        assert board.next_event().text == "a dog"
        assert board.tracker.summary()["resent"] == 0


def test_what_was_kept_waits_while_frames_find_the_link_away(broker, board_bundle, server, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_runtime.requests.lifecycle.AWAY_S", FOREVER_S)
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path)) as board:
        kept = board.ask(keeps=True)
        until(lambda: board.tracker.summary()["kept"] == 1)
        live = board.ask()
        server.reply(live)
        assert (server.request().id, board.next_event().frame) == (live.id, live.id.hex())
        monkeypatch.setattr("edge_runtime.requests.lifecycle.AWAY_S", 0.0)
        assert server.request().id == kept.id
        server.reply(kept)
        assert board.next_event().frame == kept.id.hex()


def test_what_was_kept_leaves_half_of_the_table_to_live_frames(broker, board_bundle, server, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_runtime.requests.lifecycle.AWAY_S", 0.0)
    with Board(broker.port, board_bundle, capacity=2, outbox=outbox_in(tmp_path)) as board:
        live = board.ask()
        assert server.request().id == live.id
        kept = board.ask(keeps=True)
        until(lambda: board.tracker.summary()["kept"] == 1)
        also_live = board.ask()
        assert server.request().id == also_live.id
        for request in (live, also_live):
            server.reply(request)
            assert board.next_event().frame == request.id.hex()
        assert server.request().id == kept.id
        server.reply(kept)
        assert board.next_event().frame == kept.id.hex()


def test_what_is_sent_again_is_paid_for_and_stays_when_the_budget_is_spent(broker, board_bundle, server):
    with Board(broker.port, board_bundle, resend_s=0.05, bytes_per_minute=150) as board:
        request = board.ask()
        until(lambda: board.tracker.summary()["reply"].get("over_budget", 0) >= 1)
        resent, size = board.tracker.summary()["resent"], len(encode_request(request))
        assert board.budget.spent(time.monotonic()) <= 150
        assert not board.budget.take(150, time.monotonic())
        assert resent >= 1
        assert board.budget.spent(time.monotonic()) == pytest.approx((1 + resent) * size, rel=0.1)
        server.reply(request)
        assert board.next_event().type == "update"


def test_what_was_kept_is_paid_for_and_waits_for_the_budget(broker, board_bundle, server, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_runtime.requests.lifecycle.AWAY_S", 0.0)
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path), bytes_per_minute=1000) as board:
        assert board.budget.take(600, time.monotonic())
        kept = board.ask(keeps=True)
        until(lambda: board.tracker.summary()["kept"] == 1)
        live = board.ask()
        server.reply(live)
        assert (server.request().id, board.next_event().frame) == (live.id, live.id.hex())
        board.budget.bytes_per_minute = 2000
        assert server.request().id == kept.id
        assert board.budget.spent(time.monotonic()) > 600
        server.reply(kept)
        assert board.next_event().frame == kept.id.hex()


def test_a_draft_that_follows_its_picture_is_kept_with_its_features_instead(broker, board_bundle, server, tmp_path):
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path)) as board:
        first = board.ask(deadline_s=SOON_S, announces=False)
        features = msgspec.structs.replace(first, content=b"features")
        assert server.request() == first
        seen = Event(type="new", frame=first.id.hex(), camera="door", captured=datetime.now(timezone.utc), text="late")
        board.tracker.announce(seen, encode_request(features))
        kept = board.next_event()
        assert (kept.type, kept.text, kept.final) == ("update", "late", False)
        again = server.request()
        assert (again.id, again.content) == (first.id, b"features")
        server.reply(again)
        assert board.next_event().final


@pytest.mark.parametrize("has_draft", [False, True])
def test_a_picture_too_many_waits_for_its_features_and_is_kept(broker, board_bundle, server, tmp_path, has_draft):
    with Board(broker.port, board_bundle, capacity=1, outbox=outbox_in(tmp_path)) as board:
        first = board.ask()
        second = board.ask(announces=False, content_kind=ContentKind.JPEG, has_draft=has_draft)
        features = msgspec.structs.replace(second, content_kind=ContentKind.LATENT)
        until(lambda: board.tracker.summary()["accepted"] == 2)
        seen = Event(type="new", frame=second.id.hex(), camera="door", captured=datetime.now(timezone.utc), text="late")
        board.tracker.announce(seen, encode_request(features))
        kept = board.next_event()
        assert (kept.type, kept.text) == ("update", "late")
        assert kept.why == "1 requests wait already: kept, asked again later"
        assert server.request() == first
        server.reply(first)
        assert board.next_event().final
        server.reply(server.request())
        assert board.next_event().frame == second.id.hex()


def test_a_draft_that_follows_while_its_request_is_written_is_announced_once(
    broker, board_bundle, server, tmp_path, monkeypatch
):
    news: list[Event] = []
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path, every_request=True)) as board:
        monkeypatch.setattr(board, "heard", lambda event: news.append(event) if event.type == "new" else None)
        board.tracker._request_events._events._listener = board.heard
        monkeypatch.setattr(Outbox, "put", lambda *_: None)  # and never says that it has
        first = board.ask(announces=False)
        draft = Event(
            type="new", frame=first.id.hex(), camera="door", captured=datetime.now(timezone.utc), tokens=DRAFT
        )
        board.tracker.announce(draft)
        assert server.request() == first
        server.reply(first)
        until(lambda: board.tracker.summary()["answered"] == 1)
    assert news == [draft]


def test_a_board_whose_outbox_reads_more_than_its_queue_holds_stops_in_order(broker, board_bundle, tmp_path):
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path)) as board:
        board.ask()
        board.stop()
        assert board.next_event().why == "the board stops: kept, asked again later"
        for _ in range(3 * QUEUE):  # as if the disk had been slow with what was asked for
            board.tracker._outbox._on_read(bytes(8), None)


def test_what_neither_outbox_nor_budget_take_is_lost_and_says_so(broker, board_bundle, tmp_path, monkeypatch):
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path), bytes_per_minute=1) as board:
        monkeypatch.setattr(Outbox, "has_room", lambda _: False)
        board.ask(keeps=True)
        lost = board.next_event()
        assert (lost.type, lost.why) == ("lost", "no bytes left in this minute's budget")


def test_a_disk_that_takes_nothing_holds_up_no_request_and_loses_none_silently(
    broker, board_bundle, server, tmp_path, monkeypatch
):
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path, every_request=True)) as board:
        monkeypatch.setattr(Outbox, "has_room", lambda _: False)
        first = board.ask(deadline_s=SOON_S)
        assert server.request() == first
        lost = board.next_event()
        assert (lost.type, lost.final, lost.why) == ("lost", True, "no reply to 1 sent")


def test_a_disk_that_hangs_holds_up_a_request_for_a_moment_only(broker, board_bundle, server, tmp_path, monkeypatch):
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path, every_request=True)) as board:
        monkeypatch.setattr(Outbox, "put", lambda *_: None)  # and never says that it has
        first = board.ask()
        assert server.request() == first
        server.reply(first)
        assert board.next_event().type == "update"


def test_a_refusal_ends_what_was_kept_as_well(broker, board_bundle, server, tmp_path):
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path)) as board:
        board.ask(deadline_s=SOON_S)
        server.request()
        assert not board.next_event().final
        server.reply(server.request(), Status.BAD_REQUEST, error="try this")
        lost = board.next_event()
        assert (lost.type, lost.final, lost.why) == ("lost", True, "server s1: bad_request: try this")
        assert board.tracker.summary()["kept"] == 0


def test_what_the_outbox_gives_up_is_lost_and_says_why(broker, board_bundle, server, tmp_path):
    with Board(broker.port, board_bundle, outbox=outbox_in(tmp_path, max_age_s=1.0)) as board:
        board.client.close()  # so that no answer can come
        board.ask(deadline_s=0.1)
        assert not board.next_event().final
        lost = board.next_event()
        assert (lost.type, lost.final) == ("lost", True)
        assert lost.why.startswith("outbox: ")
        assert board.tracker.summary()["lost"] == 1


def test_what_another_version_kept_is_reported_lost(broker, board_bundle, tmp_path):
    settings = outbox_in(tmp_path)
    outbox = Outbox(settings, on_found=print, on_stored=print, on_read=print)
    outbox.start()
    outbox.put(Row(bytes(8), time.time(), time.time(), b"an old request", b"an old event"))
    assert outbox.close() == []
    with Board(broker.port, board_bundle, outbox=settings) as board:
        lost = board.next_event()
        assert (lost.type, lost.final, lost.frame) == ("lost", True, bytes(8).hex())
        assert "not an envelope" in lost.why
        until(lambda: board.tracker.summary()["lost"] == 1)


def test_what_cannot_be_handled_is_counted_and_the_next_request_is_answered(board, server, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("for the test")

    with monkeypatch.context() as patched:
        patched.setattr("edge_runtime.requests.thread.decode_reply", broken)
        server.say(b"whatever")
        until(lambda: board.tracker.summary()["reply"].get("broken") == 1)
    answer_one_more(board, server)


def test_with_every_request_kept_a_killed_board_loses_none(broker, board_bundle, server, tmp_path):
    """Killed: its threads never see an end. What the disk has, the next run asks again."""
    settings = outbox_in(tmp_path, every_request=True)
    killed = Board(broker.port, board_bundle, outbox=settings)
    killed.client.start()
    killed.tracker._outbox.start()
    killed.tracker._thread.start()
    first = killed.ask()
    assert server.request() == first
    copy = tmp_path / "copy"

    def is_written() -> bool:
        """The disk as a power cut would leave it now."""
        copy.mkdir(exist_ok=True)
        for path in tmp_path.glob("outbox.sqlite*"):
            shutil.copy(path, copy)
        with closing(sqlite3.connect(copy / "outbox.sqlite")) as rows, suppress(sqlite3.OperationalError):
            return bool(rows.execute("SELECT count(*) FROM kept").fetchone() == (1,))
        return False  # its tables are not written yet

    until(is_written)
    killed.client.close()
    with Board(broker.port, board_bundle, outbox=outbox_in(copy)) as board:
        again = server.request()
        assert again.id == first.id
        server.reply(again, text="a dog")
        assert board.next_event().text == "a dog"
    killed.tracker.__exit__()
