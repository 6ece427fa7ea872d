"""The server's side of MQTT: requests in, replies out, a retained status, and a running check that requests arrive.

Some brokers grant a `$share` subscription and then deliver nothing, and a foreign client in the share swallows what is
delivered to it. Neither shows in any acknowledgement. So the server sends probes to the request topic that it would
have if it were a board. The pool's member that gets a probe sends it back on the prober's reply topic. A healthy
neighbour therefore returns a probe, and a probe that does not come back means that boards lose requests too.

This module knows nothing of what is in a request.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from edge_runtime.logs import is_told
from edge_runtime.mqtt import Message, MqttClient, MqttSettings, Outcome, Publish, State
from edge_runtime.reporting import Values
from edge_runtime.wire import TopicError, topics

logger = logging.getLogger(__name__)

PROBE = b"probe "  # not the start of any envelope: in msgpack this byte is a number, not an array
PROBE_BYTES = len(PROBE) + 8
PROBE_EXPIRY_S = 10.0  # a probe that is not back by then is missing
RETURNED_IN_A_ROW = 10  # probes; after a missing one the share is proven again when so many came back
MIN_REPLY_EXPIRY_S = 1.0  # a reply that is slightly late still tells the board what became of its request
MAX_REASON = 200  # characters


@dataclass(frozen=True, slots=True)
class Arrival:
    """One message on a board's request topic. Both functions may be called on any thread."""

    board: str
    payload: bytes
    at: float  # seconds, time.monotonic()
    acknowledge: Callable[[], None]  # to the broker
    reply: Callable[[bytes, float], None]  # sends the bytes of a reply, useful for so many seconds, to the board


