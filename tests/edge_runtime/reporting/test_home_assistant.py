"""The device message follows Home Assistant's documentation, and its templates say what the events say."""

import re
from datetime import datetime, timezone
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.capture.camera import StateName
from edge_runtime.config import (
    BoardConfig,
    CameraConfig,
    HomeAssistantConfig,
    PolicyConfig,
    RuntimeConfig,
    UpdatesConfig,
    convert,
)
from edge_runtime.errors import ConfigError
from edge_runtime.reporting import board_settings
from edge_runtime.reporting.discovery import Discovery
from edge_runtime.reporting.home_assistant import CAMERA_STATES, device_message, encode_device_message
from edge_runtime.reporting.templates import quoted
from edge_runtime.wire import Event, encode_event, topics
from tests.home_assistant import DISCOVERY_TOPIC, MAX_STATE, Entity, check

EVENT, LAST = topics.event("home", "porch"), topics.last("home", "porch")
STATUS = topics.status("home", "porch")
FRONT = CameraConfig("front", "mqtt", questions=("gate",))
DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def configuration(*cameras: CameraConfig, images: bool = True, **board: Any) -> RuntimeConfig:
    return RuntimeConfig(
        BoardConfig("porch", "bundle", **board),
        cameras or (FRONT, CameraConfig("back-yard", "mqtt")),
        homeassistant=HomeAssistantConfig(images=images),
    )


def message(config: RuntimeConfig | None = None, **has: bool) -> dict[str, Any]:
    config = config or configuration()
    has = {"has_labels": True, "has_link": True} | has
    return check(encode_device_message(device_message(config, board_settings(config), **has), {}))


def event(camera: str = "front", **fields: Any) -> bytes:
    captured = datetime(2026, 5, 1, tzinfo=timezone.utc)
    return encode_event(Event(**{"type": "update", "frame": "0f", "camera": camera, "captured": captured} | fields))


def entity(name: str) -> Entity:
    return Entity(message()["cmps"][name])


def test_each_camera_has_an_event_sensors_and_switches_and_the_board_its_settings():
    assert set(message(configuration(FRONT))["cmps"]) == {
        "problem",
        "link",
        *(
            f"setting.{name}"
            for name in ("paradigm", "quality_floor", "paused", "front_enabled", "front_motion", "front_prompt")
        ),
        *(f"camera.front.{kind}" for kind in ("event", "caption", "label", "question.gate", "paradigm")),
        *(f"camera.front.{kind}" for kind in ("bytes", "after", "state", "image")),
    }


def test_what_the_board_does_not_have_is_left_out():
    entities = message(configuration(FRONT, images=False), has_labels=False, has_link=False)["cmps"]
    assert not {"link", "camera.front.label", "camera.front.image"} & entities.keys()


def test_a_board_with_updates_shows_its_bundle_and_can_be_told_to_install_one_only_if_it_asks():
    for updates, extra in ((UpdatesConfig("f"), set()), (UpdatesConfig("f", ask=True), {"cmd_t", "pl_inst"})):
        entities = message(msgspec.structs.replace(configuration(), updates=updates))["cmps"]
        assert {"cmd_t", "pl_inst"} & entities["bundle"].keys() == extra


def test_a_board_offers_only_those_paradigms_that_it_takes():
    config = msgspec.structs.replace(configuration(images=False), policy=PolicyConfig(may_offload=False))
    assert message(config)["cmps"]["setting.paradigm"]["ops"] == ["auto", "device", "split", "speculative"]
    assert message(configuration(paradigm="offload"))["cmps"]["setting.paradigm"]["ops"] == ["offload"]


def test_cameras_and_questions_with_similar_names_have_entities_of_their_own():
    questions = ("event", "caption", "label")
    cameras = [CameraConfig(name, "mqtt", questions=questions) for name in ("a", "a_question", "a-question", "A")]
    entities = message(configuration(*cameras))["cmps"]
    assert len(entities) == 2 + 3 + len(cameras) * (3 + 8 + len(questions))


def discovery(cameras: int, questions: int) -> Discovery:
    names = [f"{number:02}" + "x" * 22 for number in range(cameras)]
    asked = tuple(f"{number:02}" + "q" * 30 for number in range(questions))
    config = configuration(*(CameraConfig(name, "mqtt", questions=asked) for name in names), site="s" * 32)
    entities = device_message(config, board_settings(config), has_labels=True, has_link=True)
    return Discovery(config.homeassistant, "s" * 32, "b" * 32, entities, lambda _: None)


