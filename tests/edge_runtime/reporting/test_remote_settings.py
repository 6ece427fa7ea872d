"""Run-time switches: the table alone, and over a real broker."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.capture import Cameras
from edge_runtime.config import BoardConfig, CameraConfig, MotionConfig, PolicyConfig, RuntimeConfig
from edge_runtime.mqtt.client import Message, MqttClient, MqttSettings, Outcome
from edge_runtime.reporting.remote_settings import (
    MAX_SETTING_BYTES,
    Switch,
    SwitchError,
    Switches,
    board_switches,
    choice,
    number,
)
from edge_runtime.wire import TopicError, topics
from tests.brokers import Mosquitto
from tests.listener import PATIENCE_S, QUICK, Listener, until

SITE, BOARD = "home", "b1"


def configuration(*cameras: CameraConfig, may_offload: bool = True, **board: Any) -> RuntimeConfig:
    cameras = cameras or (CameraConfig("door", "mqtt"), CameraConfig("back-yard", "mqtt"))
    return RuntimeConfig(BoardConfig(BOARD, "bundle", **board), cameras, policy=PolicyConfig(may_offload=may_offload))


class Client:
    """Keeps what is published, and says what became of it when the test does."""

    def __init__(self) -> None:
        self.published: list[tuple[str, bytes, bool]] = []
        self.outcomes: list[Callable[[Outcome], None]] = []

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, on_outcome: Any) -> bool:
        self.published.append((topic, payload, retain))
        self.outcomes.append(on_outcome)
        return True


class Board:
    """The switches of a board and what they switch."""

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        config = config or configuration()
        self.cameras, self.client = Cameras(config.cameras), Client()
        self.switches = Switches(SITE, BOARD, board_switches(config, self.cameras))

    def set(self, name: str, payload: bytes, *, retained: bool = False) -> bool:
        topic = topics.setting(SITE, BOARD, "x")[:-1] + name
        return self.switches.heard(Message(topic, payload, 1, retained, None, lambda: None), self.client)

    @property
    def in_force(self) -> dict[str, str]:
        return {publish.topic.rpartition("/")[2]: publish.payload.decode() for publish in self.switches.births()}


START = {
    "paradigm": "auto",
    "quality_floor": "0.95",
    "paused": "OFF",
    "door_enabled": "ON",
    "door_motion": "OFF",
    "back-yard_enabled": "ON",
    "back-yard_motion": "OFF",
}


def test_the_state_at_start_is_the_configuration():
    assert Board().in_force == START
    config = configuration(
        CameraConfig("door", "mqtt", motion=MotionConfig(enabled=True)), paradigm="split", may_offload=False
    )
    assert Board(config).in_force == {
        "paradigm": "split",
        "quality_floor": "0.95",
        "paused": "OFF",
        "door_enabled": "ON",
        "door_motion": "ON",
    }


@pytest.mark.parametrize(
    ("name", "payload", "value"),
    [
        ("paradigm", b"device", "device"),
        ("paradigm", b" Offload\n", "offload"),
        ("quality_floor", b"0.250", "0.25"),
        ("quality_floor", b"1", "1"),
        ("paused", b"ON", "ON"),
        ("door_motion", b"on", "ON"),
        ("back-yard_enabled", b"OFF", "OFF"),
    ],
)
def test_a_switch_takes_a_value_and_tells_it_retained(name, payload, value):
    board = Board()
    assert board.set(name, payload)
    assert board.switches[name] == value
    assert board.in_force == START | {name: value}
    assert board.client.published == [(topics.state(SITE, BOARD, name), value.encode(), True)]
    assert board.switches.counters.set == 1


def test_the_cameras_do_what_their_switches_say():
    board = Board()
    door = board.cameras["door"]
    board.set("door_motion", b"ON")
    assert (door.gate.enabled, board.cameras["back-yard"].gate.enabled) == (True, False)
    board.set("door_enabled", b"OFF")
    assert (door.is_on, board.cameras["back-yard"].is_on) == (False, True)
    board.set("paused", b"ON")
    assert not board.cameras["back-yard"].is_on
    board.set("paused", b"OFF")
    assert (door.is_on, board.cameras["back-yard"].is_on) == (False, True)
    board.set("door_enabled", b"ON")
    assert door.is_on


@pytest.mark.parametrize(
    ("name", "payload", "why"),
    [
        ("paradigm", b"", "'' is none of auto, device, split, speculative, offload"),
        ("paradigm", b"fast", "'fast' is none of auto"),
        ("paradigm", b"device\0", "is none of auto"),
        ("paradigm", b"\xff\xfe", "can't decode byte 0xff"),
        ("paused", b"true", "'true' is none of ON, OFF"),
        ("paused", b"ON" + b" " * MAX_SETTING_BYTES, "has 258 bytes, at most 256 are read"),
        ("quality_floor", b"nan", "nan is not from 0 to 1"),
        ("quality_floor", b"inf", "inf is not from 0 to 1"),
        ("quality_floor", b"-0.1", "-0.1 is not from 0 to 1"),
        ("quality_floor", b"0,5", "'0,5' is no number"),
        ("quality_floor", b"9" * 256, "is not from 0 to 1"),
    ],
)
def test_a_value_that_a_switch_does_not_take_is_named_counted_and_changes_nothing(name, payload, why, caplog):
    board = Board()
    assert board.set(name, payload)
    assert (board.in_force, board.client.published) == (START, [])
    assert (board.switches.counters.refused, board.switches.counters.set) == (1, 0)
    assert f"switch refused name='{name}' count=1" in caplog.text
    assert why in caplog.text


@pytest.mark.parametrize("name", ["", "zoom", "door_enabled/x", "PAUSED", "side_enabled", "x" * 1000, "a\nb"])
def test_a_switch_that_is_not_there_is_named_counted_and_changes_nothing(name, caplog):
    board = Board()
    assert board.set(name, b"ON")
    assert (board.in_force, board.client.published, board.switches.counters.unknown) == (START, [], 1)
    assert f"switch unknown name={name!r:.64} count=1 reason=is none of paradigm, quality_floor" in caplog.text
    assert "\n" not in caplog.messages[0]


def test_a_wish_that_the_broker_kept_is_not_taken(caplog):
    board = Board()
    board.set("paused", b"ON", retained=True)
    assert (board.in_force, board.client.published, board.switches.counters.retained) == (START, [], 1)
    assert "set it again without" in caplog.text


def test_other_topics_are_left_to_others():
    board = Board()
    for topic in (topics.frame(SITE, BOARD), topics.reply(SITE, BOARD), topics.setting(SITE, "b2", "paused")):
        assert not board.switches.heard(Message(topic, b"ON", 1, False, None, lambda: None), board.client)
    assert board.in_force == START


def test_a_house_that_keeps_its_pictures_cannot_be_switched_to_offload():
    board = Board(configuration(may_offload=False))
    board.set("paradigm", b"offload")
    assert (board.in_force["paradigm"], board.switches.counters.refused) == ("auto", 1)


def test_what_cannot_be_applied_stays_as_it_was():
    def refuse(_: str) -> None:
        raise SwitchError("this bundle has no draft decoder")

    board = Board()
    board.switches = Switches(SITE, BOARD, [choice("paradigm", "split", ["split", "speculative"], refuse)])
    board.set("paradigm", b"speculative")
    assert (board.in_force, board.switches.counters.refused) == ({"paradigm": "split"}, 1)
    board.set("paradigm", b"split")  # in force already: nothing to apply
    assert board.switches.counters.set == 1


def test_a_flood_of_changes_has_one_message_under_way_and_ends_with_the_last_value():
    board = Board()
    for number_ in range(101):
        board.set("paused", (b"ON", b"OFF")[number_ % 2])
    board.set("door_motion", b"ON")
    state = topics.state(SITE, BOARD, "paused")
    assert board.client.published == [
        (state, b"ON", True),
        (topics.state(SITE, BOARD, "door_motion"), b"ON", True),
    ]
    board.set("paused", b"OFF")
    board.client.outcomes[0](Outcome.DELIVERED)
    assert board.client.published[2:] == [(state, b"OFF", True)]
    board.client.outcomes[2](Outcome.DELIVERED)
    assert len(board.client.published) == 3


def test_a_flood_of_bad_values_does_not_fill_the_log(caplog):
    board = Board()
    for _ in range(1000):
        board.set("paused", b"?")
    assert (board.switches.counters.refused, len(caplog.messages)) == (1000, 10)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*START, "zoom", "door"]),
            st.binary(max_size=300) | st.sampled_from([b"ON", b"OFF", b"split", b"0.5", b"1e-3", b"-0"]),
        ),
        max_size=20,
    )
)
def test_whatever_is_sent_is_counted_once_and_every_state_is_a_value_that_its_switch_takes(sent):
    board = Board()
    for name, payload in sent:
        assert board.set(name, payload)
    counters = board.switches.counters
    assert counters.set + counters.refused + counters.unknown == len(sent)
    for name, value in board.in_force.items():
        again = Board()
        again.set(name, value.encode())
        assert (again.switches[name], again.switches.counters.set) == (value, 1)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_number_is_taken_exactly_when_it_is_in_range(value):
    switch = number("x", 1, -2, 3)
    if -2 <= value <= 3:
        assert float(switch.parse(repr(value))) == pytest.approx(value, rel=1e-5)
    else:
        with pytest.raises(SwitchError):
            switch.parse(repr(value))


def test_a_name_that_is_no_part_of_a_topic_is_refused():
    with pytest.raises(TopicError, match="name 'a/b' must match"):
        Switches(SITE, BOARD, [Switch("a/b", "", str)])


def test_the_switches_of_every_camera_name_fit_into_topics():
    Board(configuration(CameraConfig("a" * 24, "mqtt")))


# ---- over a real broker ----


class Running:
    """The switches of a board with its MQTT client."""

    def __init__(self, port: int, config: RuntimeConfig) -> None:
        self.cameras = Cameras(config.cameras)
        self.switches = Switches(SITE, BOARD, board_switches(config, self.cameras))
        self.client = MqttClient(
            MqttSettings("127.0.0.1", port, BOARD, keepalive_s=2),
            subscriptions=[self.switches.subscription],
            on_message=lambda message: self.switches.heard(message, self.client),
            birth=self.switches.births,
            timing=QUICK,
        )

    def __enter__(self) -> "Running":
        self.client.start()
        assert self.client.wait_online(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()


def states(port: int, count: int) -> dict[str, str]:
    """What the broker keeps of the board's switches."""
    with Listener(port, topics.state(SITE, BOARD, "x")[:-1] + "+") as user:
        heard = [user.heard.get(timeout=PATIENCE_S) for _ in range(count)]
    assert all(message.retained for message in heard)
    return {message.topic.rpartition("/")[2]: message.payload.decode() for message in heard}


