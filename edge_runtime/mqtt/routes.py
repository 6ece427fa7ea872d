"""Which function gets the messages of which topics. Messages that no function gets are counted, and logged rarely."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from paho.mqtt.client import topic_matches_sub

from edge_runtime.logs import is_told, printable
from edge_runtime.mqtt.connection import Message
from edge_runtime.mqtt.settings import MAX_PACKET

logger = logging.getLogger(__name__)

Rejection: TypeAlias = tuple[str, str]  # one of REJECTIONS, and advice to whoever sent the message

REJECTIONS = ("retained", "no_camera", "no_update", "no_route", "unreadable")  # why a message was not used


@dataclass(frozen=True, slots=True)
class Route:
    """Messages on topics that match `filter` go to `take`."""

    filter: str  # an MQTT topic filter to subscribe to
    take: Callable[[Message], Rejection | None]
    qos: int = 1
    # A broker repeats a retained message at every connection. Only a status is still true then: a picture, a reply or a
    # setting of yesterday is not.
    accepts_retained: bool = False
    optional: bool = False  # everything else works if the broker forbids the subscription
    max_packet: int = MAX_PACKET  # bytes


class Router:
    """The routes of one client; `message_arrived` is its `on_message`."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(routes)
        self._rejected = Counter(dict.fromkeys(REJECTIONS, 0))

    @property
    def subscriptions(self) -> list[tuple[str, int]]:
        return [(route.filter, route.qos) for route in self.routes]

    @property
    def optional(self) -> list[str]:
        return [route.filter for route in self.routes if route.optional]

    @property
    def max_packet(self) -> int:
        """Bytes; a client has one limit for all topics."""
        return max(route.max_packet for route in self.routes)

    def message_arrived(self, message: Message) -> None:
        """On the client's thread."""
        route = next((route for route in self.routes if topic_matches_sub(route.filter, message.topic)), None)
        rejection: Rejection | None
        if route is None:
            rejection = "no_route", "this client did not subscribe to the topic"
        elif message.retained and not route.accepts_retained:
            rejection = "retained", "publish it without the retain flag"
        else:
            rejection = route.take(message)
        if rejection is None:
            return
        why, advice = rejection
        self._rejected[why] += 1
        if is_told(count := self._rejected[why]):
            topic = printable(message.topic, 128)
            logger.warning("mqtt message rejected topic=%s reason=%s count=%d: %s", topic, why, count, advice)

    def rejected(self) -> dict[str, int]:
        """Messages by why they were not used; any thread."""
        return dict(self._rejected)
