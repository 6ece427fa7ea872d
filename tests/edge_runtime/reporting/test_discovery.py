"""A real board announces itself over a real Mosquitto, and its entities show what its events say."""

import json
import os
import queue
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from edge_runtime.app import Board
from edge_runtime.config import BoardConfig, CameraConfig, HomeAssistantConfig, RuntimeConfig
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import Message, MqttClient, MqttConfig, Outcome, Publish, State
from edge_runtime.reporting.discovery import MAX_DELAY_S, Discovery
from edge_runtime.reporting.images import MAX_IMAGE, MAX_SIDE, small_jpeg
from edge_runtime.wire import Event, Reply, Status, decode_request, encode_reply, topics
from firmware_tools.site_broker import Board as BrokerBoard
from firmware_tools.site_broker import Site
from tests.brokers import Mosquitto
from tests.home_assistant import Entity, check
from tests.listener import PATIENCE_S, Listener, until
from tests.sites import login, site_broker

SITE, BOARD = "home", "porch"
TOPIC, HA_STATUS = topics.discovery("homeassistant", SITE, BOARD), topics.discovery_status("homeassistant")
EVENT, LAST = topics.event(SITE, BOARD), topics.last(SITE, BOARD)
MESSAGE: dict[str, Any] = {"cmps": {"a": {"p": "sensor", "uniq_id": "x"}}}


@pytest.fixture
def photos(tmp_path: Path) -> str:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8).repeat(40, 0).repeat(40, 1)
        cv2.imwrite(str(folder / f"{number}.png"), pixels)
    return str(folder)


def configuration(bundle: Bundle, port: int, photos: str, *names: str, **keys: Any) -> RuntimeConfig:
    cameras = [CameraConfig(name, photos, interval_s=0.01, questions=("gate",)) for name in names or ("front",)]
    return RuntimeConfig(
        BoardConfig(BOARD, str(bundle.path), site=SITE, deadline_ms=60_000, paradigm="split"),
        tuple(cameras),
        MqttConfig(port=port, keepalive_s=2),
        homeassistant=HomeAssistantConfig(**keys),
    )


def server(port: int) -> Listener:
    """Answers every request with a text that nobody should take for a template."""

    def answer(payload: bytes) -> bytes:
        shares = {"open": 0.75, "half\nshut": 0.25}
        reply = Reply(
            id=decode_request(payload).id,
            status=Status.OK,
            text="{{ 7 * 7 }} <b>\u202e" + "x" * 300,
            server="s1",
            label="n1",
            scores={"n1": 0.5},
            answers={"gate": shares},
        )
        return encode_reply(reply)

    return Listener(port, topics.request(SITE, BOARD), answer=answer, to=topics.reply(SITE, BOARD))


@contextmanager
def running(config: RuntimeConfig, listener: Callable[[Event], None] | None = None) -> Iterator[Board]:
    """A board on a thread of its own; at the end it has stopped."""
    board, stop = Board(config, listener), threading.Event()
    thread = threading.Thread(target=board.run, args=(stop,))
    thread.start()
    try:
        assert board.local.wait_online(PATIENCE_S)
        yield board
    finally:
        stop.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def waiting(config: RuntimeConfig) -> RuntimeConfig:
    """The same board with cameras that wait for pictures, so that it runs until it is stopped."""
    cameras = tuple(CameraConfig(camera.name, "mqtt") for camera in config.cameras)
    return msgspec.structs.replace(config, cameras=cameras)


def kept(broker: Mosquitto) -> dict[str, bytes]:
    """The messages that the broker has of the board, by topic."""
    with Listener(broker.port, "homeassistant/#", f"aiflow/{SITE}/#") as user:
        user.client.publish("aiflow/home/end", b"")  # the retained messages come before it
        found = {}
        while (message := user.heard.get(timeout=PATIENCE_S)).topic != "aiflow/home/end":
            found[message.topic] = message.payload
        return found


