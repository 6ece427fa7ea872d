"""The promises of the MQTT client, each against a real broker that is killed, frozen, restarted empty, or says no."""

import ctypes
import logging
import os
import queue
import random
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timezone
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from edge_runtime.mqtt import Message, MqttClient, MqttSettings, Outcome, Publish, State, Timing
from edge_runtime.requests.lifecycle import RequestLifecycle
from edge_runtime.wire import Reply, Status
from firmware_tools.site_broker import PLUGIN, Login, Rights
from testbed.broker import free_port
from tests.brokers import PLAIN, Mosquitto
from tests.listener import until

PATIENCE_S = 60  # for what takes well under a second when nothing is wrong
QUICK = Timing(
    backoff_base=0.02,
    backoff_cap=0.1,
    refused_cap=0.2,
    stable=0.2,
    handshake=1.0,
    degraded=0.3,
    short_session=0.0,  # brokers here die young, and that is no other client's doing
)


class Probe:
    """A client together with everything that it told us."""

    def __init__(
        self, port: int, client_id: str, *, timing: Timing = QUICK, settings: Any = None, **options: Any
    ) -> None:
        self.inbox: queue.Queue[Message] = queue.Queue()
        self.outcomes: queue.Queue[tuple[bytes, Outcome]] = queue.Queue()
        self.states: list[tuple[State, str]] = []
        self.changed = options.pop("changed", None) or threading.Condition()
        options.setdefault("on_message", self.inbox.put)
        settings = MqttSettings("127.0.0.1", port, client_id=client_id, **{"keepalive_s": 1, **(settings or {})})
        self.client = MqttClient(settings, timing=timing, on_state=self.on_state, **options)

    def on_state(self, state: State, reason: str) -> None:
        with self.changed:
            self.states.append((state, reason))
            self.changed.notify_all()

    def wait_state(self, state: State, reason: str = "", since: int = 0) -> None:
        def has_come() -> bool:
            return any(s is state and reason in r for s, r in self.states[since:])

        with self.changed:
            assert self.changed.wait_for(has_come, PATIENCE_S), f"no {state} {reason!r} in {self.states[since:]}"

    def publish(self, topic: str, payload: bytes, **options: Any) -> bool:
        return self.client.publish(
            topic, payload, on_outcome=lambda outcome: self.outcomes.put((payload, outcome)), **options
        )

    def outcome(self) -> tuple[bytes, Outcome]:
        return self.outcomes.get(timeout=PATIENCE_S)

    def received(self) -> bytes:
        return self.inbox.get(timeout=PATIENCE_S).payload


Start = Callable[..., Probe]


@pytest.fixture
def start() -> Iterator[Start]:
    """A function that starts a client; unless told not to, it returns when the client is online."""
    with ExitStack() as stack:

        def starts(port: int, client_id: str, *, online: bool = True, **options: Any) -> Probe:
            probe = Probe(port, client_id, **options)
            stack.callback(probe.client.close, 0.0)
            probe.client.start()
            assert not online or probe.client.wait_online(PATIENCE_S), probe.states
            return probe

        yield starts


