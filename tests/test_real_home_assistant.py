"""A real Home Assistant finds a real board by itself, on a real Mosquitto, and shows what it says.

Skipped unless HOME_ASSISTANT_PYTHON names the interpreter of an environment (Python 3.13) with Home Assistant:
`pip install homeassistant==2024.12.5 paho-mqtt==1.6.1`, or `homeassistant==2025.4.4 paho-mqtt==2.1.0`.
"""

import itertools
import json
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from edge_runtime.app import Board
from edge_runtime.config import (
    BoardConfig,
    CameraConfig,
    HomeAssistantConfig,
    RuntimeConfig,
    TriggerConfig,
    UpdatesConfig,
)
from edge_runtime.errors import RestartError
from edge_runtime.firmware.signature import read_signature
from edge_runtime.mqtt import MqttConfig
from edge_runtime.wire import Reply, Status, decode_request, encode_reply, topics
from firmware_tools.push import Push
from testbed.processes import AiflowProcess
from tests.brokers import Mosquitto
from tests.edge_runtime.firmware.helpers import sign, trust, variant
from tests.edge_runtime.reporting.test_discovery import running
from tests.listener import PATIENCE_S, Listener, until

PYTHON = os.environ.get("HOME_ASSISTANT_PYTHON", "")
SITE, BOARD = "home", "porch"
TEXT = "{{ 7 * 7 }} <b>a gate</b>\n" + "x" * 300

pytestmark = pytest.mark.skipif(not PYTHON, reason="HOME_ASSISTANT_PYTHON is not set")


