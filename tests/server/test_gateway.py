"""The server's side of MQTT against a real broker, and what its probes tell."""

import json
import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.mqtt import Message, MqttClient, MqttSettings
from edge_runtime.wire import topics
from server.gateway import PROBE_EXPIRY_S, RETURNED_IN_A_ROW, Arrival, Gateway, Probes
from tests.brokers import PLAIN, Mosquitto
from tests.listener import PATIENCE_S, Listener, until

# ---- what probes tell ----


def test_one_returned_probe_proves_a_new_connection() -> None:
    probes = Probes()
    payload = probes.send(b"8 bytes.", 0.0)
    assert not probes.is_proven
    probes.returned(payload)
    assert probes.is_proven
    assert probes.expire(100.0) == 0


def test_a_missing_probe_ends_the_proof_until_many_have_come_back_in_a_row() -> None:
    probes = Probes()
    probes.returned(probes.send(b"first...", 0.0))
    probes.send(b"missing.", 1.0)
    assert probes.expire(1.0 + PROBE_EXPIRY_S) == 1
    for number in range(RETURNED_IN_A_ROW):
        assert not probes.is_proven
        probes.returned(probes.send(number.to_bytes(8, "big"), 20.0))
    assert probes.is_proven
    assert (probes.sent, probes.missing) == (2 + RETURNED_IN_A_ROW, 1)


def test_a_probe_counts_once_and_a_foreign_message_never() -> None:
    probes = Probes()
    probes.send(b"8 bytes.", 0.0)
    probes.returned(b"probe another.")
    probes.returned(b"")
    assert not probes.is_proven
    assert probes.expire(PROBE_EXPIRY_S) == 1
    probes.returned(b"probe 8 bytes.")  # too late
    assert probes.expire(2 * PROBE_EXPIRY_S) == 0


def test_probes_of_a_lost_connection_are_not_missing() -> None:
    probes = Probes()
    probes.send(b"8 bytes.", 0.0)
    probes.reset()
    assert probes.expire(100.0) == 0


@given(st.lists(st.booleans(), max_size=50))
def test_the_share_is_proven_exactly_while_nothing_was_missing_lately(came_back: list[bool]) -> None:
    probes = Probes()
    for number, is_back in enumerate(came_back):
        payload = probes.send(number.to_bytes(8, "big"), 100.0 * number)
        if is_back:
            probes.returned(payload)
        probes.expire(100.0 * number + PROBE_EXPIRY_S)
    calm = came_back[-RETURNED_IN_A_ROW:] if False in came_back else came_back[-1:]
    enough = RETURNED_IN_A_ROW if False in came_back else 1
    assert probes.is_proven == (len(calm) == enough and all(calm))
    assert probes.missing == came_back.count(False)


# ---- over a broker ----


@dataclass
class Member:
    """A server of the pool that only writes down what arrives."""

    gateway: Gateway
    arrivals: "queue.Queue[Arrival]" = field(default_factory=queue.Queue)


Join = Callable[..., Member]


@pytest.fixture
def join(broker: Mosquitto) -> Iterator[Join]:
    """A function that adds a server to the pool and waits until a probe of it has come back."""
    with ExitStack() as stack:

        def joins(name: str, is_proven: bool = True) -> Member:
            def arrived(arrival: Arrival) -> None:
                member.arrivals.put(arrival)
                arrival.acknowledge()

            settings = MqttSettings("127.0.0.1", broker.port, client_id=name)
            member = Member(Gateway(settings, "home", name, "servers", arrived, dict))
            stack.enter_context(member.gateway)
            assert not is_proven or member.gateway.is_proven.wait(PATIENCE_S)
            return member

        yield joins


def status_of(listener: Listener, **wanted: Any) -> dict[str, Any]:
    """The next status that has these fields."""
    while True:
        status: dict[str, Any] = json.loads(listener.next())
        if wanted.items() <= status.items():
            return status


def test_a_server_is_proven_when_its_own_probe_comes_back_and_a_probe_is_no_request(join: Join) -> None:
    member = join("s1")
    assert member.gateway.heartbeat()
    assert member.arrivals.empty()


def test_a_probe_is_sent_back_to_whoever_sent_it_and_what_only_looks_like_one_is_not(
    broker: Mosquitto, join: Join
) -> None:
    join("s1")
    with Listener(broker.port, topics.reply("home", "b1")) as board:
        for payload in (b"probe but much longer than one", b"probe 8 bytes."):
            board.client.publish(topics.request("home", "b1"), payload)
        assert board.next() == b"probe 8 bytes."


def test_replies_that_the_broker_refuses_are_counted_and_do_not_fill_the_log(
    start_broker: Callable[..., Mosquitto], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "acl").write_text("topic readwrite aiflow/home/s1/#\ntopic read aiflow/home/+/up/request\n")
    broker = start_broker(f"{PLAIN}acl_file {tmp_path / 'acl'}\n")
    settings, replies = MqttSettings("127.0.0.1", broker.port, client_id="s1"), 40
    with Gateway(settings, "home", "s1", "servers", lambda _: None, dict) as gateway:
        assert gateway.client.wait_online(PATIENCE_S)
        for _ in range(replies):
            gateway._reply(topics.reply("home", "b1"), b"reply", 60.0)
        until(lambda: gateway.counts["undelivered"] == replies)
    assert caplog.text.count("reply not delivered") == 6  # the 1st, 2nd, 4th, 8th, 16th, 32nd