@pytest.fixture
def many_open_files() -> Iterator[None]:
    """Every descriptor up to 1023 is taken: select.select fails for those beyond."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], min(2048, limits[1])), limits[1]))
    taken = [os.open(os.devnull, os.O_RDONLY)]
    while taken[-1] < 1024:
        taken.append(os.open(os.devnull, os.O_RDONLY))
    yield
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# ---- a broker that dies, freezes, comes back ----


def test_after_a_broker_was_killed_and_came_back_empty_all_is_as_before(broker: Mosquitto, start: Start) -> None:
    board = start(broker.port, "b1", birth=lambda: [Publish("status/b1", b"online", retain=True)])
    server = start(broker.port, "s1", subscriptions=[("up/#", 1)])
    broker.kill()
    for probe in (board, server):
        probe.wait_state(State.BACKOFF)
    board.publish("up/1", b"asked while nobody was there", expiry_s=60)
    broker.start()
    assert server.client.wait_online(PATIENCE_S)
    board.publish("up/1", b"asked later")
    got = {server.received()}
    if got == {b"asked while nobody was there"}:  # the board may be back before the server has subscribed
        got = {server.received()}
    assert got == {b"asked later"}
    assert {board.outcome() for _ in range(2)} == {
        (b"asked while nobody was there", Outcome.DELIVERED),
        (b"asked later", Outcome.DELIVERED),
    }
    watcher = start(broker.port, "w1", subscriptions=[("status/#", 1)])
    assert watcher.received() == b"online"  # retained by a broker that knew nothing of it before
    assert board.client.stats()["connects"] == 2


def test_what_was_in_flight_is_sent_again_before_anything_newer(broker: Mosquitto, start: Start) -> None:
    board = start(broker.port, "b1", settings={"window": 3})
    broker.freeze()
    for number in range(6):
        board.publish("up/last", b"%d" % number, retain=True)
    board.wait_state(State.DEGRADED)
    assert board.outcomes.empty()
    broker.kill()
    broker.start()
    assert [board.outcome() for _ in range(6)] == [(b"%d" % number, Outcome.DELIVERED) for number in range(6)]
    assert board.client.stats()["connects"] == 2
    watcher = start(broker.port, "w1", subscriptions=[("up/#", 1)])
    assert watcher.received() == b"5"


@pytest.mark.parametrize("files", ["few", "many"])
def test_what_the_broker_has_acknowledged_is_not_sent_again_when_the_client_breaks(
    broker: Mosquitto, start: Start, files: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_runtime.mqtt.connection.PENDING_ACKS_S", PATIENCE_S)
    if files == "many":
        request.getfixturevalue("many_open_files")
    listener = start(broker.port, "s1", subscriptions=[("up/#", 1)], settings={"keepalive_s": 60})
    board = start(broker.port, "b1", settings={"keepalive_s": 60})
    broker.freeze()
    board.publish("up/1", b"in flight")
    board.wait_state(State.DEGRADED)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "mqtt-b1")
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(ZeroDivisionError))
    broker.thaw()
    board.wait_state(State.BACKOFF, "ZeroDivisionError")
    assert board.outcome() == (b"in flight", Outcome.DELIVERED)
    board.publish("up/2", b"newer")
    assert [listener.received() for _ in range(2)] == [b"in flight", b"newer"]


def test_a_broker_that_pauses_makes_the_client_degraded_and_costs_no_connection(
    broker: Mosquitto, start: Start
) -> None:
    board = start(broker.port, "b1", settings={"keepalive_s": 60})
    broker.freeze()
    board.publish("up/1", b"x")
    board.wait_state(State.DEGRADED)
    assert not board.client.wait_online(0)
    broker.thaw()
    assert board.outcome() == (b"x", Outcome.DELIVERED)
    assert board.client.wait_online(PATIENCE_S)
    assert board.client.stats()["losses"] == 0


def test_a_broker_that_is_slow_again_and_again_does_not_fill_the_log(
    broker: Mosquitto, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    board = start(broker.port, "b1", settings={"keepalive_s": 60})
    for _ in range(5):
        since = len(board.states)
        broker.freeze()
        board.publish("up/1", b"x")
        board.wait_state(State.DEGRADED, since=since)
        broker.thaw()
        board.wait_state(State.ONLINE, since=since)
    assert caplog.text.count("mqtt degraded") == 3  # the 1st, 2nd and 4th time
    assert caplog.text.count("mqtt online") == 1 + 3


def test_a_frozen_broker_costs_the_connection_and_never_blocks_the_publisher(broker: Mosquitto, start: Start) -> None:
    board = start(broker.port, "b1", settings={"queue_messages": 10})
    broker.freeze()
    for number in range(1000):
        board.publish("up/1", b"%d" % number)
    board.wait_state(State.BACKOFF)
    board.wait_state(State.BACKOFF, since=len(board.states))  # the kernel still accepts for the frozen process
    assert board.client.stats()["pending"] <= 10 + board.client.settings.window
    broker.thaw()
    outcomes = Counter(board.outcome()[1] for _ in range(1000))
    assert outcomes[Outcome.DELIVERED] >= 10
    assert outcomes == {Outcome.DELIVERED: outcomes[Outcome.DELIVERED], Outcome.DROPPED: outcomes[Outcome.DROPPED]}


def test_attempts_are_spread_over_the_whole_interval_which_doubles_up_to_a_cap(start: Start) -> None:
    class Recorder(random.Random):
        def __init__(self) -> None:
            super().__init__(0)
            self.asked: queue.Queue[tuple[float, float]] = queue.Queue()

        def uniform(self, a: float, b: float) -> float:
            self.asked.put((a, b))
            return 0.0

    rng = Recorder()
    start(free_port(), "b1", online=False, rng=rng, timing=Timing(backoff_base=1.0, backoff_cap=7.0))
    asked = [rng.asked.get(timeout=PATIENCE_S) for _ in range(5)]
    assert asked == [(0, 1.0), (0, 2.0), (0, 4.0), (0, 7.0), (0, 7.0)]


def test_a_connection_that_did_not_last_does_not_shorten_the_next_wait(broker: Mosquitto, start: Start) -> None:
    class Recorder(random.Random):
        bounds: list[float] = []  # noqa: RUF012 - one test, one list

        def uniform(self, a: float, b: float) -> float:
            self.bounds.append(b)
            return 0.01

    timing = Timing(backoff_base=1.0, short_session=0.0)  # stable: 30 s, longer than this test
    board = start(broker.port, "b1", rng=Recorder(0), timing=timing)
    for count in (2, 3):
        since = len(board.states)
        broker.kill()
        board.wait_state(State.BACKOFF, since=since)
        broker.start()
        assert board.client.wait_online(PATIENCE_S)
        assert board.client.stats()["connects"] == count
    assert Recorder.bounds == sorted(Recorder.bounds)
    assert Recorder.bounds[-1] >= 2.0


# ---- the queue: bounds, deadlines, and how each message ends ----


def test_a_full_queue_drops_the_oldest_and_says_so(start: Start) -> None:
    board = start(free_port(), "b1", online=False, settings={"queue_messages": 3})
    for number in range(5):
        board.publish("up/1", b"%d" % number)
    assert [board.outcome() for _ in range(2)] == [(b"0", Outcome.DROPPED), (b"1", Outcome.DROPPED)]
    board.client.close(0.0)
    assert [board.outcome() for _ in range(3)] == [(b"%d" % number, Outcome.CLOSED) for number in (2, 3, 4)]


def test_the_queue_is_bounded_in_bytes_too(start: Start) -> None:
    board = start(free_port(), "b1", online=False, settings={"queue_bytes": 10})
    assert board.publish("up/1", b"a" * 6)
    assert board.publish("up/1", b"b" * 6)
    assert board.outcome() == (b"a" * 6, Outcome.DROPPED)
    assert not board.publish("up/1", b"c" * 11)
    assert board.outcome() == (b"c" * 11, Outcome.OVERSIZED)


def test_a_message_expires_while_it_waits(start: Start) -> None:
    board = start(free_port(), "b1", online=False)
    board.publish("up/1", b"stays", expiry_s=60)
    board.publish("up/1", b"goes", expiry_s=0.05)
    assert board.outcome() == (b"goes", Outcome.EXPIRED)
    assert board.client.stats()["pending"] == 1


def test_the_broker_is_told_what_is_left_of_the_expiry_when_it_is_sent(broker: Mosquitto, start: Start) -> None:
    jump = 0.0
    board = start(broker.port, "b1", clock=lambda: time.monotonic() + jump)
    broker.kill()
    board.wait_state(State.BACKOFF)
    board.publish("up/1", b"x", expiry_s=100, retain=True)
    jump = 60.0
    broker.start()
    assert board.outcome() == (b"x", Outcome.DELIVERED)
    expiry_s = start(broker.port, "s1", subscriptions=[("up/1", 1)]).inbox.get(timeout=PATIENCE_S).expiry_s
    assert expiry_s is not None
    assert 20 < expiry_s <= 40


def test_close_sends_what_waits_and_has_the_will_published(broker: Mosquitto, start: Start) -> None:
    server = start(broker.port, "s1", subscriptions=[("#", 1)])
    board = start(broker.port, "b1", will=Publish("status", b"offline"), settings={"queue_messages": 500})
    for number in range(300):
        board.publish("up/1", b"%d" % number)
    board.client.close(PATIENCE_S)
    assert [server.received() for _ in range(301)] == [*(b"%d" % number for number in range(300)), b"offline"]
    assert board.client.state is State.STOPPED
    assert not board.publish("up/1", b"too late")
    outcomes = dict(board.outcome() for _ in range(301))
    assert outcomes.pop(b"too late") is Outcome.CLOSED
    assert set(outcomes.values()) == {Outcome.DELIVERED}


@pytest.mark.usefixtures("many_open_files")
def test_a_client_with_a_high_descriptor_says_goodbye(
    broker: Mosquitto, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    board = start(broker.port, "b1")
    board.publish("up/1", b"x")
    board.client.close(PATIENCE_S)
    assert board.outcome() == (b"x", Outcome.DELIVERED)
    assert "mqtt client broke" not in caplog.text
    until(lambda: "Client b1 disconnected." in broker.said())  # and not "closed its connection"


def test_every_publish_ends_exactly_once_whatever_happens_to_the_broker(broker: Mosquitto, start: Start) -> None:
    rng = random.Random(7)
    board = start(broker.port, "b1", settings={"queue_messages": 20})
    for number in range(400):
        board.publish("up/1", b"%d" % number, qos=rng.choice([0, 1]), expiry_s=rng.choice([None, 0.02, 5.0]))
        if number % 100 == 50:
            rng.choice([broker.kill, broker.freeze])()
            board.wait_state(State.BACKOFF, since=len(board.states))
            broker.kill()
            broker.start()
    board.client.close()
    ended = Counter(board.outcome()[0] for _ in range(400))
    assert ended == {b"%d" % number: 1 for number in range(400)}
    assert board.outcomes.empty()
    stats = board.client.stats()
    assert (stats["published"], stats["pending"]) == (400, 0)


# ---- subscriptions that change ----


def test_subscriptions_change_while_online_and_last_over_the_next_connection(broker: Mosquitto, start: Start) -> None:
    server = start(broker.port, "s1", subscriptions=[("a", 1), ("b", 1)])
    board = start(broker.port, "b1")
    server.client.set_subscriptions([("b", 1), ("c", 1)])
    while server.inbox.empty():  # the broker handles the SUBSCRIBE when it likes
        board.publish("c", b"new")
        assert board.outcome() == (b"new", Outcome.DELIVERED)
    broker.kill()
    broker.start()
    assert all(probe.client.wait_online(PATIENCE_S) for probe in (server, board))
    while (got := server.received()) != b"end":  # "a" and everything before it came in order
        assert got != b"removed"
        for topic, payload in (("a", b"removed"), ("b", b"kept"), ("b", b"end")):
            board.publish(topic, payload)
            board.outcome()
    assert server.client.stats()["connects"] == 2


def test_a_member_that_unsubscribes_from_a_share_gets_no_more_of_it_and_keeps_its_connection(
    broker: Mosquitto, start: Start
) -> None:
    share = [("$share/pool/up", 1)]
    leaves, stays = (start(broker.port, name, subscriptions=[*share, ("ping", 1)]) for name in ("s1", "s2"))
    leaves.client.set_subscriptions([("ping", 1)])
    board = start(broker.port, "b1")
    # The broker answers in order: what comes on a subscription made later shows that it has handled the UNSUBSCRIBE.
    leaves.client.set_subscriptions([("ping", 1), ("left", 1)])
    while leaves.inbox.empty():
        board.publish("left", b"")
        board.outcome()
    while not leaves.inbox.empty():
        leaves.received()
    for number in range(10):
        board.publish("up", b"%d" % number)
    assert [stays.received() for _ in range(10)] == [b"%d" % number for number in range(10)]
    leaves.client.set_subscriptions([("ping", 1), *share])
    while b"back" not in [message.payload for message in list(leaves.inbox.queue)]:
        board.publish("up", b"back")
        board.outcome()
    assert leaves.client.stats()["connects"] == 1


def test_a_subscription_that_is_refused_while_online_takes_the_client_offline(start: Start, tmp_path: Path) -> None:
    (tmp_path / "s1").write_text("s1")
    credentials = {"username": "s1", "password_file": str(tmp_path / "s1")}
    rights = {
        "defaultACLAccess": dict.fromkeys(("publishClientSend", "publishClientReceive", "subscribe"), False),
        "clients": [msgspec.structs.asdict(Login.of("s1", "s1")) | {"roles": [{"rolename": "s1"}]}],
        "roles": [{"rolename": "s1", "acls": Rights((), ("allowed/1", "allowed/2")).acls()}],
    }
    (tmp_path / "rights.json").write_bytes(msgspec.json.encode(rights))
    plugin = f"plugin {PLUGIN}\nplugin_opt_config_file {tmp_path}/rights.json\n"
    with Mosquitto(tmp_path, PLAIN.replace("allow_anonymous true", "allow_anonymous false") + plugin) as broker:
        server = start(broker.port, "s1", subscriptions=[("allowed/1", 1)], settings=credentials)
        server.client.set_subscriptions([("allowed/1", 1), ("forbidden", 1)])
        server.wait_state(State.BACKOFF, "refused to subscribe forbidden")
        server.client.set_subscriptions([("allowed/2", 1)])
        assert server.client.wait_online(PATIENCE_S)


# ---- callbacks that raise ----


def test_callbacks_that_raise_are_counted_and_the_client_goes_on(broker: Mosquitto, start: Start) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("a bug in somebody's callback")

    inbox: queue.Queue[bytes] = queue.Queue()

    def on_message(message: Message) -> None:
        inbox.put(message.payload)
        raise RuntimeError("a bug in somebody's callback")

    board = start(broker.port, "b1", subscriptions=[("echo", 1)], on_message=on_message, birth=broken)
    for number in range(3):
        board.client.publish("echo", b"%d" % number, on_outcome=broken)
        assert inbox.get(timeout=PATIENCE_S) == b"%d" % number
    board.client.close()
    assert board.client.stats()["callback_errors"] == 1 + 3 + 3
    assert board.client.stats()["connects"] == 1


def test_a_message_whose_callback_raised_is_acknowledged(broker: Mosquitto, start: Start) -> None:
    inbox: queue.Queue[bytes] = queue.Queue()

    def on_message(message: Message) -> None:
        inbox.put(message.payload)
        raise RuntimeError("cannot read this one")

    start(
        broker.port,
        "s1",
        subscriptions=[("up", 1)],
        on_message=on_message,
        manual_ack=True,
        settings={"receive_maximum": 1},
    )
    board = start(broker.port, "b1")
    for number in range(3):
        board.publish("up", b"%d" % number)
        assert inbox.get(timeout=PATIENCE_S) == b"%d" % number  # 1 and 2 come only after 0 was acknowledged


def test_messages_come_only_as_fast_as_they_are_acknowledged(broker: Mosquitto, start: Start) -> None:
    server = start(broker.port, "s1", subscriptions=[("up", 1)], manual_ack=True, settings={"receive_maximum": 2})
    board = start(broker.port, "b1")
    for number in range(6):
        board.publish("up", b"%d" % number)
    assert [board.outcome()[1] for _ in range(6)] == [Outcome.DELIVERED] * 6
    held = [server.inbox.get(timeout=PATIENCE_S) for _ in range(2)]
    assert server.inbox.empty()
    held[0].ack()
    held[0].ack()  # a second time says nothing about another message
    held[1].ack()
    rest = [server.inbox.get(timeout=PATIENCE_S) for _ in range(2)]
    assert [message.payload for message in (*held, *rest)] == [b"0", b"1", b"2", b"3"]


def test_a_callback_may_publish_and_close(broker: Mosquitto, start: Start) -> None:
    board: Probe

    def on_message(message: Message) -> None:
        if message.payload == b"stop":
            board.client.close()
        else:
            board.client.publish("echo", b"stop")

    board = start(broker.port, "b1", subscriptions=[("echo", 1)], on_message=on_message)
    board.client.publish("echo", b"go")
    board.wait_state(State.STOPPED)


# ---- a broker that says no ----


def test_a_publish_that_the_access_list_forbids_is_refused_once(
    start_broker: Callable[..., Mosquitto], start: Start, tmp_path: Path
) -> None:
    (tmp_path / "acl").write_text("topic readwrite allowed/#\n")
    broker = start_broker(PLAIN + "acl_file {folder}/acl\n")
    board = start(broker.port, "b1")
    board.publish("forbidden", b"x")
    board.publish("allowed/1", b"y")
    assert [board.outcome(), board.outcome()] == [(b"x", Outcome.REFUSED), (b"y", Outcome.DELIVERED)]
    assert board.client.stats()["losses"] == 0


def test_a_message_larger_than_the_broker_takes_is_never_sent_and_the_log_says_so(
    start_broker: Callable[..., Mosquitto], start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    broker = start_broker(PLAIN + "max_packet_size 1000\n")
    board = start(broker.port, "b1")
    board.publish("up/1", b"x" * 1000)
    board.publish("up/1", b"y" * 900)
    assert [board.outcome()[1], board.outcome()[1]] == [Outcome.OVERSIZED, Outcome.DELIVERED]
    assert board.client.stats()["losses"] == 0
    assert "mqtt publish too large client=b1 topic=up/1 bytes=1000 most=1000" in caplog.text


def test_a_message_of_10_mb_is_kept_from_a_client_by_the_broker(broker: Mosquitto, start: Start) -> None:
    user = start(broker.port, "user", subscriptions=[("up/#", 1)])
    attacker = start(broker.port, "b1", settings={"max_publish_bytes": 10_000_000, "queue_bytes": 10_000_000})
    attacker.publish("up/1", b"x" * 10_000_000)
    attacker.publish("up/1", b"y")
    assert user.received() == b"y"
    assert user.client.stats()["inbound_oversized"] == 0


def test_a_message_that_costs_every_connection_is_given_up_and_the_others_are_delivered(
    start_broker: Callable[..., Mosquitto], start: Start
) -> None:
    broker = start_broker(PLAIN + "retain_available false\n")  # mosquitto disconnects who publishes retained
    board = start(broker.port, "b1")
    for number in range(6):
        board.publish("up/1", b"%d" % number, retain=number == 2)
    outcomes = dict(board.outcome() for _ in range(6))
    assert outcomes == {b"%d" % n: Outcome.REFUSED if n == 2 else Outcome.DELIVERED for n in range(6)}
    assert board.client.stats()["losses"] == 3


def test_two_clients_with_one_id_raise_an_alarm_and_stop_fighting(broker: Mosquitto, start: Start) -> None:
    timing = Timing(backoff_base=0.02, backoff_cap=0.1, short_session=10.0, duplicate_id=(60.0, 61.0))
    changed = threading.Condition()
    pair = [start(broker.port, "b1", online=False, timing=timing, changed=changed) for _ in range(2)]
    with changed:
        assert changed.wait_for(
            lambda: any("another client" in reason for p in pair for _, reason in p.states), PATIENCE_S
        )
    assert sum(probe.client.stats()["connects"] for probe in pair) <= 6
    assert sum(probe.client.stats()["evictions"] for probe in pair) >= 3
    winner = next(probe for probe in pair if "another client" not in probe.client.reason)
    assert winner.client.wait_online(PATIENCE_S)


def test_a_wrong_password_is_told_once_and_tried_until_it_is_right(
    start_broker: Callable[..., Mosquitto], start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    users, secret = tmp_path / "users", tmp_path / "secret"
    users.touch(mode=0o600)
    subprocess.run(["mosquitto_passwd", "-b", str(users), "b1", "right-password"], check=True, capture_output=True)
    secret.write_text("wrong-password\n")
    broker = start_broker("listener {port} 127.0.0.1\nallow_anonymous false\npassword_file {folder}/users\n")
    with caplog.at_level(logging.DEBUG):
        board = start(broker.port, "b1", online=False, settings={"username": "b1", "password_file": str(secret)})
        for count in range(3):
            board.wait_state(State.BACKOFF, "refused the login", since=3 * count)
        secret.write_text("right-password\n")
        assert board.client.wait_online(PATIENCE_S)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "refused the login" in warnings[0]
    assert f"check username = b1 with the first line of {secret}" in warnings[0]
    assert "wrong-password" not in caplog.text
    assert "right-password" not in caplog.text


# ---- TLS and settings ----


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that is its own authority, and another authority."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("server", "foreign"):
        make = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ]
        files = ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.crt")]
        names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([*make, *files, *names], check=True, capture_output=True)
    return folder


# paho leaves a socket whose handshake failed to the garbage collector, which closes it at once but complains.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tls_needs_the_right_authority(
    start_broker: Callable[..., Mosquitto], start: Start, certificates: Path
) -> None:
    files = f"certfile {certificates}/server.crt\nkeyfile {certificates}/server.key\n"
    broker = start_broker(PLAIN + files)
    board = start(broker.port, "b1", subscriptions=[("echo", 1)], settings={"ca_file": f"{certificates}/server.crt"})
    for number in range(20):
        board.publish("echo", b"%d" % number)
    assert [board.received() for _ in range(20)] == [b"%d" % number for number in range(20)]
    stranger = start(broker.port, "b2", online=False, settings={"ca_file": f"{certificates}/foreign.crt"})
    stranger.wait_state(State.BACKOFF, "CERTIFICATE_VERIFY_FAILED")
    assert stranger.client.stats()["connects"] == 0


# paho leaves a socket whose handshake failed to the garbage collector, which closes it at once but complains.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("year", [2000, 2100])
def test_a_certificate_of_another_time_asks_for_the_clock(
    start_broker: Callable[..., Mosquitto], start: Start, tmp_path: Path, year: int
) -> None:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string("CN=127.0.0.1")
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(datetime(year, 1, 1)).not_valid_after(datetime(year, 2, 1))
    names = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    certificate = made.add_extension(names, critical=False).sign(key, hashes.SHA256())
    (tmp_path / "crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    (tmp_path / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    broker = start_broker(PLAIN + f"certfile {tmp_path}/crt\nkeyfile {tmp_path}/key\n")
    board = start(broker.port, "b1", online=False, settings={"ca_file": f"{tmp_path}/crt"})
    board.wait_state(State.BACKOFF, f"is the clock of this machine right? It says {datetime.now(timezone.utc):%Y-}")


def test_a_plain_client_at_a_tls_port_is_told_so(
    start_broker: Callable[..., Mosquitto], start: Start, certificates: Path
) -> None:
    broker = start_broker(PLAIN + f"certfile {certificates}/server.crt\nkeyfile {certificates}/server.key\n")
    board = start(broker.port, "b1", online=False)
    board.wait_state(State.BACKOFF, "closed before CONNACK: is this a TLS port (8883)? then set ca_file, or tls; does")


def test_a_tls_client_without_the_certificate_that_the_broker_wants_is_told_so(
    start_broker: Callable[..., Mosquitto], start: Start, certificates: Path
) -> None:
    files = f"certfile {certificates}/server.crt\nkeyfile {certificates}/server.key\ncafile {certificates}/server.crt\n"
    broker = start_broker(PLAIN + files + "require_certificate true\n")
    board = start(broker.port, "b1", online=False, settings={"ca_file": f"{certificates}/server.crt"})
    board.wait_state(State.BACKOFF, "closed before CONNACK: does it want a client certificate?")


# paho leaves a socket whose handshake failed to the garbage collector, which closes it at once but complains.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_tls_client_at_a_plain_port_is_told_so(broker: Mosquitto, start: Start, certificates: Path) -> None:
    board = start(broker.port, "b1", online=False, settings={"ca_file": f"{certificates}/server.crt"})
    board.wait_state(State.BACKOFF, "does this port speak TLS?")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"host": "broker.example"}, "TLS is off"),
        ({"host": "192.0.2.1"}, "TLS is off"),
        ({"port": 0}, "1 to 65535"),
        ({"host": ""}, 'host = "", want'),
        ({"client_id": "b 1"}, "client id"),
        ({"window": 0}, "window = 0"),
        ({"password_file": "/nowhere", "username": "b1"}, "cannot be read"),
        ({"ca_file": "/nowhere"}, "cannot be read"),
        ({"cert_file": "/nowhere"}, "needs both"),
    ],
)
def test_settings_that_can_never_work_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(match=complaint):
        MqttSettings(**{"host": "127.0.0.1", "port": 1883, "client_id": "b1", **settings})


def test_plain_text_to_another_machine_is_possible_on_demand() -> None:
    assert not MqttSettings("192.0.2.1", 1883, client_id="b1", insecure=True).uses_tls
    assert MqttSettings("192.0.2.1", 8883, client_id="b1", tls=True).uses_tls


@pytest.mark.parametrize("topic", ["", "up/+", "up/#", "up\0", "x" * 65536])
def test_a_topic_that_nobody_may_publish_to_is_an_error_at_once(topic: str) -> None:
    client = MqttClient(MqttSettings("127.0.0.1", 1883, client_id="b1"))
    with pytest.raises(ValueError, match="cannot publish"):
        client.publish(topic, b"")
    client.close()


# ---- requests and replies: a worker that dies with its share ----

WORKER = """
import sys
from edge_runtime.mqtt import MqttClient, MqttSettings
from server.reply_cache import ReplyCache, Seen