class HomeAssistant:
    """Its process; `with` starts and stops it."""

    def __init__(self, folder: Path, port: int) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._port = folder, port
        self.answer: dict[str, Any] = {}

    def __enter__(self) -> "HomeAssistant":
        program = Path(__file__).parent / "home_assistant_process.py"
        command = [PYTHON, str(program), str(self._folder), str(self._port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("\n", timeout=60)

    def ask(self, action: str = "states") -> dict[str, Any]:
        """Entity id to state and attributes, after an action."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{action}\n")
        self._process.stdin.flush()
        self.answer = json.loads(self._process.stdout.readline())
        return self.answer["states"]

    def state(self, entity: str) -> str | None:
        return self.ask().get(entity, [None])[0]

    def attributes(self, entity: str) -> dict[str, Any]:
        return self.ask()[entity][1]


def photo(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return cv2.imencode(".jpg", coarse.repeat(40, 0).repeat(40, 1))[1].tobytes()


def configuration(bundle: str, port: int, *cameras: str) -> RuntimeConfig:
    return RuntimeConfig(
        BoardConfig(BOARD, bundle, site=SITE, paradigm="split", deadline_ms=60_000),
        tuple(
            CameraConfig(name, "mqtt", questions=("gate",), triggers=(TriggerConfig("gate == open"),))
            for name in cameras
        ),
        MqttConfig(port=port, keepalive_s=2),
        homeassistant=HomeAssistantConfig(images=True),
    )


@pytest.fixture
def server(broker: Mosquitto) -> Iterator[Listener]:
    """Says that the gate is shut, and after its first answer that it is open."""
    answered = itertools.count()

    def answer(payload: bytes) -> bytes:
        shares = {"open": 0.75, "shut": 0.25} if next(answered) else {"open": 0.1, "shut": 0.9}
        request = decode_request(payload).id
        return encode_reply(
            Reply(id=request, status=Status.OK, text=TEXT, server="s1", label="n\u202e1", answers={"gate": shares})
        )

    answers = Listener(broker.port, topics.request(SITE, BOARD), answer=answer, to=topics.reply(SITE, BOARD))
    with answers:
        yield answers


@pytest.fixture
def send_photo(broker: Mosquitto, server: Listener) -> Callable[[Board, str, int], None]:
    """Sends a picture to a camera, and waits until the board has its answer."""

    def send(board: Board, camera: str, seed: int) -> None:
        before = board.tracker.summary()["answered"]
        server.client.publish(topics.frame(SITE, BOARD, camera), photo(seed), qos=0)
        until(lambda: board.tracker.summary()["answered"] == before + 1)

    return send


@pytest.mark.timeout(300)
def test_a_board_appears_by_itself_dies_and_survives_a_restart_of_home_assistant(
    board_bundle, broker, tmp_path, send_photo
):
    bundle = str(board_bundle.path)
    folder = tmp_path / "home-assistant"
    shown = " ".join(TEXT.splitlines())
    with HomeAssistant(folder, broker.port) as home:
        with running(configuration(bundle, broker.port, "front", "yard")) as board:
            until(lambda: home.state("image.porch_yard_last_frame") == "unknown")
            until(lambda: home.state("select.porch_paradigm_setting") == "split")

            send_photo(board, "front", 1)
            until(lambda: home.state("sensor.porch_front_caption") == shown[:255])
            assert home.attributes("sensor.porch_front_caption")["text"] == shown
            assert home.attributes("sensor.porch_front_caption")["camera"] == "front"
            until(lambda: home.state("sensor.porch_front_gate") == "shut")
            assert home.attributes("sensor.porch_front_gate")["probabilities"] == {"open": 0.1, "shut": 0.9}
            until(lambda: home.attributes("event.porch_front_event")["event_type"] == "update")
            shown_event = home.attributes("event.porch_front_event")
            assert (shown_event["text"], shown_event["label"]) == (shown, "n 1")
            until(lambda: home.state("image.porch_front_last_frame") != "unknown")
            assert float(home.state("sensor.porch_front_bytes_sent") or 0) > 100
            assert (home.state("sensor.porch_front_paradigm"), home.state("sensor.porch_front_label")) == (
                "split",
                "n 1",
            )
            # Of the other camera nothing has changed, and its events change nothing here.
            assert home.state("sensor.porch_yard_caption") == "unknown"
            send_photo(board, "yard", 2)
            until(lambda: home.state("sensor.porch_yard_caption") == shown[:255])
            assert home.state("sensor.porch_front_caption") == shown[:255]
            assert home.attributes("sensor.porch_front_caption")["camera"] == "front"
        until(lambda: home.state("sensor.porch_front_caption") == "unavailable")
        until(lambda: home.state("switch.porch_paused") == "unavailable")
        assert home.answer["faults"] == []

    config = configuration(bundle, broker.port, "front", "yard")
    with running(config) as board:
        send_photo(board, "front", 3)
        with HomeAssistant(folder, broker.port) as home:
            until(lambda: home.state("switch.porch_yard_enabled") == "on")
            until(lambda: home.state("sensor.porch_front_caption") == shown[:255])  # from the retained last event
            assert home.answer["faults"] == []


@pytest.mark.timeout(300)
def test_a_board_answers_home_assistants_start_and_is_unavailable_when_it_is_killed(board_bundle, broker, tmp_path):
    tables = {
        "board": {"id": BOARD, "site": SITE, "bundle": str(board_bundle.path)},
        "cameras": [{"name": "front", "source": "mqtt"}],
        "mqtt": {"port": broker.port},
        "homeassistant": {},
    }
    topic = topics.discovery("homeassistant", SITE, BOARD)
    with AiflowProcess("run", tables, tmp_path) as board:
        with Listener(broker.port, topic) as user:
            assert user.next()
            user.client.publish(topic, b"", retain=True)
            assert user.next() == b""  # so only the answer to Home Assistant's start has the entities
        with HomeAssistant(tmp_path / "home-assistant", broker.port) as home:
            until(lambda: home.state("switch.porch_paused") == "off")
            board.kill()
            until(lambda: home.state("switch.porch_paused") == "unavailable")
            assert home.answer["faults"] == []


@pytest.mark.timeout(300)
def test_settings_are_changed_from_home_assistant_and_a_renamed_cameras_entities_go(board_bundle, broker, tmp_path):
    bundle = str(board_bundle.path)
    with HomeAssistant(tmp_path / "home-assistant", broker.port) as home:
        with running(configuration(bundle, broker.port, "front", "yard")) as board:
            until(lambda: home.state("switch.porch_front_enabled") == "on")
            until(lambda: home.state("select.porch_paradigm_setting") == "split")
            until(lambda: home.state("number.porch_quality_floor") == "0.95")
            home.ask('switch.turn_off {"entity_id": "switch.porch_front_enabled"}')
            until(lambda: board.users.settings["front_enabled"] == "OFF")
            home.ask('number.set_value {"entity_id": "number.porch_quality_floor", "value": 0.5}')
            until(lambda: board.users.settings["quality_floor"] == "0.5")
            home.ask('select.select_option {"entity_id": "select.porch_paradigm_setting", "option": "device"}')
            until(lambda: home.state("select.porch_paradigm_setting") == "device")
            until(lambda: home.state("sensor.porch_front_state") == "off")
        with running(configuration(bundle, broker.port, "front", "garden")):
            until(lambda: home.state("switch.porch_garden_enabled") == "on")
            until(lambda: not [name for name in home.ask() if "yard" in name])
            assert not [name for name in home.answer["registered"] if "yard" in name]
            assert home.state("switch.porch_front_enabled") == "on"
        assert home.answer["faults"] == []


@pytest.mark.timeout(300)
def test_without_discovery_the_device_disappears(board_bundle, broker, tmp_path):
    config = configuration(str(board_bundle.path), broker.port, "front")
    with HomeAssistant(tmp_path / "home-assistant", broker.port) as home:
        with running(config):
            until(lambda: home.state("switch.porch_front_enabled") == "on")
        with running(msgspec.structs.replace(config, homeassistant=HomeAssistantConfig(discovery=False))):
            until(lambda: home.ask().keys() == {"input_text.notified"})
            assert home.answer["registered"] == ["input_text.notified"]
        assert home.answer["faults"] == []


@pytest.mark.timeout(300)
def test_a_bundle_that_waits_is_seen_and_installed_from_home_assistant(board_bundle, broker, tmp_path):
    new = variant(board_bundle, tmp_path / "new", "new", name="new")
    sign(new, 3)
    trust(tmp_path)
    config = msgspec.structs.replace(
        configuration(str(board_bundle.path), broker.port, "front"),
        updates=UpdatesConfig(str(tmp_path / "store"), str(tmp_path / "trust"), ask=True),
    )
    with HomeAssistant(tmp_path / "home-assistant", broker.port) as home:
        board, stop = Board(config), threading.Event()
        ended: queue.Queue[Exception] = queue.Queue()

        def run() -> None:
            try:
                board.run(stop)
            except RestartError as error:
                ended.put(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            until(lambda: home.state("update.porch_bundle") == "off")
            Push(new, read_signature(new.path), SITE, BOARD, print).run(MqttConfig(port=broker.port).settings("p"), 60)
            until(lambda: home.state("update.porch_bundle") == "on")
            until(lambda: home.attributes("update.porch_bundle")["in_progress"] is False)
            shown = home.attributes("update.porch_bundle")
            assert (shown["installed_version"], shown["latest_version"]) == ("0", "3")
            home.ask('update.install {"entity_id": "update.porch_bundle"}')
            assert "bundle new version 3 is installed" in str(ended.get(timeout=PATIENCE_S))
        finally:
            stop.set()
            thread.join(PATIENCE_S)
        with running(config):
            until(lambda: home.attributes("update.porch_bundle").get("title") == "new")
            assert home.attributes("update.porch_bundle")["installed_version"] == "3"
            assert home.state("update.porch_bundle") == "off"
        assert home.answer["faults"] == []


def automation(blueprint: str, inputs: dict[str, Any], value: str) -> dict[str, Any]:
    """One that shows what it did in input_text.notified."""
    shows = {
        "action": "input_text.set_value",
        "target": {"entity_id": "input_text.notified"},
        "data": {"value": value},
    }
    use = {"path": f"aiflow/{blueprint}.yaml", "input": {**inputs, "actions": [shows]}}
    return {"id": blueprint, "alias": blueprint, "use_blueprint": use}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("blueprint", "inputs", "value", "shown"),
    [
        (
            "notify_on_trigger",
            {"event_entity": "event.porch_front_event", "pause": 0},
            "{{ (camera ~ ': ' ~ caption)[:30] }}, {{ condition }}",
            "front: 7  7  ba gate/b xxxxxxx, gate == open",
        ),
        (
            "on_answer",
            {"question": "sensor.porch_front_gate", "answer": "open"},
            "{{ question }}: {{ answer }} {{ probability }}",
            "porch front gate: open 0.75",
        ),
    ],
)
def test_the_blueprints_act_on_news_and_not_on_what_was(
    board_bundle, broker, tmp_path, send_photo, blueprint, inputs, value, shown
):
    folder = tmp_path / "home-assistant"
    folder.mkdir()
    (folder / "automations.json").write_text(json.dumps([automation(blueprint, inputs, value)]))
    with running(configuration(str(board_bundle.path), broker.port, "front")) as board:
        with HomeAssistant(folder, broker.port) as home:
            until(lambda: home.state("sensor.porch_front_gate") == "unknown")
            send_photo(board, "front", 1)
            until(lambda: home.state("sensor.porch_front_gate") == "shut")
            assert home.state("input_text.notified") == "unknown"
            send_photo(board, "front", 2)
            until(lambda: home.state("input_text.notified") == shown)
            home.ask('input_text.set_value {"entity_id": "input_text.notified", "value": "none"}')
        with HomeAssistant(folder, broker.port) as home:
            until(lambda: home.state("sensor.porch_front_gate") == "open")
            assert home.state("input_text.notified") == "none"
            assert home.answer["faults"] == []
