"""Frigate's messages on a real Mosquitto become answers, which go back into Frigate; its page and example are true."""

import json
import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_runtime.capture.frigate_events import MAX_EVENTS, MAX_SNAPSHOTS
from edge_runtime.config import BoardConfig, CameraConfig, RuntimeConfig, load_toml
from edge_runtime.config.frigate import FrigateConfig
from edge_runtime.errors import ConfigError
from edge_runtime.mqtt import MqttConfig
from edge_runtime.reporting.frigate import CALL_S, MAX_AGE_S, MAX_SUB_LABEL, MAX_WAITING
from edge_runtime.wire import topics
from edge_runtime.wire.event import FrigateEvent
from firmware_tools.probes import board_subscriptions
from firmware_tools.systemd_units import service_of
from tests.edge_runtime.test_app import BOARD, SITE, Running, photo, server, status
from tests.frigate import FrigateServer, change, review
from tests.listener import PATIENCE_S, until

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "frigate.md").read_text()
EXAMPLE = ROOT / "examples" / "frigate" / "board.toml"
ONE, TWO = "1607123955.475377-mxklsc", "1607123957.120000-abcdef"
SNAPSHOT = "frigate/front_door/person/snapshot"


def configuration(bundle: Any, port: int, url: str | None = None, **camera: Any) -> RuntimeConfig:
    return RuntimeConfig(
        BoardConfig(BOARD, str(bundle.path), deadline_ms=60_000, paradigm="split"),
        (CameraConfig("front", "frigate", frigate_camera="front_door", **{"wait_s": 600.0, **camera}),),
        MqttConfig(port=port, keepalive_s=2),
        frigate=FrigateConfig(url=url),
    )


def test_an_event_of_frigates_is_answered_with_its_best_snapshot_and_the_answer_goes_back(board_bundle, broker):
    with (
        FrigateServer() as frigate,
        server(broker.port) as mqtt,
        Running(configuration(board_bundle, broker.port, frigate.url)) as board,
    ):
        until(lambda: status(broker.port)["state"] == "online")
        publish = mqtt.client.publish
        publish(SNAPSHOT, b"not yet sharp", retain=True)  # all of them are retained
        publish("frigate/events", change("new", ONE))
        publish("frigate/events", change("new", TWO, camera="garden"))  # another board's, or nobody's
        publish("frigate/reviews", review("1607123955.4-fqk5ka", ONE))
        publish(SNAPSHOT, photo(1), retain=True)
        publish("frigate/events", change("end", ONE))
        assert board.next("update").frigate == FrigateEvent(ONE, "person", "1607123955.4-fqk5ka", "alert")
        written = frigate.written.get(timeout=PATIENCE_S)
        assert written == (f"/api/events/{ONE}/description", {"description": "verified"})
        board.stop.set()
        summary = board.wait_ended()
    assert frigate.faults == []
    assert summary["frigate_events"] == {"begun": 1, "taken": 1, "no_snapshot": 0, "dropped": 0, "missed": 0}
    assert (summary["frames"], summary["unreadable"], summary["frigate_answers"]["written"]) == (1, 0, 1)


def test_a_frigate_that_is_away_is_in_the_status_and_delays_no_event(board_bundle, broker):
    config = configuration(board_bundle, broker.port, "http://127.0.0.1:1", wait_s=0.0)
    with server(broker.port) as mqtt, Running(config) as board:
        until(lambda: status(broker.port)["state"] == "online")
        for event in (ONE, TWO):
            mqtt.client.publish("frigate/events", change("new", event))
            mqtt.client.publish(SNAPSHOT, photo(1), qos=0)
            assert board.next("update").text == "verified"
        until(lambda: "no connection" in status(broker.port)["problems"].get("frigate", ""))
        board.stop.set()
        summary = board.wait_ended()
    counts = summary["frigate_answers"]
    assert (counts["accepted"], counts["dropped"], summary["frigate_waiting"]) == (2, 2, 0)


