"""Run-time settings: the table alone, and over a real broker."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.config import BoardConfig, CameraConfig, MotionConfig, PolicyConfig, RuntimeConfig, SamplingConfig
from edge_runtime.mqtt import Message, MqttClient, MqttSettings, Outcome
from edge_runtime.reporting import RemoteSettings, Setting, board_settings
from edge_runtime.reporting.remote_settings import MAX_SETTING_BYTES, SettingError, number
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
    """The settings of a board and what they change."""

    def __init__(self, config: RuntimeConfig | None = None) -> None:
        self.client, self.applied = Client(), list[tuple[str, str, str]]()
        self.settings = RemoteSettings(SITE, BOARD, board_settings(config or configuration()), self.apply)

    def apply(self, setting: Setting) -> None:
        self.applied.append((setting.kind, setting.camera, setting.value))

    def set(self, name: str, payload: bytes) -> None:
        topic = topics.setting(SITE, BOARD, "x")[:-1] + name
        self.settings.message_arrived(Message(topic, payload, 1, False, None, lambda: None), self.client)

    @property
    def counts(self) -> tuple[int, int, int]:
        counts = self.settings.counts()
        return counts["set"], counts["refused"], counts["unknown"]

    @property
    def in_force(self) -> dict[str, str]:
        return {publish.topic.rpartition("/")[2]: publish.payload.decode() for publish in self.settings.states()}


START = {
    "paradigm": "auto",
    "quality_floor": "0.95",
    "paused": "OFF",
    "door_enabled": "ON",
    "door_motion": "OFF",
    "door_prompt": "none",
    "back-yard_enabled": "ON",
    "back-yard_motion": "OFF",
    "back-yard_prompt": "none",
}


def test_the_state_at_start_is_the_configuration():
    assert Board().in_force == START
    config = configuration(
        CameraConfig("door", "mqtt", motion=MotionConfig(enabled=True), prompt="gate"),
        paradigm="split",
        may_offload=False,
    )
    assert Board(config).in_force == {
        "paradigm": "split",
        "quality_floor": "0.95",
        "paused": "OFF",
        "door_enabled": "ON",
        "door_motion": "ON",
        "door_prompt": "gate",
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
        ("door_prompt", b"drive-way_2", "drive-way_2"),
        ("door_prompt", b"None", "none"),
    ],
)
def test_a_setting_takes_a_value_and_publishes_it_retained(name, payload, value):
    board = Board()
    board.set(name, payload)
    assert board.settings[name] == value
    assert board.in_force == START | {name: value}
    assert board.client.published == [(topics.state(SITE, BOARD, name), value.encode(), True)]
    assert board.counts == (1, 0, 0)


def test_a_new_value_is_applied_and_the_value_in_force_is_not_applied_again():
    board = Board()
    for name, payload in (("door_motion", b"ON"), ("back-yard_enabled", b"OFF"), ("paused", b"ON"), ("paused", b"ON")):
        board.set(name, payload)
    assert board.applied == [("motion", "door", "ON"), ("enabled", "back-yard", "OFF"), ("paused", "", "ON")]
    assert board.counts == (4, 0, 0)


@pytest.mark.parametrize(
    ("name", "payload", "why"),
    [
        ("paradigm", b"", "'' is none of auto, device, split, speculative, offload"),
        ("paradigm", b"fast", "'fast' is none of auto"),
        ("paradigm", b"device\0", "is none of auto"),
        ("paradigm", b"\xff\xfe", "can't decode byte 0xff"),
        ("paused", b"true", "'true' is none of OFF, ON"),
        ("paused", b"ON" + b" " * MAX_SETTING_BYTES, "has 258 bytes, at most 256 are read"),
        ("quality_floor", b"nan", "nan is not from 0 to 1"),
        ("quality_floor", b"inf", "inf is not from 0 to 1"),
        ("quality_floor", b"-0.1", "-0.1 is not from 0 to 1"),
        ("quality_floor", b"0,5", "'0,5' is not a number"),
        ("quality_floor", b"9" * 256, "is not from 0 to 1"),
        ("door_prompt", b"", "'' is neither a prompt's name nor 'none'"),
        ("door_prompt", b"Is the gate open?", "is neither a prompt's name"),
        ("door_prompt", b"x" * 33, "is neither a prompt's name"),
    ],
)
def test_a_value_that_a_setting_does_not_take_is_named_counted_and_changes_nothing(name, payload, why, caplog):
    board = Board()
    board.set(name, payload)
    assert (board.in_force, board.client.published, board.applied) == (START, [], [])
    assert board.counts == (0, 1, 0)
    assert f"setting refused name='{name}' count=1" in caplog.text
    assert why in caplog.text


@pytest.mark.parametrize(
    ("camera", "why"),
    [
        (CameraConfig("door", "mqtt", questions=("gate",)), "this camera has questions, which no server with prompts"),
        (CameraConfig("door", "mqtt", sampling=SamplingConfig(temperature=1.0)), "has [cameras.sampling], which"),
    ],
)
def test_a_camera_that_no_prompt_can_answer_gets_none_at_run_time(camera: CameraConfig, why: str, caplog) -> None:
    board = Board(configuration(camera))
    board.set("door_prompt", b"gate")
    assert (board.settings["door_prompt"], board.counts) == ("none", (0, 1, 0))
    assert why in caplog.text
    board.set("door_prompt", b"None")
    assert (board.settings["door_prompt"], board.counts) == ("none", (1, 1, 0))


@pytest.mark.parametrize("name", ["", "zoom", "PAUSED", "side_enabled", "x" * 1000, "a\nb"])
def test_a_setting_that_is_not_there_is_named_counted_and_changes_nothing(name, caplog):
    board = Board()
    board.set(name, b"ON")
    assert (board.in_force, board.client.published, board.counts) == (START, [], (0, 0, 1))
    shown = name.replace("\n", "\N{REPLACEMENT CHARACTER}")[:64]
    assert f"setting unknown name='{shown}' count=1 reason=want one of paradigm, quality_floor" in caplog.text
    assert "\n" not in caplog.messages[0]


def test_a_board_that_must_not_send_pictures_cannot_be_set_to_offload():
    board = Board(configuration(may_offload=False))
    board.set("paradigm", b"offload")
    assert (board.in_force["paradigm"], board.counts) == ("auto", (0, 1, 0))


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
    assert (board.counts, len(caplog.messages)) == ((0, 1000, 0), 10)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*START, "zoom", "door"]),
            st.binary(max_size=300) | st.sampled_from([b"ON", b"OFF", b"split", b"0.5", b"1e-3", b"-0"]),
        ),
        max_size=20,
    )
)
def test_whatever_is_sent_is_counted_once_and_every_state_is_a_value_that_its_setting_takes(sent):
    board = Board()
    for name, payload in sent:
        board.set(name, payload)
    assert sum(board.counts) == len(sent)
    for name, value in board.in_force.items():
        again = Board()
        again.set(name, value.encode())
        assert (again.settings[name], again.counts) == (value, (1, 0, 0))


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_number_is_taken_exactly_when_it_is_in_range(value):
    parse = number(-2, 3)
    if -2 <= value <= 3:
        assert float(parse(repr(value))) == pytest.approx(value, rel=1e-5)
    else:
        with pytest.raises(SettingError):
            parse(repr(value))


def test_a_name_that_is_no_part_of_a_topic_is_refused():
    with pytest.raises(TopicError, match="name 'a/b_motion' must match"):
        RemoteSettings(SITE, BOARD, [Setting("motion", "", str, "a/b")])


def test_the_settings_of_every_camera_name_fit_into_topics():
    Board(configuration(CameraConfig("a" * 24, "mqtt")))


# ---- over a real broker ----


class Running:
    """The settings of a board with its MQTT client."""

    def __init__(self, port: int, config: RuntimeConfig) -> None:
        self.settings = RemoteSettings(SITE, BOARD, board_settings(config))
        self.client = MqttClient(
            MqttSettings("127.0.0.1", port, client_id=BOARD, keepalive_s=2),
            subscriptions=[(self.settings.filter, 1)],
            on_message=lambda message: self.settings.message_arrived(message, self.client),
            birth=self.settings.states,
            timing=QUICK,
        )

    def __enter__(self) -> "Running":
        self.client.start()
        assert self.client.wait_online(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()


def states(port: int, count: int) -> dict[str, str]:
    """What the broker keeps of the board's settings."""
    with Listener(port, topics.state(SITE, BOARD, "x")[:-1] + "+") as user:
        heard = [user.heard.get(timeout=PATIENCE_S) for _ in range(count)]
    assert all(message.retained for message in heard)
    return {message.topic.rpartition("/")[2]: message.payload.decode() for message in heard}


