"""The server's MQTT side: requests in, replies out, a retained status, and proof that the broker delivers.

Some brokers grant a `$share` subscription and then deliver nothing. So the server asks itself: a probe on the request
topic that it would have as a board, repeated until one has come back. In a pool each member gets some of the others'
probes, and drops them. Knows nothing of what is in a request.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from edge_runtime.mqtt.client import Message, MqttClient, MqttSettings, Outcome, Publish, State
from edge_runtime.wire import TopicError, topics

logger = logging.getLogger(__name__)

PROBE = b"probe "  # no envelope begins so: in msgpack it is a number, not an array
PROBE_EXPIRY_S = 10.0
MIN_REPLY_EXPIRY_S = 1.0  # a reply that is late by a little still tells the board what became of its request


@dataclass(frozen=True, slots=True)
class Arrival:
    """One message on a board's request topic. Both functions may be called on any thread."""

    board: str
    payload: bytes
    at: float  # seconds, time.monotonic()
    accept: Callable[[], None]  # acknowledges it to the broker
    reply: Callable[[bytes, float], None]  # sends the board a reply's bytes, worth reading for so many seconds


class Gateway:
    """One connection for one server. Start it with `with`."""

    def __init__(
        self,
        settings: MqttSettings,
        site: str,
        server: str,
        pool: str,
        on_arrival: Callable[[Arrival], None],
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self.site, self.server = site, server
        self.is_proven = threading.Event()  # a probe has come back on this connection
        self.counts = {"undelivered": 0, "foreign_topics": 0}
        self._on_arrival, self._status = on_arrival, status
        self._probe = PROBE + os.urandom(8)
        self._topic = topics.server_status(site, server)
        self.client = MqttClient(
            settings,
            subscriptions=[(topics.request_share(pool, site), 1)],
            on_message=self._receive,
            will=Publish(self._topic, _json({"state": "offline", "server": server}), qos=1, retain=True),
            birth=lambda: [self._status_message(), self._probe_message()],
            on_state=self._changed,
            manual_ack=True,
        )

    def __enter__(self) -> "Gateway":
        self.client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def suspend(self, reason: str) -> None:
        """Leaves the share."""

    def resume(self) -> None:
        """Takes part in the share again."""

    def heartbeat(self) -> bool:
        """Tells the status, and probes again while no probe has come back. True: one has. Any thread."""
        if self.client.state is State.ONLINE:
            self._publish(self._status_message())
            if not self.is_proven.is_set():
                self._publish(self._probe_message())
        return self.is_proven.is_set()

    def summary(self) -> dict[str, int]:
        """Counters; any thread."""
        return self.counts | {f"mqtt_{name}": count for name, count in asdict(self.client.stats()).items()}

    def _publish(self, message: Publish) -> None:
        self.client.publish(
            message.topic, message.payload, qos=message.qos, retain=message.retain, expiry_s=message.expiry_s
        )

    def _receive(self, message: Message) -> None:
        """On the client's thread."""
        try:
            board = topics.board_of(message.topic)
        except TopicError:
            self.counts["foreign_topics"] += 1
            message.ack()
            return
        if message.payload.startswith(PROBE):
            if message.payload == self._probe:
                self.is_proven.set()
                self._publish(self._status_message())
            message.ack()
            return
        reply = partial(self._reply, topics.reply_topic_for(message.topic))
        self._on_arrival(Arrival(board, message.payload, time.monotonic(), message.ack, reply))

    def _reply(self, topic: str, data: bytes, expiry_s: float) -> None:
        self.client.publish(topic, data, expiry_s=max(expiry_s, MIN_REPLY_EXPIRY_S), on_outcome=self._replied)

    def _replied(self, outcome: Outcome) -> None:
        if outcome is not Outcome.DELIVERED:
            self.counts["undelivered"] += 1
            logger.warning("reply not delivered server=%s outcome=%s", self.server, outcome.value)

    def _changed(self, state: State, _: str) -> None:
        if state is State.CONNECTING:
            self.is_proven.clear()

    def _status_message(self) -> Publish:
        status = {"state": "online", "server": self.server, "share_proven": self.is_proven.is_set()}
        return Publish(self._topic, _json(status | self._status()), qos=1, retain=True)

    def _probe_message(self) -> Publish:
        return Publish(topics.request(self.site, self.server), self._probe, qos=1, expiry_s=PROBE_EXPIRY_S)


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()
