"""The board's run-time switches: what may be changed while it runs, over `down/set/<name>`, told on `up/state/<name>`.

A table of names, each with the words it takes; what a stranger sends is one of them, or counted and left alone. The
state is what is in force, retained, told at every connection and after every change. It lives as long as the process:
after a restart the configuration is in force again, so that no forgotten switch outlives the one who set it.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_runtime.capture import Camera, Cameras
from edge_runtime.config import RuntimeConfig
from edge_runtime.errors import AiflowError
from edge_runtime.logs import is_told
from edge_runtime.mqtt.client import Message, Outcome, Publish
from edge_runtime.wire import event, topics

logger = logging.getLogger(__name__)

MAX_SETTING_BYTES = 256
PARADIGMS = ("auto", *event.PARADIGMS)


class SwitchError(AiflowError, ValueError):
    """A value that a switch does not take."""


@dataclass(slots=True)
class Switch:
    """One thing that can be changed."""

    name: str  # a level of topics: a-z 0-9 _ -, at most 32
    value: str  # in force
    parse: Callable[[str], str]  # what was sent, stripped, to a value; raises SwitchError
    apply: Callable[[str], None] = lambda _: None  # makes it so, on the MQTT client's thread; may raise SwitchError


def choice(name: str, value: str, words: Sequence[str], apply: Callable[[str], None] = lambda _: None) -> Switch:
    """A switch between words, in any case."""

    def parse(text: str) -> str:
        found = next((word for word in words if word.lower() == text.lower()), None)
        if found is None:
            raise SwitchError(f"{text[:32]!r} is none of {', '.join(words)}")
        return found

    return Switch(name, value, parse, apply)


def on_off(name: str, value: bool, apply: Callable[[bool], None]) -> Switch:
    """ON or OFF, as Home Assistant says it."""
    return choice(name, "ON" if value else "OFF", ("ON", "OFF"), lambda word: apply(word == "ON"))


def number(name: str, value: float, low: float, high: float, apply: Callable[[float], None] = lambda _: None) -> Switch:
    """A decimal number from low to high."""

    def parse(text: str) -> str:
        try:
            found = float(text)
        except ValueError:
            raise SwitchError(f"{text[:32]!r} is no number") from None
        if not low <= found <= high:  # true for NaN, too
            raise SwitchError(f"{found:g} is not from {low:g} to {high:g}")
        return f"{found:g}"

    return Switch(name, f"{value:g}", parse, lambda text: apply(float(text)))


def board_switches(config: RuntimeConfig, cameras: Cameras) -> list[Switch]:
    """paradigm, quality_floor, paused, and for each camera <camera>_enabled and <camera>_motion."""
    board = config.board
    # Whoever may set a switch may not send pictures out of a house that has forbidden it.
    paradigms: tuple[str, ...] = PARADIGMS if config.policy.may_offload else PARADIGMS[:-1]
    if board.paradigm == "offload":  # it has loaded no head
        paradigms = PARADIGMS[-1:]
    switches = [
        choice("paradigm", board.paradigm, paradigms),
        number("quality_floor", config.policy.quality_floor, 0, 1),
        on_off("paused", False, cameras.pause),
    ]
    for camera in cameras:
        switches += _camera_switches(camera)
    return switches


def _camera_switches(camera: Camera) -> list[Switch]:
    def set_motion(wanted: bool) -> None:
        camera.gate.enabled = wanted

    name = camera.config.name
    return [
        on_off(f"{name}_enabled", True, lambda wanted: camera.switch(enabled=wanted)),
        on_off(f"{name}_motion", camera.gate.enabled, set_motion),
    ]


@dataclass(slots=True)
class SwitchCounters:
    """What became of what was set."""

    set: int = 0  # taken; the value may have been in force already
    refused: int = 0  # no value of this switch
    unknown: int = 0  # no such switch
    retained: int = 0  # an old wish that the broker kept: not taken, it would come back with every connection


class Publisher(Protocol):
    """What is needed of MqttClient."""

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        on_outcome: Callable[[Outcome], None] | None = None,
    ) -> bool: ...


class Switches:
    """The table in force; `heard` and `births` are called on the MQTT client's thread, values may be read anywhere."""

    def __init__(self, site: str, board: str, switches: Iterable[Switch]) -> None:
        """Raises TopicError for a name that cannot be part of a topic, or an id that cannot."""
        self.counters = SwitchCounters()
        self._switches = {topics.setting(site, board, switch.name): switch for switch in switches}
        self._states = {switch.name: topics.state(site, board, switch.name) for switch in self._switches.values()}
        self._prefix = topics.setting(site, board, "x")[:-1]
        self._telling: dict[str, str] = {}  # values on their way to the broker, by name

    def __getitem__(self, name: str) -> str:
        """The value in force."""
        return next(switch.value for switch in self._switches.values() if switch.name == name)

    @property
    def subscription(self) -> tuple[str, int]:
        """For the MQTT client: every switch, so that a name with a mistake is heard and counted."""
        return f"{self._prefix}+", 1

    def births(self) -> list[Publish]:
        """The state of every switch, for each connection."""
        # QoS 0, since births go out at once, and 16 cameras have more switches than a broker's Receive Maximum may be:
        # no more of QoS 1 may be under way (MQTT 5, 4.9).
        return [Publish(self._states[s.name], s.value.encode(), qos=0, retain=True) for s in self._switches.values()]

    def heard(self, message: Message, client: Publisher) -> bool:
        """Takes a message on a switch's topic, and tells a new state; False for any other topic."""
        if not message.topic.startswith(self._prefix):
            return False
        switch = self._switches.get(message.topic)
        if switch is None:
            self._count("unknown", message.topic[len(self._prefix) :], f"is none of {', '.join(self._states)}")
        elif message.retained:
            self._count("retained", switch.name, "was set with the retain flag: set it again without")
        elif (why := self._set(switch, message.payload)) is not None:
            self._count("refused", switch.name, why)
        else:
            self._tell(switch, client)
        return True

    def _set(self, switch: Switch, payload: bytes) -> str | None:
        """None, or why it was refused."""
        if len(payload) > MAX_SETTING_BYTES:
            return f"has {len(payload)} bytes, at most {MAX_SETTING_BYTES} are read"
        try:
            value = switch.parse(payload.decode().strip())
            if value != switch.value:
                switch.apply(value)
                switch.value = value
                logger.info("switch set name=%s value=%s", switch.name, value)
        except (SwitchError, UnicodeDecodeError) as error:
            return str(error)
        self.counters.set += 1
        return None

    def _tell(self, switch: Switch, client: Publisher) -> None:
        """At most one message a switch is under way: who plays with it must not push requests out of the queue."""
        if switch.name in self._telling:
            return
        self._telling[switch.name] = value = switch.value

        def told(_: Outcome) -> None:
            del self._telling[switch.name]
            if switch.value != value:
                self._tell(switch, client)

        client.publish(self._states[switch.name], value.encode(), qos=1, retain=True, on_outcome=told)

    def _count(self, what: str, name: str, why: str) -> None:
        count = getattr(self.counters, what) + 1
        setattr(self.counters, what, count)
        if is_told(count):
            logger.warning("switch %s name=%.64r count=%d reason=%s", what, name, count, why)
