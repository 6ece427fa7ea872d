"""The MQTT 5 client of board and server, around paho-mqtt 2. It knows nothing of envelopes, topics or models.

What it promises:
- It connects for ever, with full jitter between attempts. It survives a broker that is killed, frozen or comes back
  empty: every connection subscribes again, publishes the birth messages again, and is ONLINE only after the SUBACK.
- `publish` never blocks and never uses the network on the caller's thread. Messages that are not sent yet wait in a
  queue with two bounds, messages and bytes. When it is full the oldest message is dropped. A window bounds what is in
  flight.
- Every `publish` ends exactly once in an `Outcome`. `on_outcome` gets it on the client's thread, or on the publisher's
  thread while the client is not running.
- QoS 1 is at least once: messages in flight when a connection is lost are sent again, before anything newer. Before a
  connection is closed here, the pending PUBACKs are read, so that acknowledged messages are not sent again.
- A callback that raises is logged and counted, and the network loop goes on.
- It judges the connection by progress: if no PUBACK comes for messages in flight it is DEGRADED, and after two
  keepalives it opens a new socket.
- A message that the broker refuses, or closes the connection for again and again, ends once and causes no endless loop.
  One that needs longer than two keepalives on a thin link does: `keepalive_s` must suit the largest message.

What it does not promise: that anybody received the message. A PUBACK says only that the broker has it. Only a reply
says that a request was served (requests/).

One thread, the owner, uses paho and calls every callback. Other threads append to queues and wake the owner's poll().
connection.py is one connection, reconnect.py the pauses between them, send_queue.py what waits to be sent.
"""

import enum
import logging
import random
import select
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any, TypeVar

from edge_runtime.errors import ConfigError
from edge_runtime.logs import is_told
from edge_runtime.mqtt.connection import Connection, Message, Publish
from edge_runtime.mqtt.reconnect import CLOSED, Backoff, Loss
from edge_runtime.mqtt.send_queue import Outcome, OutgoingMessage, SendQueue
from edge_runtime.mqtt.settings import MqttConfig, MqttSettings, Timing

logger = logging.getLogger(__name__)
T = TypeVar("T")

# A thread without a step for so long hangs. An attempt to connect is one step: a name may have several servers that do
# not answer, and several addresses, each with a handshake.
HANG_S = 300.0
NOT_YET_VALID, HAS_EXPIRED = 9, 10  # X509_V_ERR_CERT_... of OpenSSL


class State(enum.Enum):
    STOPPED = "stopped"
    CONNECTING = "connecting"
    ONLINE = "online"
    DEGRADED = "degraded"  # connected, but the broker has stopped acknowledging: nothing new is sent
    BACKOFF = "backoff"  # waits before the next attempt; the reason says why the last one ended


def connection_text(settings: MqttConfig, state: State, reason: str) -> str:
    """One line for people, such as "broker broker.lan:8883 backoff: Not authorized"."""
    why = f": {reason}" if reason and state is not State.ONLINE else ""  # the reason of ONLINE is the broker's address
    return f"broker {settings.host}:{settings.port} {state.value}{why}"