def test_sixteen_cameras_with_four_questions_and_the_longest_names_fit_and_more_is_refused_by_name():
    discovery(16, 4)
    with pytest.raises(ConfigError, match=r"message has 4[0-9]{5} bytes, at most 262144 are sent: divide the cameras"):
        discovery(16, 16)


def test_the_discovery_topic_is_one_that_home_assistant_reads():
    assert DISCOVERY_TOPIC.fullmatch(topics.discovery("homeassistant", "my-site", "porch-2"))


@pytest.mark.parametrize("prefix", ["", "a" * 65, "a/#", "+", "a//b", "/a", "$SYS", "a\0", "a\nb", "{{ x }}", "<b>"])
def test_a_prefix_that_cannot_be_part_of_a_topic_is_refused_by_name(tmp_path, prefix):
    data = {"board": {"id": "b", "bundle": "x"}, "cameras": [{"name": "c", "source": "mqtt"}]}
    with pytest.raises(ConfigError, match=r"homeassistant.prefix = .*, want a prefix of topics"):
        convert(tmp_path / "board.toml", data | {"homeassistant": {"prefix": prefix}}, RuntimeConfig)


@pytest.mark.parametrize("name", ["{{ 1 }}", "a'b", "a b", "", "a\n", "<b>", "\u202ea"])
def test_a_hostile_camera_name_is_refused_and_would_never_become_part_of_a_template(tmp_path, name):
    data = {"board": {"id": "b", "bundle": "x"}, "cameras": [{"name": name, "source": "mqtt"}]}
    with pytest.raises(ConfigError, match=r"name = .*, want a name"):
        convert(tmp_path / "board.toml", data, RuntimeConfig)
    with pytest.raises(AssertionError):
        quoted(name)


def test_pictures_for_home_assistant_are_refused_if_pictures_may_not_leave_the_board():
    with pytest.raises(ConfigError, match=r"images = true, but .* may_offload = false"):
        RuntimeConfig(
            BoardConfig("b", "x"),
            (FRONT,),
            homeassistant=HomeAssistantConfig(images=True),
            policy=PolicyConfig(may_offload=False),
        )


# ---- what the templates make of events ----

HOSTILE = [
    "{{ 7 * 7 }} {% for x in range(9) %}{{ x }}{% endfor %} {{ states('sensor.x') }} {# gone #}",
    "<script>alert(1)</script>",
    "a\nb\r\n\x00\x1b[31m\u202ec",
    '"}, "event_type": "trigger", {"',
    "x" * 8192,
    "\\u0027 ' \" \\",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_caption_is_shown_as_text_without_control_characters_and_never_evaluated(text):
    caption, fired = entity("camera.front.caption"), entity("camera.front.event")
    payload = event(text=text, final=True)
    caption.receive(LAST, payload)
    fired.receive(EVENT, payload)
    shown = UNPRINTABLE.sub(" ", text)
    assert caption.state == shown[:MAX_STATE].strip()
    assert caption.attributes["text"] == fired.events[0]["text"] == shown
    assert (fired.events[0]["event_type"], caption.attributes["camera"]) == ("update", "front")
    assert (fired.events[0]["label"], fired.events[0]["why"]) == (None, "")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_are_shown_as_text_that_keeps_its_direction(text):
    name, shown = text[:64], UNPRINTABLE.sub(" ", text[:64])
    payload = event(label=name, why=name, trigger=name, scores={name: 1.0}, answers={"gate": {name: 1.0}})
    received = {kind: entity(f"camera.front.{kind}") for kind in ("event", "label", "question.gate")}
    for each in received.values():
        each.receive(LAST, payload)
        each.receive(EVENT, payload)
    (fired,) = received["event"].events
    assert [fired[field] for field in ("label", "why", "trigger")] == [shown] * 3
    assert received["label"].state == received["question.gate"].state == shown.strip()
    for values in (fired["answers"]["gate"], received["label"].attributes["scores"]):
        assert [UNPRINTABLE.sub(" ", key) for key in values] == [shown]
        assert not any(DIRECTION.search(key) for key in values)


SENSORS = {
    name: keys for name, keys in message()["cmps"].items() if keys["p"] in ("event", "sensor") and "stat_t" in keys
}


@given(
    st.builds(
        event,
        st.sampled_from(["front", "back-yard"]),
        type=st.sampled_from(["new", "update", "lost", "trigger"]),
        text=st.text(st.characters(exclude_categories=["Cs"]), max_size=400),
        label=st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64),
        answers=st.dictionaries(
            st.sampled_from(["gate", "door"]), st.dictionaries(st.text("ab{'\n", min_size=1), st.floats(0, 1))
        ),
        final=st.booleans(),
        paradigm=st.sampled_from([None, "device", "speculative"]),
        bytes_up=st.integers(0, 1000),
        confidence=st.none() | st.floats(0, 1),
    )
)
def test_any_event_is_shown_by_its_camera_alone_and_no_template_fails(payload):
    what = msgspec.json.decode(payload)
    for name, keys in SENSORS.items():
        shown = Entity(keys)
        before = shown.state = keys.get("ops", ["0"])[0]
        shown.attributes = {"text": "before"}
        shown.receive(EVENT, payload)
        shown.receive(LAST, payload)
        if f"camera.{what['camera']}." not in name:
            assert (shown.state, shown.events) == (before, []), name
            assert shown.attributes.get("text") in ("before", None)
        elif name.endswith(".bytes"):
            assert shown.state == str(what.get("bytes_up", 0))


