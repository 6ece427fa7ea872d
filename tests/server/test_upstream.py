"""The connection to the tier above on a real broker; a test plays that tier, so that it can lie."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import msgspec
import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.mqtt import MqttClient, MqttConfig, MqttSettings
from edge_runtime.wire import (
    ContentKind,
    EnvelopeError,
    Paradigm,
    Reply,
    Request,
    Status,
    Tier,
    decode_request,
    encode_reply,
    encode_request,
    encode_tokens,
    topics,
)
from edge_runtime.wire.envelope import MAX_ENVELOPE, MAX_VIA
from server.config import UpstreamConfig
from server.escalation import obstacle_to
from server.upstream import Upstream
from tests.brokers import PLAIN, Mosquitto
from tests.listener import until

PATIENCE_S = 60  # for what must come; a test that waits so long has failed
REQUEST = Request(
    id=bytes(8),
    bundle=bytes(8),
    paradigm=Paradigm.SPECULATIVE,
    age_ms=100,
    budget_ms=0,
    content_kind=ContentKind.LATENT,
    content=b"bits",
)


@dataclass
class Above:
    """The tier above, played by the test."""

    client: MqttClient
    requests: "queue.Queue[Request]" = field(default_factory=queue.Queue)

    def request(self) -> Request:
        return self.requests.get(timeout=PATIENCE_S)

    def say(self, payload: bytes | Reply) -> None:
        data = payload if isinstance(payload, bytes) else encode_reply(payload)
        self.client.publish(topics.reply("hq", "e1"), data)


@dataclass
class Below:
    """Whoever asked: what it is told, in order."""

    told: "queue.Queue[tuple[Reply | None, str]]" = field(default_factory=queue.Queue)

    def tell(self, reply: Reply | None, why: str) -> None:
        self.told.put((reply, why))

    def next(self) -> tuple[Reply | None, str]:
        return self.told.get(timeout=PATIENCE_S)


def ok(request: Request, *tokens: int, **changes: object) -> Reply:
    reply = Reply(id=request.id, status=Status.OK, tokens=encode_tokens(tokens), tier=Tier.CLOUD, server="c1")
    return msgspec.structs.replace(reply, **changes)


def config(broker: Mosquitto, **changes: object) -> UpstreamConfig:
    return UpstreamConfig(MqttConfig(port=broker.port), site="hq", **changes)


@pytest.fixture
def above(broker: Mosquitto) -> Iterator[Above]:
    settings = MqttSettings("127.0.0.1", broker.port, client_id="c1")
    subscriptions = [(topics.request("hq", "e1"), 1)]
    client = MqttClient(
        settings,
        subscriptions=subscriptions,
        on_message=lambda message: above.requests.put(decode_request(message.payload)),
    )
    above = Above(client)
    with client:
        assert client.wait_online(PATIENCE_S)
        yield above


@pytest.fixture
def connect(broker: Mosquitto) -> Iterator[Callable[..., Upstream]]:
    """A function that starts an Upstream and waits for its broker; all end with the test."""
    with ExitStack() as stack:

        def start(**changes: object) -> Upstream:
            upstream = stack.enter_context(Upstream(config(broker, **changes), "e1"))
            assert upstream.wait_online(PATIENCE_S)
            return upstream

        yield start


def ask(upstream: Upstream, below: Below, budget_s: float = 30.0) -> None:
    upstream.ask(REQUEST, time.monotonic() + budget_s, below.tell)


def test_a_request_goes_up_under_an_id_of_our_own_and_its_reply_ends_it(connect, above) -> None:
    upstream, below = connect(), Below()
    ask(upstream, below)
    asked = above.request()
    assert asked.id != REQUEST.id
    assert (asked.content, asked.age_ms >= 100, 0 < asked.budget_ms <= 30_000) == (b"bits", True, True)
    above.say(ok(asked, 7))
    reply, why = below.next()
    assert (reply.token_ids, reply.server, why) == ([7], "c1", "")
    status = msgspec.json.decode(msgspec.json.encode(upstream.status()))
    assert status["state"] == "online"
    assert (status["requests"]["accepted"], status["requests"]["answered"], status["requests"]["open"]) == (1, 1, 0)
    assert 0 < status["round_trip_ms"]["p50"] <= status["round_trip_ms"]["p95"]
    assert 0 < upstream.above(time.monotonic()).round_trip_s < 30


def test_what_was_measured_long_ago_counts_no_more(connect, above) -> None:
    upstream, below = connect(), Below()
    ask(upstream, below)
    above.say(ok(above.request()))
    below.next()
    assert upstream.above(time.monotonic()).round_trip_s > 0
    assert upstream.above(time.monotonic() + 3600).round_trip_s == 0


def test_a_lost_request_goes_up_again_with_its_id_and_less_time(connect, above) -> None:
    upstream, below = connect(resend_ms=50), Below()
    ask(upstream, below)
    first, second = above.request(), above.request()
    assert first.id == second.id
    assert (second.age_ms > first.age_ms, second.budget_ms < first.budget_ms) == (True, True)
    above.say(ok(second))
    assert below.next()[1] == ""
    assert upstream.above(time.monotonic()).round_trip_s == 0  # nobody knows which copy was answered


def test_a_busy_tier_is_asked_again_unless_that_would_be_too_late(connect, above) -> None:
    upstream, below = connect(), Below()
    ask(upstream, below)
    asked = above.request()
    above.say(ok(asked, status=Status.BUSY, retry_after_ms=50))
    assert above.request().id == asked.id
    above.say(ok(asked, status=Status.BUSY, retry_after_ms=60_000))
    assert below.next() == (None, "busy")


@pytest.mark.parametrize("status", [Status.STALE, Status.BAD_REQUEST, Status.FAILED])
def test_a_refusal_ends_a_request_by_name(connect, above, status) -> None:
    upstream, below = connect(), Below()
    ask(upstream, below)
    above.say(ok(above.request(), status=status, error="no"))
    assert below.next() == (None, status.name.lower())


def test_silence_ends_at_the_deadline_and_the_reply_after_it_is_late(connect, above) -> None:
    upstream, below, other = connect(), Below(), Below()
    ask(upstream, below, budget_s=2.0)
    asked = above.request()
    assert below.next() == (None, "no_reply")
    above.say(ok(asked, 7))
    ask(upstream, other)
    while (again := above.request()).id == asked.id:
        pass
    above.say(ok(again, 8))
    assert other.next()[0].token_ids == [8]
    assert below.told.empty()
    assert upstream.status()["requests"]["late"] == 1
    assert obstacle_to(upstream.above(time.monotonic()), 0.2) == "too_late"  # it would be silent again


def test_replies_that_are_none_or_to_nothing_are_counted_and_harmless(connect, above) -> None:
    upstream, below = connect(), Below()
    ask(upstream, below)
    asked = above.request()
    long_name = msgspec.msgpack.encode([1, asked.id, 0, b"", "", 2, "c" * 65])
    label = msgspec.msgpack.encode([1, asked.id, 0, b"", "", 2, "c1", 0, 0, 0, None, [], "", None, "l" * 65])
    tokens = msgspec.msgpack.encode([1, asked.id, 0, b"\xff" * 9])
    for garbage in (b"", b"\xdd\xff\xff\xff\xff", long_name, label, tokens, b"\0" * 60_000):
        above.say(garbage)
    above.say(b"\0" * 100_000)  # more than is read: the broker keeps it
    above.say(ok(msgspec.structs.replace(asked, id=b"\xff" * 8), 9))  # from the future
    above.say(ok(asked, 7))
    above.say(ok(asked, 8))
    ask(upstream, below)
    above.say(ok(above.request(), 6))
    assert [below.next()[0].token_ids for _ in range(2)] == [[7], [6]]
    status = upstream.status()
    assert (status["requests"]["unknown"], status["requests"]["duplicate"], status["replies"]["unreadable"]) == (
        1,
        1,
        6,
    )


def test_a_retained_message_is_no_reply(broker: Mosquitto, above) -> None:
    above.client.publish(topics.reply("hq", "e1"), b"of yesterday", retain=True)
    until(lambda: above.client.stats()["delivered"] == 1)
    with Upstream(config(broker), "e1") as upstream:
        below = Below()
        ask(upstream, below)
        above.say(ok(above.request(), 7))
        assert below.next()[0].token_ids == [7]
        replies = upstream.status()["replies"]
    assert (replies["retained"], replies["ok"], replies.get("unreadable", 0)) == (1, 1, 0)


def test_a_reply_that_is_not_final_is_told_once_and_the_final_one_still_follows(connect, above) -> None:
    upstream, below = connect(), Below()
    ask(upstream, below)
    asked = above.request()
    for tokens in (5, 5, 6):
        above.say(ok(asked, tokens, final=False))
    for i in range(9):
        above.say(ok(asked, 10 + i, final=False))
    above.say(ok(asked, 7))
    told = [below.next()[0] for _ in range(MAX_VIA + 2)]
    assert [(reply.token_ids, reply.final) for reply in told[:2]] == [([5], False), ([6], False)]
    assert (told[-1].token_ids, told[-1].final) == ([7], True)
    assert upstream.status()["replies"]["not_final_again"] == 11 - MAX_VIA


def test_a_full_table_has_no_room_until_one_ends(connect, above) -> None:
    upstream, below = connect(open_requests=1), Below()
    assert upstream.above(time.monotonic()).has_room
    ask(upstream, below)
    assert not upstream.above(time.monotonic()).has_room
    above.say(ok(above.request()))
    below.next()
    assert upstream.above(time.monotonic()).has_room


def test_whoever_raises_costs_the_others_nothing(connect, above) -> None:
    upstream, below = connect(), Below()

    def broken(*_: object) -> None:
        raise RuntimeError("no")

    upstream.ask(REQUEST, time.monotonic() + 30, broken)
    above.say(ok(above.request()))
    ask(upstream, below)
    above.say(ok(above.request(), 7))
    assert below.next()[0].token_ids == [7]
    assert upstream.status()["replies"]["broken"] == 1


def test_stopping_ends_what_is_open(broker: Mosquitto, above) -> None:
    below = Below()
    with Upstream(config(broker), "e1") as upstream:
        assert upstream.wait_online(PATIENCE_S)
        ask(upstream, below)
        above.request()
    assert below.next() == (None, "stopping")


def test_what_the_broker_does_not_take_ends_at_once(start_broker) -> None:
    small = start_broker(PLAIN + "max_packet_size 2000\n")
    below = Below()
    with Upstream(config(small), "e1") as upstream:
        assert upstream.wait_online(PATIENCE_S)
        large = msgspec.structs.replace(REQUEST, content=bytes(5000))
        upstream.ask(large, time.monotonic() + PATIENCE_S, below.tell)
        assert below.next() == (None, "not_taken")


def test_what_no_envelope_holds_is_not_asked(broker: Mosquitto) -> None:
    upstream = Upstream(config(broker), "e1")
    with upstream, pytest.raises(EnvelopeError):
        upstream.ask(msgspec.structs.replace(REQUEST, content=bytes(256 * 1024)), time.monotonic() + 1, partial(print))
    assert upstream.status()["requests"]["accepted"] == 0


def test_what_an_envelope_holds_now_and_not_when_it_is_older_is_not_asked(connect, above) -> None:
    upstream, below = connect(resend_ms=20), Below()
    room = MAX_ENVELOPE - len(encode_request(msgspec.structs.replace(REQUEST, content=bytes(1 << 16)))) + (1 << 16)
    with pytest.raises(EnvelopeError):
        upstream.ask(msgspec.structs.replace(REQUEST, content=bytes(room)), time.monotonic() + 1, below.tell)
    # Its age takes four bytes more at most, its budget too.
    largest = msgspec.structs.replace(REQUEST, age_ms=0xFFFE, content=bytes(room - 8))
    upstream.ask(largest, time.monotonic() + PATIENCE_S, below.tell)
    while above.request().age_ms <= 0xFFFF:
        pass
    above.say(ok(above.request(), 7))
    assert below.next()[0].token_ids == [7]


def test_a_broker_that_is_away_is_offline(broker: Mosquitto) -> None:
    broker.kill()
    with Upstream(config(broker), "e1") as upstream:
        until(lambda: upstream._client.stats()["losses"] > 0)
        assert not upstream.above(time.monotonic()).is_online


def test_while_the_broker_is_away_one_copy_of_a_request_waits_and_its_reply_is_not_measured(
    broker: Mosquitto, above, connect
) -> None:
    upstream, below = connect(resend_ms=20), Below()
    tries = threading.Semaphore(0)
    on_unsent = upstream._lifecycle.on_unsent
    upstream._lifecycle.on_unsent = lambda *said: tries.release() or on_unsent(*said)
    broker.stop()
    ask(upstream, below, PATIENCE_S)
    for _ in range(3):
        assert tries.acquire(timeout=PATIENCE_S)
    assert upstream._client.stats()["pending"] == 1
    assert upstream.status()["requests"]["resent"] == 0
    broker.start()
    above.say(ok(above.request(), 7))
    assert below.next()[0].token_ids == [7]
    assert upstream.above(time.monotonic()).round_trip_s == 0  # most of it was the time without a broker


def test_while_several_copies_wait_for_the_broker_the_end_of_one_lets_no_further_one_out(
    broker: Mosquitto, above, connect
) -> None:
    upstream, below, held_back = connect(resend_ms=20, open_requests=1), Below(), []  # its queue holds two messages
    on_unsent = upstream._lifecycle.on_unsent
    upstream._lifecycle.on_unsent = lambda *said: held_back.append(said) or on_unsent(*said)
    broker.stop()
    ask(upstream, below, PATIENCE_S)
    until(lambda: upstream._client.stats()["published"] == 1)
    (request_id,) = upstream._lifecycle._live
    for copies in (2, 3):  # a reply that was on its way when the broker went asks for one more
        upstream._thread.reply_arrived(encode_reply(Reply(id=request_id, status=Status.BUSY, retry_after_ms=0)))
        until(lambda copies=copies: upstream._client.stats()["published"] == copies)
    until(lambda: upstream._client.stats()["dropped"] == 1)
    tried = len(held_back)
    until(lambda: len(held_back) >= tried + 3)
    assert upstream._client.stats()["published"] == 3
    broker.start()
    above.say(ok(above.request(), 7))
    assert below.next()[0].token_ids == [7]


def test_a_connection_that_could_never_be_made_is_named() -> None:
    with pytest.raises(ConfigError, match="TLS is off"):
        Upstream(UpstreamConfig(MqttConfig(host="broker.example")), "e1")
