"""The embedded broker, in both its kinds, does what boards and servers need of it."""

import importlib.util
import queue
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_runtime.mqtt import MqttClient, MqttSettings, Outcome, Publish
from testbed.broker import BrokerError, find_mosquitto, free_port, start_embedded
from tests.brokers import mosquitto_or_skip

PATIENCE_S = 60


@pytest.fixture(params=["mosquitto", "iotcore"])
def program(request: pytest.FixtureRequest) -> str | None:
    if request.param == "mosquitto":
        return mosquitto_or_skip()
    if importlib.util.find_spec("iotcore") is None:
        pytest.skip("iotcore is not installed: pip install iotcore")
    return None


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_shared_subscriptions_retained_messages_expiry_and_wills_work(program: str | None) -> None:
    inbox: queue.Queue[tuple[str, bytes, int | None]] = queue.Queue()
    outcomes: queue.Queue[Outcome] = queue.Queue()
    with start_embedded(mosquitto=program) as port:
        board = MqttClient(
            MqttSettings("127.0.0.1", port, client_id="b1"),
            will=Publish("b1/status", b"offline", retain=True),
            birth=lambda: [Publish("b1/status", b"online", retain=True)],
        ).start()
        assert board.wait_online(PATIENCE_S)
        board.publish("b1/event", b"kept", retain=True, on_outcome=outcomes.put)
        assert outcomes.get(timeout=PATIENCE_S) is Outcome.DELIVERED
        server = MqttClient(
            MqttSettings("127.0.0.1", port, client_id="s1"),
            subscriptions=[("$share/pool/+/request", 1), ("b1/status", 1), ("b1/event", 1)],
            on_message=lambda message: inbox.put((message.topic, message.payload, message.expiry_s)),
        )
        with server:
            assert server.wait_online(PATIENCE_S)
            retained = {inbox.get(timeout=PATIENCE_S) for _ in range(2)}
            assert retained == {("b1/status", b"online", None), ("b1/event", b"kept", None)}
            board.publish("b1/request", b"r" * 200_000, expiry_s=60)
            topic, payload, expiry_s = inbox.get(timeout=PATIENCE_S)
            assert (topic, len(payload)) == ("b1/request", 200_000)
            assert expiry_s is not None
            assert 50 < expiry_s <= 60
            board.close()
            assert inbox.get(timeout=PATIENCE_S)[:2] == ("b1/status", b"offline")


def test_nothing_is_left_behind(program: str | None) -> None:
    with start_embedded(mosquitto=program) as port:
        assert is_listening(port)
    assert not is_listening(port)
    with start_embedded(port, mosquitto=program) as again:  # the same port is free at once
        assert again == port


def test_a_broker_ends_with_the_process_that_started_it(program: str | None) -> None:
    script = f"""
import sys
from testbed.broker import start_embedded
with start_embedded(mosquitto={program!r}) as port:
    print(port, flush=True)
    sys.stdin.read()
"""
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        port = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + PATIENCE_S
    while is_listening(port):  # no event tells of the end of a grandchild
        assert time.monotonic() < deadline


def test_a_port_that_is_taken_is_an_error_with_the_port_in_it(program: str | None) -> None:
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        with pytest.raises(BrokerError, match=str(port)), start_embedded(port, mosquitto=program):
            pass


def test_what_is_found_as_mosquitto_is_a_program() -> None:
    program = find_mosquitto()
    assert program is None or Path(program).is_file()