def test_the_states_of_sixteen_cameras_are_kept_by_the_broker_at_every_connection(broker: Mosquitto):
    config = configuration(*(CameraConfig(f"camera-{n}", "mqtt") for n in range(16)))
    with Running(broker.port, config) as board:
        until(lambda: board.client.stats().pending == 0)
        kept = states(broker.port, 35)
        assert (len(kept), kept["camera-15_enabled"], kept["paused"]) == (35, "ON", "OFF")
        board.client.publish(topics.setting(SITE, BOARD, "paused"), b"ON")
        until(lambda: board.switches["paused"] == "ON")
        broker.kill()
        broker.start()  # with nothing kept
        until(lambda: board.client.stats().connects == 2 and board.client.stats().pending == 0)
        assert states(broker.port, 35)["paused"] == "ON"
        assert board.client.stats().connects == 2


def test_a_user_switches_and_hears_the_state_and_a_kept_wish_is_left_alone(broker: Mosquitto):
    with Listener(broker.port, topics.state(SITE, BOARD, "door_enabled")) as user:
        user.client.publish(topics.setting(SITE, BOARD, "door_enabled"), b"OFF", retain=True)
        until(lambda: user.client.stats().pending == 0)
        with Running(broker.port, configuration()) as board:
            assert user.next() == b"ON"
            until(lambda: board.switches.counters.retained == 1)
            user.client.publish(topics.setting(SITE, BOARD, "door_enabled"), b"OFF")
            assert user.next() == b"OFF"
            assert not board.cameras["door"].is_on
            user.client.publish(topics.setting(SITE, BOARD, "no_such"), b"OFF")
            until(lambda: board.switches.counters.unknown == 1)


def test_a_board_without_a_head_cannot_be_switched_to_need_one():
    config = RuntimeConfig(BoardConfig("b1", "bundle", paradigm="offload"), (CameraConfig("door", "mqtt"),))
    paradigm = board_switches(config, Cameras(config.cameras))[0]
    assert paradigm.parse("offload") == "offload"
    with pytest.raises(SwitchError, match="is none of offload"):
        paradigm.parse("split")