class MqttClient:
    """See the module's docstring for what it promises.

    `on_message`, `on_outcome`, `birth` and `on_state` run on the client's thread: they must return soon, and may call
    `publish`. A message whose `on_message` raised is acknowledged too: delivered again it would raise again, and never
    acknowledged it would use up the receive maximum. The sender repeats a lost request.

    birth: called for each connection before it is ONLINE; its messages are sent before all that wait.
    will: the broker sends it when the connection is lost, and on `close` too, so watchers see one kind of end.
    manual_ack: only `Message.ack` acknowledges; with receive_maximum the server slows its senders down this way.
    optional: topic filters without which the client is ONLINE too, if the broker's access list forbids them.
    """

    def __init__(
        self,
        settings: MqttSettings,
        *,
        subscriptions: Sequence[tuple[str, int]] = (),
        optional: Collection[str] = (),
        on_message: Callable[[Message], None] | None = None,
        will: Publish | None = None,
        birth: Callable[[], Iterable[Publish]] | None = None,
        on_state: Callable[[State, str], None] | None = None,
        manual_ack: bool = False,
        timing: Timing | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.settings, self.timing = settings, timing or Timing()
        self.state, self.reason = State.STOPPED, "not started"
        self._subscriptions: Mapping[str, int] = dict(subscriptions)  # replaced whole, never changed
        self._on_state, self._birth, self._clock = on_state, birth, clock
        self._queue = SendQueue(settings.queue_messages, settings.queue_bytes)
        self._backoff = Backoff(self.timing, rng or random.Random(), settings.client_id)
        self._next_deadline = inf
        counted = ("received", "inbound_oversized", "callback_errors", "connects", "losses")
        self._counts = Counter(dict.fromkeys(counted, 0))  # written by the owner thread only
        self._degraded = 0  # times, for the log: on a slow link it may be after each message
        self._close_by: float | None = None
        self._last_step = 0.0  # when the owner thread last looked at the clock
        self.forbidden: set[str] = set()  # the optional topic filters that the broker refused, while it is ONLINE
        self.trouble = ""  # why it is not connected; empty while it is, and during the first attempt
        self._online = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{settings.client_id}", daemon=True)
        self._new_connection = partial(
            Connection,
            settings,
            self._queue,
            subscriptions=lambda: self._subscriptions,
            optional=frozenset(optional),
            will=will,
            manual_ack=manual_ack,
            handshake_s=self.timing.handshake,
            on_message=on_message,
            on_ready=self._go_online,
            guard=self._guard,
            wake=self._wake,
            counts=self._counts,
            clock=clock,
        )
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)

    # ---- any thread ----

    def start(self) -> "MqttClient":
        self._thread.start()
        return self

    def __enter__(self) -> "MqttClient":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        expiry_s: float | None = None,
        on_outcome: Callable[[Outcome], None] | None = None,
    ) -> bool:
        """Queue one message; never blocks. False: it has ended already, as OVERSIZED or CLOSED.

        expiry_s counts from now, over the queue and (as Message Expiry Interval) the broker. Raises ValueError for a
        topic or QoS that no broker accepts.
        """
        if not topic or len(topic.encode()) > 65535 or any(c in topic for c in "+#\0"):
            raise ValueError(f"cannot publish to topic {topic[:80]!r}: want 1 to 65535 bytes without + # NUL")
        if qos not in (0, 1):
            raise ValueError(f"qos = {qos}, want 0 or 1: QoS 2 costs one more round trip, and requests have ids")
        bound = min(self.settings.max_publish_bytes, self.settings.queue_bytes)
        deadline = inf if expiry_s is None else self._clock() + expiry_s
        message = OutgoingMessage(topic, payload, qos, retain, deadline, on_outcome)
        ended = self._queue.accept(message, Outcome.OVERSIZED if len(payload) > bound else None)
        if self.state is State.STOPPED:  # no owner thread calls the callbacks
            self._call_outcomes()
        self._wake()
        return ended is None

    def send(self, message: Publish) -> bool:
        """`publish` of a message as a value."""
        topic, payload, expiry_s = message.topic, message.payload, message.expiry_s
        return self.publish(topic, payload, qos=message.qos, retain=message.retain, expiry_s=expiry_s)

    def set_subscriptions(self, subscriptions: Sequence[tuple[str, int]]) -> None:
        """Topic filters and their QoS from now on, instead of all earlier ones.

        When online, the owner thread subscribes and unsubscribes what differs; each new connection subscribes to all.
        Messages that the broker has sent before it handles the UNSUBSCRIBE still arrive.
        """
        self._subscriptions = dict(subscriptions)
        self._wake()

    def wait_online(self, timeout: float | None = None) -> bool:
        return self._online.wait(timeout)

    def hangs(self) -> bool:
        """The thread that sends and receives has made no step for too long: its messages stay where they are."""
        return self.state is not State.STOPPED and self._clock() - self._last_step > HANG_S

    def stats(self) -> dict[str, int]:
        """Counters since start. published = pending (waiting or in flight now) + one for each Outcome.

        connects: connections that came ONLINE. losses: connections and attempts that ended. evictions: losses that look
        like another client with our id.
        """
        return {**self._queue.counts(), **self._counts, "evictions": self._backoff.evictions}

    def counts(self) -> dict[str, int | dict[str, int]]:
        """`stats` for the exporter: a labelled counter and, apart from it, the numbers that may fall."""
        counters, is_connected = self.stats(), self.state is State.ONLINE
        return {"mqtt_pending": counters.pop("pending"), "mqtt": counters, "mqtt_connected": int(is_connected)}

    def close(self, drain_s: float = 2.0) -> None:
        """Accept no more, wait up to drain_s for what is queued or in flight, disconnect; the rest ends as CLOSED."""
        self.finish(drain_s)
        if self._thread.ident is None:  # never started: call the outcomes from here
            self._shut_down()
        elif self._thread is not threading.current_thread():
            # An attempt to connect cannot be interrupted; its own timeout ends it.
            self._thread.join(drain_s + 2 * self.timing.handshake + 1)
            if self._thread.is_alive():
                logger.error("mqtt client did not stop client=%s state=%s", self.settings.client_id, self.state.value)

    def finish(self, drain_s: float = 2.0) -> None:
        """The part of `close` that does not wait, for closing several clients at the same time."""
        self._queue.close()
        self._close_by = min(self._clock() + drain_s, inf if self._close_by is None else self._close_by)
        self._wake()

    def _wake(self) -> None:
        with suppress(OSError):  # full: the owner wakes anyway; closed: the owner has ended
            self._wake_write.send(b"\0")

    # ---- the owner thread ----

    def _run(self) -> None:
        try:
            while not self._is_done():
                self._last_step = self._clock()
                self._set_state(State.CONNECTING, f"{self.settings.host}:{self.settings.port}")
                connection = self._new_connection()
                self._serve(connection)
                delay, reason = self._after(connection)
                if not self._is_done():
                    self._set_state(State.BACKOFF, reason)
                    self._pause(delay)
        finally:
            self._shut_down()

    def _is_done(self) -> bool:
        return self._close_by is not None and (self._clock() >= self._close_by or self._queue.counts()["pending"] == 0)

    def _serve(self, connection: Connection) -> None:
        """One connection, from the first packet to the last; sets its `loss`."""
        try:
            connection.open()
            while connection.loss is None:
                self._step(connection)
        except Exception as error:  # the client must survive any of them
            if not isinstance(error, OSError | ConfigError):  # a bug: the log has it for the maintainer
                logger.exception("mqtt client broke client=%s", self.settings.client_id)
            connection.loss = Loss(f"{type(error).__name__}: {error}{_likely_cause(error, self.settings)}")

    def _step(self, connection: Connection) -> None:
        """Everything that is due; then wait for the socket, another thread, or the next deadline."""
        self._last_step = now = self._clock()
        self._next_deadline = self._queue.sweep(now)
        self._call_outcomes()
        connection.send_acks()
        self._watch(connection, now)
        if self.state is State.ONLINE:
            connection.update_subscriptions()
            while connection.has_room and (message := self._queue.take(connection.in_flight.values())):
                connection.send(message, now)
        if self._is_done():
            connection.say_goodbye()
        connection.exchange(self._idle_ms(now), self._wake_read)
        self._drain_wake()

    def _watch(self, connection: Connection, now: float) -> None:
        """Judge by progress: with a frozen broker paho's is_connected() stays True for 1.7 keepalives."""
        connection.check_handshake(now, 2 * self.timing.handshake)
        stalled_s = connection.stalled_s(now)
        if stalled_s > 2 * connection.keepalive_s:
            connection.loss = Loss(f"no acknowledgement in {stalled_s:.0f} s")
        elif stalled_s > self.timing.degraded and self.state is State.ONLINE:
            self._set_state(State.DEGRADED, f"{len(connection.in_flight)} messages in flight are not acknowledged")
        elif stalled_s <= self.timing.degraded and self.state is State.DEGRADED:
            self._set_state(State.ONLINE, "the broker acknowledges again")

    def _go_online(self, connection: Connection) -> None:
        now = self._clock()
        births = list(self._guard(self._birth) or ()) if self._birth else []
        for birth in births:
            deadline = inf if birth.expiry_s is None else now + birth.expiry_s
            message = OutgoingMessage(birth.topic, birth.payload, birth.qos, birth.retain, deadline, is_birth=True)
            self._queue.accept(message)
            connection.send(message, now)
        self._counts["connects"] += 1
        self.forbidden = connection.forbidden
        self._set_state(State.ONLINE, f"{self.settings.host}:{self.settings.port}")

    def _after(self, connection: Connection) -> tuple[float, str]:
        """Close the socket, keep what was in flight for the next connection; the delay before it, and the reason."""
        self._online.clear()
        loss = connection.loss or CLOSED
        self._counts["losses"] += loss is not CLOSED
        connection.close()
        in_flight = list(connection.in_flight.values())
        for message in self._queue.give_back(in_flight, loss.by_broker):
            logger.warning("mqtt publish cost %d connections topic=%s", message.suspicions, message.topic)
        lasted_s = 0.0 if connection.online_at is None else self._clock() - connection.online_at
        return self._backoff.next(loss, lasted_s, not all(message.is_birth for message in in_flight))

    def _pause(self, delay: float) -> None:
        until = self._clock() + delay
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        while (now := self._clock()) < until and not self._is_done():
            self._last_step = now
            self._next_deadline = self._queue.sweep(now)
            self._call_outcomes()
            poll.poll(min(1000 * (until - now), self._idle_ms(now)))
            self._drain_wake()

    def _idle_ms(self, now: float) -> float:
        """Until the next thing to do; the keepalive and the progress rule need a regular check."""
        regular = min(self.timing.degraded, self.settings.keepalive_s) / 4
        waits = (regular, self._next_deadline - now, inf if self._close_by is None else self._close_by - now)
        return 1000 * max(0.001, min(waits))

    def _drain_wake(self) -> None:
        with suppress(BlockingIOError):
            self._wake_read.recv(4096)

    def _call_outcomes(self) -> None:
        while untold := self._queue.next_untold():
            self._guard(*untold)

    def _guard(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """No exception may leave a callback: paho would stop in the middle of a packet."""
        try:
            return function(*arguments)
        except Exception:
            self._counts["callback_errors"] += 1
            logger.exception("mqtt callback raised client=%s", self.settings.client_id)
            return None

    def _set_state(self, state: State, reason: str) -> None:
        """A fault that repeats is logged once: each attempt ends with the same words until something changes."""
        client = self.settings.client_id
        if state is State.BACKOFF and reason != self.trouble:
            address = f"{self.settings.host}:{self.settings.port}"
            logger.warning("mqtt offline client=%s broker=%s reason=%s", client, address, reason)
            self.trouble = reason
        elif state is State.DEGRADED:
            self._degraded += 1
            if is_told(self._degraded):
                logger.warning("mqtt degraded client=%s count=%d reason=%s", client, self._degraded, reason)
        elif state is State.ONLINE:
            self.trouble = ""
            if self.state is not State.DEGRADED or is_told(self._degraded):
                logger.info("mqtt online client=%s broker=%s", client, reason)
        self.state, self.reason = state, reason
        (self._online.set if state is State.ONLINE else self._online.clear)()
        if self._on_state:
            self._guard(self._on_state, state, reason)

    def _shut_down(self) -> None:
        self._queue.end_all()
        self._set_state(State.STOPPED, "closed")
        self._call_outcomes()
        self._wake_read.close()
        self._wake_write.close()


def _likely_cause(error: Exception, settings: MqttSettings) -> str:
    """The likely cause, which an operator should look at first."""
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in (NOT_YET_VALID, HAS_EXPIRED):
        now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        return f": is the clock of this machine right? It says {now}. If it is, renew the broker's certificate"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f": is {settings.host} a name in the broker's certificate, and ca_file the authority that signed it?"
    if settings.uses_tls and isinstance(error, ssl.SSLError | ConnectionResetError):
        return ": does this port speak TLS? Usually 8883 does, and 1883 does not"
    if isinstance(error, ConnectionRefusedError):
        return f": does a broker listen at {settings.host}:{settings.port}?"
    if isinstance(error, socket.gaierror):
        return f": is {settings.host} the right name, and is there a network?"
    return ""