def test_a_board_announces_itself_once_retained_and_every_entity_shows_what_its_events_say(
    board_bundle, broker, photos
):
    config = configuration(board_bundle, broker.port, photos, "front", "back")
    events: list[Event] = []
    with Listener(broker.port, "homeassistant/#", EVENT, LAST) as user, server(broker.port):
        with running(config, events.append) as board:
            until(lambda: board.tracker.summary()["answered"] == 4)
        announced = user.heard.get(timeout=PATIENCE_S)
        assert announced.topic == TOPIC
        entities = {name: Entity(keys) for name, keys in check(announced.payload)["cmps"].items()}
        heard = [user.heard.get(timeout=PATIENCE_S) for _ in range(2 * len(events))]  # a fast reply has no "new"
    assert {message.topic for message in heard} == {EVENT, LAST}  # no second announcement
    assert set(check(kept(broker)[TOPIC])["cmps"]) == set(entities)
    for message in heard:
        for entity in entities.values():
            entity.receive(message.topic, message.payload)
    for camera in ("front", "back"):
        own = [event for event in events if event.camera == camera]
        shown = {kind: entities[f"camera.{camera}.{kind}"] for kind in ("caption", "label", "paradigm", "bytes")}
        last = own[-1]
        assert shown["caption"].state == last.text.replace("\u202e", " ")[:255]
        assert (shown["caption"].attributes["text"], shown["caption"].attributes["camera"]) == (
            last.text.replace("\u202e", " "),
            camera,
        )
        assert (shown["label"].state, shown["label"].attributes) == (last.label, {"scores": last.scores})
        assert (shown["paradigm"].state, shown["bytes"].state) == (last.paradigm, str(last.bytes_up))
        assert float(entities[f"camera.{camera}.after"].state) == last.after_ms
        gate = entities[f"camera.{camera}.question.gate"]
        assert (gate.state, gate.attributes["probabilities"]) == ("open", last.answers["gate"])
        fired = entities[f"camera.{camera}.event"].events
        assert [(event["event_type"], event["frame"]) for event in fired] == [(e.type, e.frame) for e in own]


def test_settings_are_switched_on_the_topics_that_the_message_names(board_bundle, broker, photos):
    with running(waiting(configuration(board_bundle, broker.port, photos))) as board:
        until(lambda: TOPIC in kept(broker))
        entities = check(kept(broker)[TOPIC])["cmps"]
        with Listener(broker.port) as user:
            for name, value in (("paused", "ON"), ("front_enabled", "OFF"), ("paradigm", "device")):
                user.client.publish(entities[f"setting.{name}"]["cmd_t"], value.encode())
                until(lambda name=name, value=value: board.users.settings[name] == value)  # type: ignore[misc]
        state = kept(broker)
        assert state[entities["setting.paused"]["stat_t"]] == b"ON"


def test_home_assistants_birth_is_answered_by_the_same_message_and_nothing_else_is(board_bundle, broker, photos):
    with running(waiting(configuration(board_bundle, broker.port, photos))) as board:
        assert board.users.discovery
        board.users.discovery._delay_s = lambda: 0.0
        with Listener(broker.port, TOPIC) as user:
            first = user.next()
            for payload in (b"offline", b"{{ x }}", b"x" * 10_000):
                board.users.discovery.home_assistant_said(Message(HA_STATUS, payload, 0, False, None, lambda: None))
                assert board.users.discovery._timer is None
            user.client.publish(HA_STATUS, b"online", qos=0)
            assert user.next() == first


def test_ten_thousand_births_cost_one_message():
    published = list[Publish]()
    discovery = Discovery(HomeAssistantConfig(), SITE, BOARD, MESSAGE, published.append, lambda: PATIENCE_S)
    for _ in range(10_000):
        discovery.home_assistant_said(Message(HA_STATUS, b"online", 0, False, None, lambda: None))
    assert sum(thread.name == "homeassistant" for thread in threading.enumerate()) == 1
    discovery.close()
    assert published == []


def test_the_delay_is_a_random_part_of_the_most():
    discovery = Discovery(HomeAssistantConfig(), SITE, BOARD, MESSAGE, lambda _: None)
    delays = {discovery._delay_s() for _ in range(20)}
    assert len(delays) > 1
    assert all(0 <= delay <= MAX_DELAY_S for delay in delays)


def test_an_old_birth_is_not_answered_since_the_connection_was():
    discovery = Discovery(HomeAssistantConfig(), SITE, BOARD, MESSAGE, pytest.fail, lambda: 0.0)
    discovery.home_assistant_said(Message(HA_STATUS, b"online", 0, True, None, lambda: None))
    assert discovery._timer is None