def test_in_a_pool_no_probe_is_missing(join: Join) -> None:
    members = [join(f"s{number}") for number in range(3)]
    for _ in range(10):
        for member in members:
            member.gateway.heartbeat()
    for member in members:
        until(lambda gateway=member.gateway: not gateway._probes._open)  # type: ignore[misc]
        assert member.gateway.summary()["probes"]["missing"] == 0
        assert member.gateway.is_proven.is_set()


@pytest.fixture
def quick_expiry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.gateway.PROBE_EXPIRY_S", 1.0)  # the broker's smallest


def test_a_black_hole_in_the_share_shows_in_counters_log_and_status(
    broker: Mosquitto, join: Join, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    member = join("s1")
    request.getfixturevalue("quick_expiry")  # not before: nobody repeats the one probe of a new connection
    with Listener(broker.port, topics.server_status("home", "s1")) as person:
        status_of(person, share_proven=True)  # so that the next one without is of the black hole
        swallowed = list[Message]()
        settings = MqttSettings("127.0.0.1", broker.port, client_id="black-hole")
        share = topics.request_share("servers", "home")
        with MqttClient(settings, subscriptions=[(share, 1)], on_message=swallowed.append) as hole:
            assert hole.wait_online(PATIENCE_S)
            for _ in range(4):
                member.gateway.heartbeat()
            until(lambda: len(swallowed) >= 2)
            until(lambda: member.gateway.heartbeat() is False)
            status = status_of(person, share_proven=False)
            assert status["probes"]["missing"] >= 1
            assert member.gateway.summary()["probes"]["missing"] >= 1
            assert not member.gateway.is_proven.is_set()
        until(lambda: member.gateway.heartbeat() is True)  # the black hole has gone
        assert status_of(person, share_proven=True)
    assert sum("did not come back" in record.message for record in caplog.records) == 1


def test_a_suspended_server_says_why_and_gets_no_requests_until_it_resumes(broker: Mosquitto, join: Join) -> None:
    tired, fresh = join("s1"), join("s2")
    with Listener(broker.port, topics.server_status("home", "s1")) as board:
        assert status_of(board, accepting=True)["why"] == ""
        tired.gateway.suspend("the engine has not answered for 30 s")
        tired.gateway.suspend("the engine has not answered for 30 s")
        assert status_of(board, accepting=False)["why"] == "the engine has not answered for 30 s"
        until(lambda: in_share(board, fresh, tired, 8) == (8, 0))
        assert tired.gateway.heartbeat()
        assert tired.gateway.summary()["probes"]["missing"] == 0
        tired.gateway.resume()
        tired.gateway.resume()
        status_of(board, accepting=True)
        assert tired.gateway.is_proven.wait(PATIENCE_S)
        until(lambda: in_share(board, fresh, tired, 8) == (4, 4))


def in_share(board: Listener, one: Member, other: Member, count: int) -> tuple[int, int]:
    """How many of so many requests reach one server, and how many the other."""
    for number in range(count):
        board.client.publish(topics.request("home", "b1"), b"request %d" % number)
    until(lambda: one.arrivals.qsize() + other.arrivals.qsize() == count)
    shares = one.arrivals.qsize(), other.arrivals.qsize()
    for member in (one, other):
        while not member.arrivals.empty():
            member.arrivals.get()
    return shares


def test_a_server_that_was_suspended_stays_so_over_a_lost_connection(broker: Mosquitto, join: Join) -> None:
    member = join("s1")
    member.gateway.suspend("too hot")
    broker.kill()
    broker.start()
    with Listener(broker.port, topics.server_status("home", "s1")) as board:
        assert status_of(board, state="online", accepting=False)["why"] == "too hot"
        board.client.publish(topics.request("home", "b1"), b"request")
        until(lambda: board.client.stats()["delivered"] == 1)
        member.gateway.resume()
        assert member.gateway.is_proven.wait(PATIENCE_S)
        board.client.publish(topics.request("home", "b1"), b"later request")
        assert member.arrivals.get(timeout=PATIENCE_S).payload == b"later request"


def test_a_retained_request_is_counted_and_not_answered(broker: Mosquitto, join: Join) -> None:
    with Listener(broker.port) as board:
        board.client.publish(topics.request("home", "b1"), b"of yesterday", retain=True)
        until(lambda: board.client.stats()["delivered"] == 1)
        member = join("s1")
        # Brokers that follow MQTT 5.0, 3.3.1.3, keep it from a share, so here it comes without them, too.
        before = member.gateway.summary()["retained_requests"]
        acknowledged = Event()
        topic = topics.request("home", "b1")
        member.gateway._receive(Message(topic, b"of yesterday", 1, True, None, acknowledged.set))
        assert member.gateway.summary()["retained_requests"] == before + 1
        assert acknowledged.is_set()
        board.client.publish(topic, b"of today")
        assert member.arrivals.get(timeout=PATIENCE_S).payload == b"of today"