def test_a_question_shows_its_likeliest_class_and_all_probabilities():
    gate = entity("camera.front.question.gate")
    gate.receive(LAST, event(text="a gate", answers={"gate": {"open": 0.7, "shut": 0.3}}))
    assert (gate.state, gate.attributes) == ("open", {"probabilities": {"open": 0.7, "shut": 0.3}})
    gate.receive(LAST, event(text="without an answer"))
    assert (gate.state, gate.attributes) == ("open", {"probabilities": {"open": 0.7, "shut": 0.3}})


def test_a_draft_and_a_lost_frame_leave_the_time_to_the_verified_text_as_it_was():
    after = entity("camera.front.after")
    after.receive(LAST, event(type="update", final=True, after_ms=812.4))
    for other in (event(type="new", after_ms=5.0), event(type="lost", final=True, after_ms=9.0)):
        after.receive(LAST, other)
    assert float(after.state) == 812.4


def test_the_status_shows_problems_the_link_and_the_cameras_states():
    problem, link, state = entity("problem"), entity("link"), entity("camera.front.state")
    online = {"state": "online", "cameras": {"front": "live"}, "problems": {}}
    seen = []
    for status in (online, online | {"problems": {"link": "none"}}, {"state": "offline"}):
        for shown in (problem, link, state):
            shown.receive(STATUS, msgspec.json.encode(status))
        seen.append((problem.state, link.state, state.state, problem.attributes))
    assert seen == [
        ("OFF", "ON", "live", {"problems": {}}),
        ("ON", "OFF", "live", {"problems": {"link": "none"}}),
        ("OFF", "ON", "live", {"problems": {}}),
    ]


@pytest.mark.parametrize(
    ("state", "version", "percent", "shown"),
    [
        ("idle", 0, 0, ("off", 2, None, False)),
        ("receiving", 3, 40, ("on", 3, 40, True)),
        ("waiting", 3, 100, ("on", 3, None, False)),
        ("testing", 3, 100, ("on", 3, None, True)),
        ("installed", 3, 100, ("on", 3, None, True)),
        ("trial", 0, 0, ("off", 2, None, False)),
    ],
)
def test_the_bundle_shows_what_is_installed_what_comes_and_how_far_it_is(state, version, percent, shown):
    bundle = Entity(message(msgspec.structs.replace(configuration(), updates=UpdatesConfig("f")))["cmps"]["bundle"])
    update = {"state": state, "failed": "", "why": "{{ x }}\u202e", "version": version, "percent": percent}
    status = {"state": "online", "bundle_name": "everyday", "bundle_version": 2, "update": update}
    for payload in (status, {"state": "offline"}):  # the last will changes nothing
        bundle.receive(STATUS, msgspec.json.encode(payload))
        found = bundle.attributes
        assert (bundle.state, found["latest_version"], found["update_percentage"], found["in_progress"]) == shown
        assert (found["installed_version"], found["title"], found["release_summary"]) == (2, "everyday", "{{ x }} ")


def test_its_words_are_those_of_the_cameras():
    assert get_args(StateName) == CAMERA_STATES