def test_entities_of_a_renamed_camera_are_removed_and_the_present_message_stays(board_bundle, broker, photos):
    with running(waiting(configuration(board_bundle, broker.port, photos, "front", "yard"))):
        until(lambda: TOPIC in kept(broker))
    before = check(kept(broker)[TOPIC])["cmps"]
    with Listener(broker.port, TOPIC) as user:
        user.next()
        with running(waiting(configuration(board_bundle, broker.port, photos, "front", "garden"))):
            messages = [check(user.next())["cmps"] for _ in range(3)]
        user.client.publish(TOPIC, b"end")
        assert user.next() == b"end"  # the board's own messages, which it also gets, have no consequences
    gone = {name: {"p": keys["p"]} for name, keys in before.items() if "yard" in name}
    assert len(gone) >= 9
    assert messages[0] == messages[2] == check(kept(broker)[TOPIC])["cmps"]
    assert messages[1] == gone | messages[0]
    assert list(messages[1])[: len(gone)] == list(gone)  # Home Assistant may skip what comes later
    assert not any("yard" in name for name in messages[2])


@pytest.mark.parametrize(
    "payload",
    [
        b"garbage",
        b"\xff",
        b"[" * 100_000,
        b'{"cmps": {"{{ x }}": {"p": "sensor"}}}',
        b'{"cmps": {"a": {"p": "<b>"}}}',
        json.dumps({"cmps": {f"a{number}": {"p": "sensor"} for number in range(1025)}}).encode(),
    ],
)
def test_a_strange_message_on_the_own_topic_is_named_and_removes_nothing(payload, caplog):
    discovery = Discovery(HomeAssistantConfig(), SITE, BOARD, MESSAGE, pytest.fail)
    discovery.own_message_arrived(Message(TOPIC, payload, 1, True, None, lambda: None))
    assert "homeassistant message of an earlier run not read" in caplog.text


def test_without_discovery_the_device_is_removed_and_without_the_table_nothing_is_touched(board_bundle, broker, photos):
    with running(waiting(configuration(board_bundle, broker.port, photos))):
        until(lambda: TOPIC in kept(broker))
    config = waiting(configuration(board_bundle, broker.port, photos))
    with running(msgspec.structs.replace(config, homeassistant=None)):
        until(lambda: topics.status(SITE, BOARD) in kept(broker))
        assert TOPIC in kept(broker)
    with Listener(broker.port, TOPIC) as user:
        user.next()
        with running(waiting(configuration(board_bundle, broker.port, photos, discovery=False))) as board:
            assert user.next() == b""
            assert board.users.settings.filter in {route.filter for router in board.routers for route in router.routes}
    assert TOPIC not in kept(broker)