def test_what_is_no_message_or_picture_of_frigates_is_counted_and_an_old_snapshot_is_not_used(
    board_bundle, broker, caplog
):
    config = configuration(board_bundle, broker.port, wait_s=0.0)
    with server(broker.port) as mqtt:
        mqtt.client.publish(SNAPSHOT, photo(1), retain=True)  # yesterday's
        with Running(config) as board:
            until(lambda: status(broker.port)["state"] == "online")
            for payload in (b"\xff", b"[" * 100_000, json.dumps({"type": "new", "after": {}}).encode()):
                mqtt.client.publish("frigate/events", payload)
            mqtt.client.publish("frigate/events", change("new", ONE))
            mqtt.client.publish(SNAPSHOT, b"no picture", qos=0)
            until(lambda: "picture unreadable camera=front" in caplog.text)
            mqtt.client.publish(SNAPSHOT, photo(2))
            mqtt.client.publish("frigate/events", change("new", TWO, age_s=30.0))
            assert board.next("update").frigate == FrigateEvent(TWO, "person")
            board.stop.set()
            summary = board.wait_ended()
    assert +Counter(summary["rejected"]) == {"retained": 1, "unreadable": 3}
    assert (summary["unreadable"], summary["frigate_events"]["taken"]) == (1, 2)


def test_a_camera_that_is_switched_off_drops_what_waits_and_follows_no_event(board_bundle, broker):
    config = configuration(board_bundle, broker.port)
    with server(broker.port) as mqtt, Running(config) as board:
        until(lambda: status(broker.port)["state"] == "online")
        mqtt.client.publish("frigate/events", change("new", ONE))
        mqtt.client.publish(SNAPSHOT, photo(1), qos=0)
        for value in ("OFF", "ON"):
            mqtt.client.publish(topics.setting(SITE, BOARD, "front_enabled"), value.encode())
        mqtt.client.publish("frigate/events", change("end", ONE))
        mqtt.client.publish("frigate/events", change("new", TWO))
        mqtt.client.publish(SNAPSHOT, photo(2), qos=0)
        mqtt.client.publish("frigate/events", change("end", TWO))
        assert board.next("update").frigate == FrigateEvent(TWO, "person")
        board.stop.set()
        summary = board.wait_ended()
    counts = summary["frigate_events"]
    assert (counts["begun"], counts["dropped"], counts["missed"], summary["skipped"]) == (2, 1, 1, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"frigate": FrigateConfig(url="http://127.0.0.1", sub_label="parcel")}, "which no camera asks"),
        ({"cameras": (CameraConfig("front", "mqtt"),), "frigate": FrigateConfig(prefix="nvr")}, "of no use without"),
        ({"cameras": tuple(CameraConfig(n, "frigate", frigate_camera="x") for n in "ab")}, "the same one of Frigate"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused_by_name(board_bundle, change, said):
    config = configuration(board_bundle, 1883)
    with pytest.raises(ConfigError, match=said):
        RuntimeConfig(**{**msgspec.structs.asdict(config), **change})


def test_its_example_is_in_order_and_the_tools_know_its_topics_and_files():
    config = load_toml(EXAMPLE, RuntimeConfig)
    assert config.frigate.url
    names = [camera.name_in_frigate for camera in config.cameras]
    _, for_users = board_subscriptions(config)
    assert {"frigate/events", *(f"frigate/{name}/+/snapshot" for name in names)} <= {each.topic for each in for_users}
    files = dict(service_of(EXAMPLE, Path("aiflow")).files)
    assert files["[frigate] token_file"] == config.frigate.token_file


def test_its_page_is_true(tmp_path):
    example, *snippets = (textwrap.dedent(text) for text in re.findall(r"```toml\n(.*?)[ ]*```", PAGE, re.DOTALL))
    assert example == EXAMPLE.read_text()
    (tmp_path / "board.toml").write_text(example.replace("[frigate]\n", snippets[0]))
    assert load_toml(tmp_path / "board.toml", RuntimeConfig).frigate.sub_label == "label"
    words = " ".join(PAGE.split())
    for figure in (
        f"{MAX_EVENTS} events and {MAX_SNAPSHOTS} snapshots",
        f"queue of {MAX_WAITING}",
        f"slow ({CALL_S:g} s)",
        f"for {MAX_AGE_S / 60:g} minutes",
        f"at {MAX_SUB_LABEL} characters",
    ):
        assert figure in words
    links = [link for link in re.findall(r"\]\(([^)#]+)", PAGE) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]
