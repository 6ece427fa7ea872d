"""The board's run-time settings: what users may change over `down/set/<name>`, with its value on `up/state/<name>`.

A table of names, each with the values it takes. A message either is one of these values, or is counted and changes
nothing. The value in force is retained at the broker: published at each connection and after each change. It lives as
long as the process: after a restart the configuration is in force again, so that nobody's forgotten setting stays.
This module decides what changes; users.py applies it to the parts of the board.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from edge_runtime.config import PROMPT_NAME, RuntimeConfig
from edge_runtime.errors import AiflowError
from edge_runtime.logs import is_told, printable
from edge_runtime.mqtt import Message, MqttClient, Outcome, Publish
from edge_runtime.wire import event, topics

logger = logging.getLogger(__name__)

MAX_SETTING_BYTES = 256
PARADIGMS = ("auto", *event.PARADIGMS)
NO_PROMPT = "none"  # the servers' usual one; an empty text would remove the retained state
ON_OFF = ("OFF", "ON")  # as Home Assistant says it; by truth value
Kind = Literal["paradigm", "quality_floor", "paused", "enabled", "motion", "prompt"]


class SettingError(AiflowError, ValueError):
    """A value that a setting does not take."""


@dataclass(slots=True)
class Setting:
    kind: Kind
    value: str  # in force
    parse: Callable[[str], str]  # the stripped text of a message to a value; raises SettingError
    camera: str = ""  # if it is one camera's
    words: tuple[str, ...] = ()  # the values, if these are few

    @property
    def name(self) -> str:
        """A level of topics."""
        return f"{self.camera}_{self.kind}" if self.camera else self.kind


def choice(words: Sequence[str]) -> Callable[[str], str]:
    """One of these words, in any case."""

    def parse(text: str) -> str:
        found = next((word for word in words if word.lower() == text.lower()), None)
        if found is None:
            raise SettingError(f"{printable(text, 32)!r} is none of {', '.join(words)}")
        return found

    return parse


def number(low: float, high: float) -> Callable[[str], str]:
    """A decimal number from low to high."""

    def parse(text: str) -> str:
        try:
            found = float(text)
        except ValueError:
            raise SettingError(f"{printable(text, 32)!r} is not a number") from None
        if not low <= found <= high:  # also for NaN
            raise SettingError(f"{found:g} is not from {low:g} to {high:g}")
        return f"{found:g}"

    return parse


def prompt_name(text: str) -> str:
    """The name of a prompt, which a server may have, or "none"."""
    if text.lower() == NO_PROMPT:
        return NO_PROMPT
    if not re.fullmatch(PROMPT_NAME, text):
        raise SettingError(f"{printable(text, 32)!r} is neither a prompt's name nor {NO_PROMPT!r}")
    return text


def no_prompt(unlike: str) -> Callable[[str], str]:
    """ "none" alone, for a camera with `CameraConfig.unlike_prompts`: no server would answer all that it asks."""

    def parse(text: str) -> str:
        if prompt_name(text) != NO_PROMPT:
            raise SettingError(f"this camera has {unlike}, which no server with prompts answers: want {NO_PROMPT!r}")
        return NO_PROMPT

    return parse


def board_settings(config: RuntimeConfig) -> list[Setting]:
    """paradigm, quality_floor, paused, and for each camera <camera>_enabled, <camera>_motion and <camera>_prompt."""
    board = config.board
    # Users may not make a board send pictures if its configuration forbids that.
    paradigms: tuple[str, ...] = PARADIGMS if config.policy.may_offload else PARADIGMS[:-1]
    if board.paradigm == "offload":  # it has loaded no head
        paradigms = PARADIGMS[-1:]
    settings = [
        Setting("paradigm", board.paradigm, choice(paradigms), words=paradigms),
        Setting("quality_floor", f"{config.policy.quality_floor:g}", number(0, 1)),
        Setting("paused", "OFF", choice(ON_OFF)),
    ]
    for camera in config.cameras:
        settings.append(Setting("enabled", "ON", choice(ON_OFF), camera.name))
        settings.append(Setting("motion", ON_OFF[camera.motion.enabled], choice(ON_OFF), camera.name))
        prompt = no_prompt(camera.unlike_prompts) if camera.unlike_prompts else prompt_name
        settings.append(Setting("prompt", camera.prompt or NO_PROMPT, prompt, camera.name))
    return settings


class RemoteSettings:
    """The settings in force. Values may be read on any thread; everything else is for the MQTT client's thread."""

    def __init__(
        self, site: str, board: str, settings: Iterable[Setting], apply: Callable[[Setting], None] = lambda _: None
    ) -> None:
        """apply: makes a new value effective. Raises TopicError for an id or a name that cannot be part of a topic."""
        self._apply = apply
        self._settings = {topics.setting(site, board, setting.name): setting for setting in settings}
        self._by_name = {setting.name: setting for setting in self._settings.values()}
        self._states = {name: topics.state(site, board, name) for name in self._by_name}
        self._counts = Counter({"set": 0, "refused": 0, "unknown": 0})
        self._publishing: dict[str, str] = {}  # values on their way to the broker, by name
        # Every name: a message to a name with a mistake in it is counted.
        self.filter = topics.settings(site, board)

    def __getitem__(self, name: str) -> str:
        """The value in force."""
        return self._by_name[name].value

    def counts(self) -> dict[str, int]:
        """Messages, by what became of them. set: the value may have been in force before."""
        return dict(self._counts)

    def states(self) -> list[Publish]:
        """All values in force, to publish at each connection."""
        # QoS 0: these go out at once, and 16 cameras have more settings than a broker's Receive Maximum may be. No more
        # messages of QoS 1 may be in flight (MQTT 5, 4.9).
        return [Publish(self._states[name], s.value.encode(), qos=0, retain=True) for name, s in self._by_name.items()]

    def message_arrived(self, message: Message, client: MqttClient) -> None:
        """A message on a topic that matches `filter`; publishes the state through the client."""
        setting = self._settings.get(message.topic)
        if setting is None:
            self._reject("unknown", message.topic.rpartition("/")[2], f"want one of {', '.join(self._states)}")
        elif (why := self._set(setting, message.payload)) is not None:
            self._reject("refused", setting.name, why)
        else:
            self._publish_state(setting, client)

    def _set(self, setting: Setting, payload: bytes) -> str | None:
        """None, or why the value was refused."""
        if len(payload) > MAX_SETTING_BYTES:
            return f"has {len(payload)} bytes, at most {MAX_SETTING_BYTES} are read"
        try:
            value = setting.parse(payload.decode().strip())
        except (SettingError, UnicodeDecodeError) as error:
            return str(error)
        if value != setting.value:
            setting.value = value
            self._apply(setting)
            logger.info("setting changed name=%s value=%s", setting.name, value)
        self._counts["set"] += 1
        return None

    def _publish_state(self, setting: Setting, client: MqttClient) -> None:
        """At most one message per setting is on its way: a flood of changes must not push requests out of the queue."""
        if setting.name in self._publishing:
            return
        self._publishing[setting.name] = value = setting.value

        def published(_: Outcome) -> None:
            del self._publishing[setting.name]
            if setting.value != value:
                self._publish_state(setting, client)

        client.publish(self._states[setting.name], value.encode(), qos=1, retain=True, on_outcome=published)

    def _reject(self, what: str, name: str, why: str) -> None:
        self._counts[what] += 1
        if is_told(count := self._counts[what]):
            logger.warning("setting %s name=%r count=%d reason=%s", what, printable(name, 64), count, why)