def test_the_documented_command_deletes_all_that_a_broker_keeps_of_a_board(board_bundle, broker, photos, tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "homeassistant.md").read_text()
    (command,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    program = tmp_path / "mosquitto_pub"
    program.write_text('#!/bin/bash\necho "${@: -1}"\n')  # the last argument: that of -t
    program.chmod(0o755)
    shell = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(["bash", "-c", command], env=shell, capture_output=True, text=True, check=True).stdout
    with server(broker.port), running(configuration(board_bundle, broker.port, photos)) as board:
        until(lambda: board.tracker.summary()["answered"] == 2)
    assert set(said.split()) == kept(broker).keys()


def test_the_near_broker_alone_gets_the_announcement_and_shows_a_lost_link(board_bundle, start_broker, photos):
    far, near = start_broker(), start_broker()
    config = waiting(configuration(board_bundle, far.port, photos))
    config = msgspec.structs.replace(config, local=MqttConfig(port=near.port, keepalive_s=2))
    link = Entity({})
    status = topics.status(SITE, BOARD)

    def shown(state: str) -> bool:
        entities = check(kept(near)[TOPIC])["cmps"]
        link.config = entities["link"]
        link.receive(status, kept(near)[status])
        return link.state == state

    with running(config) as board:
        assert board.servers.wait_online(PATIENCE_S)
        until(lambda: shown("ON"))
        assert TOPIC not in kept(far)
        far.kill()
        until(lambda: shown("OFF"))


# ---- pictures ----


def test_pictures_are_published_only_if_configured_and_no_broker_keeps_them(board_bundle, broker, photos):
    image, status = topics.image(SITE, BOARD, "front"), topics.status(SITE, BOARD)
    for images in (False, True):
        config, told = configuration(board_bundle, broker.port, photos, images=images), []
        with Listener(broker.port, image, status) as user, server(broker.port):
            with running(config) as board:
                until(lambda board=board: board.tracker.summary()["answered"] == 2)  # type: ignore[misc]
            message = user.heard.get(timeout=PATIENCE_S)
            while message.topic == image or message.retained or b'"offline"' not in message.payload:  # comes last
                told += [message] * (message.topic == image)
                message = user.heard.get(timeout=PATIENCE_S)
        assert len(told) == images  # two frames within one period
        assert image not in kept(broker)
    assert cv2.imdecode(np.frombuffer(told[0].payload, np.uint8), cv2.IMREAD_COLOR).shape == (240, 320, 3)


@pytest.mark.parametrize("shape", [(1, 1), (480, 640), (2160, 3840), (4000, 10), (8, 8000)])
def test_a_picture_of_any_size_is_small(shape):
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    data = small_jpeg(pixels)
    height, width = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape[:2]
    assert len(data) <= MAX_IMAGE
    assert max(height, width) <= MAX_SIDE


def test_a_picture_has_the_colours_of_its_frame():
    red = np.full((8, 8, 3), (255, 0, 0), np.uint8)
    blue, _, most = cv2.imdecode(np.frombuffer(small_jpeg(red), np.uint8), cv2.IMREAD_COLOR)[4, 4]
    assert most > 200 > blue


# ---- rights ----


def test_a_brokers_generated_rights_are_enough_and_let_no_board_announce_another(board_bundle, tmp_path, photos):
    site = Site(
        SITE,
        [BrokerBoard(BOARD, ["front"]), BrokerBoard("gate")],
        ["attic"],
        takes_pictures=True,
        home_assistants=["hass"],
    )
    image = topics.image(SITE, BOARD, "front")
    with site_broker(tmp_path, site) as broker:
        settings = {name: login(tmp_path, name, broker.port).settings(name) for name in ("hass", "gate")}
        heard: queue.Queue[Message] = queue.Queue()
        filters = [("homeassistant/#", 1), (image, 0)]
        config = configuration(board_bundle, broker.port, photos, images=True)
        config = msgspec.structs.replace(config, mqtt=login(tmp_path, BOARD, broker.port))
        with MqttClient(settings["hass"], subscriptions=filters, on_message=heard.put) as home:
            assert home.wait_online(PATIENCE_S)
            with MqttClient(settings["gate"]) as gate:
                refused: queue.Queue[Outcome] = queue.Queue()
                gate.publish(TOPIC, b"{}", retain=True, on_outcome=refused.put)
                gate.publish(image, b"x", on_outcome=refused.put)
                assert [refused.get(timeout=PATIENCE_S) for _ in range(2)] == [Outcome.REFUSED] * 2
            with running(waiting(config)) as board:
                assert board.users.discovery
                board.users.discovery._delay_s = lambda: 0.0
                first = heard.get(timeout=PATIENCE_S)
                assert (first.topic, set(check(first.payload)["cmps"]) > {"camera.front.image"}) == (TOPIC, True)
                home.publish(HA_STATUS, b"online", qos=0)
                assert {heard.get(timeout=PATIENCE_S).topic for _ in range(2)} == {HA_STATUS, TOPIC}
                assert board.users.images
                board.users.images.show("front", np.zeros((8, 8, 3), np.uint8))
                assert heard.get(timeout=PATIENCE_S).topic == image
                home.publish(TOPIC, b"", retain=True)  # as Home Assistant does when somebody deletes the device there
                assert heard.get(timeout=PATIENCE_S).payload == b""


def test_a_broker_that_allows_no_announcement_costs_the_board_nothing_else(board_bundle, tmp_path, photos):
    with site_broker(tmp_path, Site(SITE, [BrokerBoard(BOARD, ["front"])], ["attic"], takes_pictures=True)) as broker:
        config = waiting(configuration(board_bundle, broker.port, photos))
        with running(msgspec.structs.replace(config, mqtt=login(tmp_path, BOARD, broker.port))) as board:
            until(lambda: board.local.stats()["refused"] == 1)
            assert board.local.state is State.ONLINE