class Probes:
    """What this server's probes say about one connection. No I/O; the caller gives the time and the random bytes."""

    def __init__(self) -> None:
        self.sent = self.missing = 0  # since the start
        self.reset()

    def reset(self) -> None:
        """Forget the probes on their way: a new connection has to be proven anew."""
        self.is_proven = False  # as far as the last probes tell, every request reaches a server
        self._open: dict[bytes, float] = {}  # payload -> when it was sent
        self._wanted = 1  # returned probes until the share is proven

    def send(self, random_bytes: bytes, now: float) -> bytes:
        """The payload of a new probe."""
        payload = PROBE + random_bytes
        self._open[payload] = now
        self.sent += 1
        return payload

    def returned(self, payload: bytes) -> None:
        """A message came on the reply topic. Anything but an open probe changes nothing."""
        if self._open.pop(payload, None) is not None:
            self._wanted -= 1
            self.is_proven = self.is_proven or self._wanted <= 0

    def expire(self, now: float) -> int:
        """How many probes are missing since the last call."""
        late = [payload for payload, sent_at in self._open.items() if now - sent_at >= PROBE_EXPIRY_S]
        for payload in late:
            del self._open[payload]
        if late:
            self.missing += len(late)
            self.is_proven, self._wanted = False, RETURNED_IN_A_ROW
        return len(late)


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
        on_questions: Callable[[bytes], None] | None = None,
        on_state: Callable[[State, str], None] = lambda *_: None,
    ) -> None:
        """on_questions: gets each message on the topic that sets the questions, on the client's thread; None: none.

        on_state: hears of each change of the connection, and why, on the client's thread.
        """
        self.site, self.server = site, server
        self.is_proven = threading.Event()  # probes come back on this connection
        self.counts = {"undelivered": 0, "foreign_topics": 0, "retained_requests": 0, "retained_settings": 0}
        self._on_arrival, self._status, self._on_state = on_arrival, status, on_state
        self._lock = threading.Lock()  # over the next three; held for a few statements
        self._probes = Probes()
        self._is_loss_logged = False
        self._suspended = ""  # why this server takes no requests; empty: it does
        self._status_topic = topics.server_status(site, server)
        self._probe_topic, self._returned_topic = topics.request(site, server), topics.reply(site, server)
        self._questions_topic, self._on_questions = topics.server_setting(site, server, "questions"), on_questions
        optional = [self._questions_topic] if on_questions else []  # a broker's rights may be older than this topic
        self._always = [(topic, 1) for topic in (self._returned_topic, *optional)]
        self._requests = [(topics.request_share(pool, site), 1)]
        self.client = MqttClient(
            settings,
            subscriptions=self._always + self._requests,
            optional=optional,
            on_message=self._receive,
            will=Publish(self._status_topic, _json({"state": "offline", "server": server}), qos=1, retain=True),
            birth=lambda: [self._status_message()],
            on_state=self._changed,
            manual_ack=True,
        )

    def __enter__(self) -> "Gateway":
        self.client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    # ---- any thread ----

    def heartbeat(self) -> bool:
        """Publish the status and a probe. False: probes are missing, so call it again soon. Call it regularly."""
        with self._lock:
            self._count_missing(time.monotonic())
            is_calm = self._probes.is_proven or bool(self._suspended)
        if self.client.state is State.ONLINE:
            self._publish_all()
        return is_calm

    def suspend(self, reason: str) -> None:
        """Leave the share and say why in the status; other servers of the pool get the requests from now on.

        Requests that the broker has already assigned to this server still arrive. A later reason replaces the first.
        """
        self._set_suspended(reason[:MAX_REASON] or "suspended")

    def resume(self) -> None:
        """Take requests again after `suspend`. Does nothing if the server takes them already."""
        self._set_suspended("")

    def summary(self) -> Values:
        """Numbers, with the names of server/counters.py."""
        with self._lock:
            probes = {"sent": self._probes.sent, "missing": self._probes.missing}
            share = {"accepting": int(not self._suspended), "share_proven": int(self._probes.is_proven)}
        return {**self.counts, **share, "probes": probes, **self.client.counts()}

    def _set_suspended(self, reason: str) -> None:
        with self._lock:
            if reason == self._suspended:
                return
            if bool(reason) != bool(self._suspended):
                self.client.set_subscriptions(self._always + ([] if reason else self._requests))
                self._forget_probes()
            self._suspended = reason
        if reason:
            logger.warning("server takes no requests server=%s reason=%s", self.server, reason)
        else:
            logger.info("server takes requests again server=%s", self.server)
        if self.client.state is State.ONLINE:  # otherwise the status follows when it is
            self._publish_all()

    def _publish_all(self) -> None:
        for message in (self._status_message(), *self._probe_messages()):
            self.client.send(message)

    def _status_message(self) -> Publish:
        with self._lock:
            status = {
                "state": "online",
                "server": self.server,
                "share_proven": self._probes.is_proven,
                "probes": {"sent": self._probes.sent, "missing": self._probes.missing},
                "accepting": not self._suspended,
                "why": self._suspended,
            }
        return Publish(self._status_topic, _json(status | self._status()), qos=1, retain=True)

    def _probe_messages(self) -> list[Publish]:
        """One probe; none from a suspended server, since it may be the only one of its pool."""
        with self._lock:
            if self._suspended:
                return []
            payload = self._probes.send(os.urandom(PROBE_BYTES - len(PROBE)), time.monotonic())
        return [Publish(self._probe_topic, payload, qos=1, expiry_s=PROBE_EXPIRY_S)]

    # ---- with the lock held ----

    def _count_missing(self, now: float) -> None:
        if self._probes.expire(now) == 0:
            return
        self.is_proven.clear()
        if not self._is_loss_logged:
            self._is_loss_logged = True
            logger.warning(
                "requests get lost: a probe did not come back server=%s; want only servers in the share: let the "
                "broker's rights keep everybody else out, and look for a server that hangs",
                self.server,
            )

    def _forget_probes(self) -> None:
        self._probes.reset()
        self.is_proven.clear()

    # ---- the client's thread ----

    def _receive(self, message: Message) -> None:
        if message.topic == self._returned_topic:
            self._probe_returned(message.payload)
            message.ack()
            return
        if message.topic == self._questions_topic and self._on_questions:
            if message.retained:  # of an earlier time, as for a board's settings
                self.counts["retained_settings"] += 1
            else:
                self._on_questions(message.payload)
            message.ack()
            return
        try:
            board = topics.board_of(message.topic)
        except TopicError:
            self.counts["foreign_topics"] += 1
            message.ack()
            return
        reply = partial(self._reply, topics.reply_topic_for(message.topic))
        if message.retained:  # kept from an earlier time: nobody waits for the answer
            self.counts["retained_requests"] += 1
            message.ack()
        elif message.payload.startswith(PROBE):
            if len(message.payload) == PROBE_BYTES:
                reply(message.payload, PROBE_EXPIRY_S)
            message.ack()
        else:
            self._on_arrival(Arrival(board, message.payload, time.monotonic(), message.ack, reply))

    def _probe_returned(self, payload: bytes) -> None:
        with self._lock:
            self._probes.returned(payload)
            has_changed = self._probes.is_proven and not self.is_proven.is_set()
            if has_changed:
                self.is_proven.set()
            was_lossy, self._is_loss_logged = self._is_loss_logged, self._is_loss_logged and not has_changed
        if has_changed:
            if was_lossy:
                logger.info("probes come back again server=%s", self.server)
            self.client.send(self._status_message())

    def _reply(self, topic: str, data: bytes, expiry_s: float) -> None:
        self.client.publish(topic, data, expiry_s=max(expiry_s, MIN_REPLY_EXPIRY_S), on_outcome=self._replied)

    def _replied(self, outcome: Outcome) -> None:
        if outcome is not Outcome.DELIVERED:
            self.counts["undelivered"] += 1
            if is_told(count := self.counts["undelivered"]):
                logger.warning("reply not delivered server=%s outcome=%s count=%d", self.server, outcome.value, count)

    def _changed(self, state: State, reason: str) -> None:
        self._on_state(state, reason)
        if state not in (State.ONLINE, State.DEGRADED):
            with self._lock:
                self._forget_probes()
        elif state is State.ONLINE:  # once more, behind a status of the last connection that is sent again
            self._publish_all()


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()