port, name, must_hold = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
cache, held, computed = ReplyCache(), [], 0

def on_message(message):
    global computed
    if must_hold:
        held.append(message)  # taken, never acknowledged
        if len(held) == must_hold:
            print("holding", flush=True)
        return
    request_id = message.payload
    reply = cache.begin(("b1", request_id))
    if reply is Seen.NEW:
        computed += 1
        reply = request_id + b" %d" % computed
        cache.put(("b1", request_id), reply)
    client.publish("b1/down/reply", reply)
    message.ack()

settings = MqttSettings("127.0.0.1", port, client_id=name, receive_maximum=20)
subscriptions = [("$share/pool/+/up/request", 1)]
with MqttClient(settings, subscriptions=subscriptions, on_message=on_message, manual_ack=True) as client:
    client.wait_online()
    print("online", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start_worker(broker: Mosquitto) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    with ExitStack() as stack:

        def starts(name: str, must_hold: int = 0) -> "subprocess.Popen[bytes]":
            command = [sys.executable, "-c", WORKER, str(broker.port), name, str(must_hold)]
            worker = stack.enter_context(
                subprocess.Popen(command, cwd=Path(__file__).parents[3], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            stack.callback(worker.kill)
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"online\n"
            return worker

        yield starts


def test_requests_that_a_killed_worker_held_are_answered_by_another(
    broker: Mosquitto, start: Start, start_worker: Any
) -> None:
    first = start_worker("s1", must_hold=20)
    board = start(broker.port, "b1", subscriptions=[("b1/down/reply", 1)], settings={"window": 20, "keepalive_s": 10})
    requests: RequestLifecycle[bytes] = RequestLifecycle(64, min_resend_s=0.3, rng=random.Random(1))
    ids = [b"request %02d" % number for number in range(20)]
    for request_id in ids:
        requests.on_request(request_id, request_id, time.monotonic() + PATIENCE_S, time.monotonic())
        board.client.publish("b1/up/request", request_id)
    assert first.stdout.readline() == b"holding\n"
    first.kill()
    first.wait()
    start_worker("s2")
    replies: dict[bytes, bytes] = {}
    while requests.counts.open:
        now = time.monotonic()
        for again in requests.on_time(now):
            board.client.publish("b1/up/request", again.content)  # type: ignore[union-attr]
        try:
            reply = board.inbox.get(timeout=max(0.0, min(requests.next_at() - now, 0.1))).payload
        except queue.Empty:
            continue
        request_id = reply[:10]
        if requests.on_reply(Reply(id=request_id, status=Status.OK), time.monotonic()):
            replies[request_id] = reply
    counts = requests.counts
    assert (counts.accepted, counts.answered, counts.lost) == (20, 20, 0)
    assert counts.resent >= 20  # none came by itself: the broker gives a dead member's messages to nobody
    board.client.publish("b1/up/request", ids[0])  # as if its reply had been lost
    while (again := board.received())[:10] != ids[0]:
        pass  # replies to other copies may still be on their way
    assert again == replies[ids[0]]  # from the cache: the same bytes, computed once
    assert len({reply.split()[-1] for reply in replies.values()}) == 20