def test_the_states_of_sixteen_cameras_are_kept_by_the_broker_at_every_connection(broker: Mosquitto):
    config = configuration(*(CameraConfig(f"camera-{n}", "mqtt") for n in range(16)))
    with Running(broker.port, config) as board:
        until(lambda: board.client.stats()["pending"] == 0)
        kept = states(broker.port, 51)
        assert (len(kept), kept["camera-15_enabled"], kept["paused"]) == (51, "ON", "OFF")
        board.client.publish(topics.setting(SITE, BOARD, "paused"), b"ON")
        until(lambda: board.settings["paused"] == "ON")
        broker.kill()
        broker.start()  # with nothing kept
        until(lambda: board.client.stats()["connects"] == 2 and board.client.stats()["pending"] == 0)
        assert states(broker.port, 51)["paused"] == "ON"
        assert board.client.stats()["connects"] == 2


def test_a_user_changes_a_setting_and_hears_its_state(broker: Mosquitto):
    with (
        Listener(broker.port, topics.state(SITE, BOARD, "door_enabled")) as user,
        Running(broker.port, configuration()) as board,
    ):
        assert user.next() == b"ON"
        user.client.publish(topics.setting(SITE, BOARD, "door_enabled"), b"OFF")
        assert user.next() == b"OFF"
        user.client.publish(topics.setting(SITE, BOARD, "no_such"), b"OFF")
        until(lambda: board.settings.counts()["unknown"] == 1)


def test_a_board_without_a_head_cannot_be_set_to_need_one():
    config = RuntimeConfig(BoardConfig("b1", "bundle", paradigm="offload"), (CameraConfig("door", "mqtt"),))
    paradigm = board_settings(config)[0]
    assert paradigm.parse("offload") == "offload"
    with pytest.raises(SettingError, match="is none of offload"):
        paradigm.parse("split")
