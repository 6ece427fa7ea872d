"""Announces the board to Home Assistant, and takes back what it no longer has.

The device message is retained: published at each connection, and again when Home Assistant says that it has started. An
earlier run may have announced other cameras: the broker still has its message, and what it had more is removed. With
`discovery = false` the message is deleted, and with it the device.
"""

import logging
import random
import threading
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edge_runtime.config import HomeAssistantConfig
from edge_runtime.errors import ConfigError
from edge_runtime.mqtt import Message, Publish
from edge_runtime.mqtt.routes import Route
from edge_runtime.reporting.home_assistant import encode_device_message
from edge_runtime.wire import topics

logger = logging.getLogger(__name__)

BIRTH = b"online"  # what Home Assistant publishes when it has started
MAX_DELAY_S = 10.0  # after which each board answers that, so that a thousand boards do not answer at once
MAX_MESSAGE = 256 * 1024  # bytes; what a broker takes that `aiflow broker config` has configured


class _Announced(msgspec.Struct, frozen=True):
    """The platform of an entity in a message of an earlier run."""

    p: Annotated[str, Meta(pattern=r"^[a-z_]{1,32}\Z")]


class _EarlierMessage(msgspec.Struct, frozen=True):
    cmps: Annotated[dict[Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}\Z")], _Announced], Meta(max_length=1024)]


class Discovery:
    """The device message of one board, and when it is published."""

    def __init__(
        self,
        config: HomeAssistantConfig,
        site: str,
        board: str,
        message: Mapping[str, Any],
        publish: Callable[[Publish], None],
        delay_s: Callable[[], float] = lambda: random.uniform(0, MAX_DELAY_S),
    ) -> None:
        """message: see `device_message`. publish: to the users' broker, never blocks. delay_s: before an answer.

        Raises ConfigError for a board with more entities than a message holds.
        """
        if (size := len(encode_device_message(message, {}))) > MAX_MESSAGE:
            raise ConfigError(
                f"[homeassistant]: the board's message has {size} bytes, at most {MAX_MESSAGE} are sent: divide the "
                "cameras and their questions between several boards, or give them shorter names"
            )
        self._config, self._message, self._publish, self._delay_s = config, message, publish, delay_s
        self._topic = topics.discovery(config.prefix, site, board)
        self._timer: threading.Timer | None = None

    def routes(self) -> list[Route]:
        """What Home Assistant says, and the message that the broker has of us."""
        if not self._config.discovery:
            return []
        status = topics.discovery_status(self._config.prefix)
        # A retained "online" is as old as the connection, at which the message was published anyway.
        return [
            Route(status, self.home_assistant_said, qos=0, accepts_retained=True, optional=True),
            Route(self._topic, self.own_message_arrived, accepts_retained=True, optional=True),
        ]

    def birth(self) -> list[Publish]:
        """To publish at each connection."""
        return [self._as_publish({}) if self._config.discovery else Publish(self._topic, b"", retain=True)]

    def home_assistant_said(self, message: Message) -> None:
        """Publishes the device message again, a random time after Home Assistant has started."""
        if message.retained or message.payload != BIRTH or (self._timer and self._timer.is_alive()):
            return
        self._timer = threading.Timer(self._delay_s(), lambda: self._publish(self._as_publish({})))
        self._timer.name, self._timer.daemon = "homeassistant", True
        self._timer.start()

    def own_message_arrived(self, message: Message) -> None:
        """Removes the entities that an earlier run announced and this one does not have."""
        if not message.retained or not message.payload:  # what was published just now also comes back
            return
        try:
            earlier = msgspec.json.decode(message.payload, type=_EarlierMessage)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            logger.warning("homeassistant message of an earlier run not read topic=%s error=%s", self._topic, error)
            return
        removed = {name: keys.p for name, keys in earlier.cmps.items() if name not in self._message["cmps"]}
        if removed:
            logger.info("homeassistant entities removed count=%d", len(removed))
            self._publish(self._as_publish(removed))
            self._publish(self._as_publish({}))  # the one that stays at the broker

    def close(self) -> None:
        """Nothing is published from now on."""
        if self._timer:
            self._timer.cancel()

    def _as_publish(self, removed: Mapping[str, str]) -> Publish:
        return Publish(self._topic, encode_device_message(self._message, removed), retain=True)
