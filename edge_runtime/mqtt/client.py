"""The one MQTT 5 client of board and server, around paho-mqtt 2. It knows nothing of envelopes, topics or models.

What it promises:
- It connects for ever, with full jitter between attempts, and survives a broker that is killed, frozen or comes back
  empty: every connection subscribes anew, publishes the birth messages anew, and is ONLINE only after the SUBACK.
- `publish` never blocks and never reaches the network from the caller's thread. What is not sent yet waits in a queue
  with two bounds, messages and bytes; when it is full the oldest is dropped. What is in flight is bounded by a window.
- Every `publish` ends exactly once in an `Outcome`, told to its `on_outcome` on the client's thread (the publisher's,
  while the client is not running).
- QoS 1 is at least once: what was in flight when a connection was lost is sent again, before anything newer; a
  connection that is given up here is heard out first, so that nothing is whose acknowledgement has come.
- A callback that raises is logged and counted, and the network loop goes on.
- It is alive by progress: work in flight without a PUBACK is DEGRADED, and after two keepalives a new socket.
- What the broker refuses, or what costs the connection again and again, ends once and is never a reconnect loop.

What it does not promise: that anybody got the message. A PUBACK says only that the broker took it; only a reply says
that a request was served (open_requests.py).

Strategy: one thread owns paho and calls every callback. Each connection is a new paho client, so nothing of an old
session (packet ids, half-sent packets, its own re-send queue) can leak into the next; other threads only append to
queues and wake the owner's poll(). paho's own thread is not used: an exception kills it silently.
"""

import enum
import logging
import random
import select
import socket
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import ceil, inf
from typing import Any, TypeVar

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_runtime.errors import ConfigError
from edge_runtime.mqtt.send_queue import Outcome, Outgoing, OutgoingQueue
from edge_runtime.mqtt.settings import MqttSettings, Timing

__all__ = ["Message", "MqttClient", "MqttSettings", "Outcome", "Publish", "State", "Stats", "Timing"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

# What a PUBLISH adds to topic and payload: fixed header 5, topic length 2, packet id 2, properties 6 (MQTT 5, 3.3).
PUBLISH_OVERHEAD = 16
LAST_WORDS_S = 0.1  # of a connection that is given up
NO_TLS = ("WRONG_VERSION_NUMBER", "UNEXPECTED_EOF_WHILE_READING")  # OpenSSL, if the other side does not speak TLS
TEMPORARY = {0x88, 0x89, 0x97, 0x9F}  # CONNACK: unavailable, busy, quota, rate: retry as after any lost connection


class State(enum.Enum):
    STOPPED = "stopped"
    CONNECTING = "connecting"
    ONLINE = "online"
    DEGRADED = "degraded"  # connected, but the broker has stopped acknowledging: nothing new is sent
    BACKOFF = "backoff"  # waits before the next attempt; the reason says why the last one ended


@dataclass(frozen=True, slots=True)
class Publish:
    """A message as a value: the will, or one of the birth messages."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    expiry_s: float | None = None


@dataclass(frozen=True, slots=True)
class Message:
    topic: str
    payload: bytes
    qos: int
    retained: bool
    expiry_s: int | None  # what the broker says is left
    ack: Callable[[], None]  # any thread, any number of times; does something only with manual_ack and QoS 1


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since start. published = delivered + refused + dropped + oversized + expired + closed + pending."""

    published: int
    delivered: int
    refused: int
    dropped: int
    oversized: int
    expired: int
    closed: int
    pending: int  # waiting or in flight now
    received: int
    inbound_oversized: int
    callback_errors: int
    connects: int  # connections that came ONLINE
    losses: int  # connection attempts and connections that ended
    evictions: int  # of these, by what looks like another client with our id


@dataclass(slots=True)
class _Loss:
    """Why a connection ended, or an attempt failed."""

    reason: str
    by_broker: bool = False  # it closed an established connection: a cause may lie in what we sent
    refused: bool = False  # login or subscription: trying again soon cannot help
    taken_over: bool = False  # MQTT 5 reason 0x8E


@dataclass(slots=True, eq=False)
class _Session:
    """One connection; touched by the owner thread only."""

    client: paho.Client
    started_at: float
    loss: _Loss | None = None
    is_accepted: bool = False  # the CONNACK has come
    max_packet: int = 268_435_460  # the protocol's own limit, until CONNACK says less
    window: int = 1
    online_at: float | None = None
    progress_at: float = 0.0  # last PUBACK, or when work began
    in_flight: dict[int, Outgoing] = field(default_factory=dict)  # by packet id, in order of sending
    unacked: dict[int, int] = field(default_factory=dict)  # manual ack: serial -> packet id


class MqttClient:
    """See the module's docstring for what it promises.

    `on_message`, `on_outcome`, `birth` and `on_state` run on the client's thread: they must return soon, and may call
    `publish`. A message whose `on_message` raised is acknowledged all the same: delivered again it would raise again,
    and held back it would fill the receive maximum for good. A lost request is the sender's to repeat.

    birth: called for each connection, before it is ONLINE; its messages go out before everything that waits.
    will: sent by the broker when the connection is lost, and on `close` too, so watchers need not tell these apart.
    manual_ack: `Message.ack` acknowledges; with receive_maximum this is the server's back-pressure.
    optional: those of the subscriptions that the client is ONLINE without, where the broker's access list forbids them.
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
        self._subscriptions, self._optional = list(subscriptions), frozenset(optional)
        self._on_message, self._on_state, self._birth, self._will = on_message, on_state, birth, will
        self._manual_ack, self._clock, self._rng = manual_ack, clock, rng or random.Random()
        self._queue = OutgoingQueue(settings.queue_messages, settings.queue_bytes)
        self._next_deadline = inf
        self._acks: deque[tuple[_Session, int]] = deque()  # bounded by what the broker has in flight to us
        self._counts: Counter[str] = Counter()  # written by the owner thread alone
        self._serial = 0
        self._failures = 0  # connections in a row that did not last
        self._evictions = 0  # of these in a row, how many look like another client with our id
        self._close_by: float | None = None
        self._last_trouble = ""
        self._online = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{settings.client_id}", daemon=True)
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
        """Queue one message; never blocks. False: it has ended already, OVERSIZED or CLOSED.

        expiry_s counts from now, over the queue and (as Message Expiry Interval) the broker. Raises ValueError for a
        topic or QoS that no broker would take.
        """
        if not topic or len(topic.encode()) > 65535 or any(c in topic for c in "+#\0"):
            raise ValueError(f"cannot publish to topic {topic[:80]!r}: want 1 to 65535 bytes without + # NUL")
        if qos not in (0, 1):
            raise ValueError(f"qos = {qos}, want 0 or 1: QoS 2 costs a round trip more, and requests are deduplicated")
        bound = min(self.settings.max_publish_bytes, self.settings.queue_bytes)
        deadline = inf if expiry_s is None else self._clock() + expiry_s
        message = Outgoing(topic, payload, qos, retain, deadline, on_outcome)
        ended = self._queue.accept(message, Outcome.OVERSIZED if len(payload) > bound else None)
        if self.state is State.STOPPED:  # no thread of ours is there to tell what has ended
            self._tell()
        self._wake()
        return ended is None

    def wait_online(self, timeout: float | None = None) -> bool:
        return self._online.wait(timeout)

    def stats(self) -> Stats:
        own = ("received", "inbound_oversized", "callback_errors", "connects", "losses", "evictions")
        return Stats(**self._queue.counts(), **{name: self._counts[name] for name in own})

    def close(self, drain_s: float = 2.0) -> None:
        """Take no more, wait up to drain_s for what is queued or in flight, disconnect; what is left is CLOSED."""
        self.finish(drain_s)
        if self._thread.ident is None:  # never started: tell the outcomes from here
            self._shut_down()
        elif self._thread is not threading.current_thread():
            # One attempt to connect may be under way and cannot be broken off; it ends by its own timeout.
            self._thread.join(drain_s + 2 * self.timing.handshake + 1)
            if self._thread.is_alive():
                logger.error("mqtt client did not stop client=%s state=%s", self.settings.client_id, self.state.value)

    def finish(self, drain_s: float = 2.0) -> None:
        """The part of `close` that does not wait, for who closes several."""
        self._queue.close()
        self._close_by = min(self._clock() + drain_s, inf if self._close_by is None else self._close_by)
        self._wake()

    def _wake(self) -> None:
        with suppress(OSError):  # full: the owner wakes anyhow; closed: nobody is left to wake
            self._wake_write.send(b"\0")

    # ---- the owner thread: the life of a client ----

    def _run(self) -> None:
        try:
            while not self._is_done():
                self._set_state(State.CONNECTING, f"{self.settings.host}:{self.settings.port}")
                session = self._new_session()
                loss = self._serve(session)
                self._abandon(session, loss)
                if not self._is_done():
                    self._pause(self._backoff(session, loss))
        finally:
            self._shut_down()

    def _is_done(self) -> bool:
        return self._close_by is not None and (self._clock() >= self._close_by or self.stats().pending == 0)

    def _new_session(self) -> _Session:
        """A paho client that keeps no queue of its own, and tells everything to us."""
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            self.settings.client_id,
            protocol=paho.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=self._manual_ack,
        )
        session = _Session(client, self._clock())
        client.connect_timeout = self.timing.handshake
        client.max_inflight_messages = 0  # no limit: the window is ours
        # With a write callback paho only queues, and never writes (and calls back) from inside publish(); see _step.
        client.on_socket_register_write = _ignore
        client.on_connect = partial(self._guard, self._connected, session)
        client.on_subscribe = partial(self._guard, self._subscribed, session)
        client.on_publish = partial(self._guard, self._published, session)
        client.on_message = partial(self._guard, self._received, session)
        client.on_disconnect = partial(self._guard, self._disconnected, session)
        if self._will:
            client.will_set(self._will.topic, self._will.payload, self._will.qos, self._will.retain)
        return session

    def _serve(self, session: _Session) -> _Loss:
        """One connection, from the first packet to the last."""
        settings, client = self.settings, session.client
        try:
            if settings.username is not None:
                client.username_pw_set(settings.username, settings.password())
            if context := settings.tls_context():
                client.tls_set_context(context)
            limits = _properties(
                PacketTypes.CONNECT,
                MaximumPacketSize=settings.max_inbound_bytes,
                ReceiveMaximum=settings.receive_maximum,
            )
            # Clean start and no Session Expiry Interval: a broker that keeps a session of a $share member keeps
            # sending it requests while it is dead.
            client.connect(settings.host, settings.port, settings.keepalive_s, clean_start=True, properties=limits)
            if isinstance(sock := client.socket(), socket.socket):
                # Nagle holds a second small packet until the first is acknowledged, some 40 ms (RFC 9293, 3.7.4).
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while session.loss is None:
                self._step(session)
            return session.loss
        except (OSError, ConfigError) as error:  # no route, refused, timed out, no such name, TLS, credentials
            hung_up = isinstance(error, ConnectionResetError) or getattr(error, "reason", "") in NO_TLS
            cause = f": {self._likely_cause()}" if hung_up and not session.is_accepted else ""
            return _Loss(f"{type(error).__name__}: {error}{cause}")
        except Exception as error:  # whatever it is, the client must outlive it; the log has it for the maintainer
            logger.exception("mqtt client broke client=%s", settings.client_id)
            return _Loss(f"{type(error).__name__}: {error}")

    def _step(self, session: _Session) -> None:
        """Everything that is due, then wait for the socket, another thread, or the next deadline."""
        client = session.client
        now = self._clock()
        self._next_deadline = self._queue.sweep(now)
        self._tell()
        self._send_acks()
        self._watch(session, now)
        if self.state is State.ONLINE:
            self._pump(session, now)
        if self._is_done():
            self._goodbye(session)
        sock = client.socket()
        if session.loss or sock is None:
            session.loss = session.loss or _Loss("connection closed")
            return
        poll = select.poll()
        poll.register(sock, select.POLLIN | (select.POLLOUT if client.want_write() else 0))
        poll.register(self._wake_read, select.POLLIN)
        buffered = isinstance(sock, ssl.SSLSocket) and sock.pending()  # whole packets that poll() cannot see
        ready = dict(poll.poll(0 if buffered else self._idle_ms(now)))
        self._drain_wake()
        if buffered or ready.get(sock.fileno(), 0) & ~select.POLLOUT:
            client.loop_read()
        if client.want_write():
            client.loop_write()
        client.loop_misc()

    def _idle_ms(self, now: float) -> float:
        """Until the next thing to do; the keepalive and the progress rule want a look every so often."""
        regular = min(self.timing.degraded, self.settings.keepalive_s) / 4
        waits = (regular, self._next_deadline - now, inf if self._close_by is None else self._close_by - now)
        return 1000 * max(0.001, min(waits))

    def _drain_wake(self) -> None:
        with suppress(BlockingIOError):
            self._wake_read.recv(4096)

    def _pause(self, delay: float) -> None:
        until = self._clock() + delay
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        while (now := self._clock()) < until and not self._is_done():
            self._next_deadline = self._queue.sweep(now)
            self._tell()
            poll.poll(min(1000 * (until - now), self._idle_ms(now)))
            self._drain_wake()

    def _tell(self) -> None:
        while untold := self._queue.next_untold():
            self._guard(*untold)

    def _send_acks(self) -> None:
        while self._acks:
            session, serial = self._acks.popleft()
            packet_id = session.unacked.pop(serial, None)
            if packet_id is not None:  # None: acknowledged before
                session.client.ack(packet_id, 1)  # into a session that is gone: paho queues it for nobody

    def _watch(self, session: _Session, now: float) -> None:
        """Liveness by progress. is_connected() stays True over a frozen broker for 1.7 keepalives."""
        if session.online_at is None:
            if now - session.started_at > 2 * self.timing.handshake:
                session.loss = _Loss("no CONNACK and SUBACK in time")
        elif session.in_flight:
            stalled = now - session.progress_at
            if stalled > 2 * (session.client.keepalive or self.settings.keepalive_s):  # the broker may have set 0
                session.loss = _Loss(f"no acknowledgement in {stalled:.0f} s")
            elif stalled > self.timing.degraded and self.state is State.ONLINE:
                self._set_state(State.DEGRADED, f"{len(session.in_flight)} in flight are not acknowledged")

    def _pump(self, session: _Session, now: float) -> None:
        in_flight = session.in_flight
        while len(in_flight) < session.window and (message := self._queue.take(in_flight.values())):
            self._send(session, message, now)

    def _send(self, session: _Session, message: Outgoing, now: float) -> None:
        if len(message.topic.encode()) + len(message.payload) + PUBLISH_OVERHEAD > session.max_packet:
            self._queue.end(message, Outcome.OVERSIZED)
            return
        # What is left now: in paho's own queue it would not age.
        expiry_s = None if message.deadline == inf else max(1, ceil(message.deadline - now))
        properties = _properties(PacketTypes.PUBLISH, MessageExpiryInterval=expiry_s)
        if not session.in_flight:
            session.progress_at = now
        info = session.client.publish(message.topic, message.payload, message.qos, message.retain, properties)
        session.in_flight[info.mid] = message

    def _goodbye(self, session: _Session) -> None:
        session.loss = _Loss("closed")
        # 0x04 has the broker send the will (MQTT 5, 3.14.2.1).
        name = "Disconnect with will message" if self._will else "Normal disconnection"
        session.client.disconnect(ReasonCode(PacketTypes.DISCONNECT, name))
        until = self._clock() + 0.5
        while session.client.want_write() and self._clock() < until and (sock := session.client.socket()):
            select.select([], [sock], [], 0.1)
            session.client.loop_write()

    # ---- the owner thread: what paho reports ----

    def _guard(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """No exception may leave a callback: paho would stop in the middle of a packet."""
        try:
            return function(*arguments)
        except Exception:
            self._counts["callback_errors"] += 1
            logger.exception("mqtt callback raised client=%s", self.settings.client_id)
            return None

    def _connected(self, session: _Session, client: paho.Client, _: Any, __: Any, code: ReasonCode, got: Any) -> None:
        if code.is_failure:
            refused = code.value not in TEMPORARY
            session.loss = _Loss(f"the broker refused the login: {code}", refused=refused)
            return
        session.is_accepted = True
        session.max_packet = getattr(got, "MaximumPacketSize", session.max_packet)
        session.window = min(self.settings.window, getattr(got, "ReceiveMaximum", 65535))
        if self._subscriptions:
            client.subscribe([(name, SubscribeOptions(qos=qos)) for name, qos in self._subscriptions])
        else:
            self._go_online(session)

    def _subscribed(self, session: _Session, _: Any, __: Any, ___: Any, codes: list[ReasonCode], ____: Any) -> None:
        asked = zip(self._subscriptions, codes, strict=False)
        refused = {name: code for (name, _), code in asked if code.is_failure}
        bad = [f"{name} ({code})" for name, code in refused.items() if name not in self._optional]
        if bad:  # deaf but "online" would be worse than offline with a reason
            session.loss = _Loss(f"the broker refused to subscribe {', '.join(bad)}", refused=True)
            return
        for name, code in refused.items():
            logger.info("mqtt goes without client=%s topic=%s reason=%s", self.settings.client_id, name, code)
        self._go_online(session)

    def _go_online(self, session: _Session) -> None:
        now = session.online_at = session.progress_at = self._clock()
        births = list(self._guard(self._birth) or ()) if self._birth else []
        for birth in births:
            deadline = inf if birth.expiry_s is None else now + birth.expiry_s
            message = Outgoing(birth.topic, birth.payload, birth.qos, birth.retain, deadline, is_birth=True)
            self._queue.accept(message)
            self._send(session, message, now)
        self._counts["connects"] += 1
        self._set_state(State.ONLINE, f"{self.settings.host}:{self.settings.port}")

    def _published(self, session: _Session, _: Any, __: Any, packet_id: int, code: ReasonCode, ___: Any) -> None:
        message = session.in_flight.pop(packet_id, None)
        if message is None:
            return
        session.progress_at = self._clock()
        self._queue.end(message, Outcome.REFUSED if code.is_failure else Outcome.DELIVERED)
        if code.is_failure:  # an access list or a quota: to send it again would be refused again
            logger.warning(
                "mqtt publish refused client=%s topic=%s reason=%s", self.settings.client_id, message.topic, code
            )
        if self.state is State.DEGRADED:
            self._set_state(State.ONLINE, "acknowledgements have come again")

    def _received(self, session: _Session, _: Any, __: Any, raw: paho.MQTTMessage) -> None:
        self._counts["received"] += 1
        self._serial += 1
        ack: Callable[[], None] = _ignore
        if self._manual_ack and raw.qos == 1:
            session.unacked[self._serial] = raw.mid
            ack = partial(self._request_ack, session, self._serial)
        try:
            if len(raw.payload) > self.settings.max_inbound_bytes:  # a broker that ignores our Maximum Packet Size
                self._counts["inbound_oversized"] += 1
                ack()
            elif self._on_message:
                expiry = getattr(raw.properties, "MessageExpiryInterval", None)
                self._on_message(Message(raw.topic, bytes(raw.payload), raw.qos, raw.retain, expiry, ack))
        except Exception:
            ack()
            raise

    def _request_ack(self, session: _Session, serial: int) -> None:  # any thread
        self._acks.append((session, serial))
        self._wake()

    def _disconnected(self, session: _Session, _: Any, __: Any, ___: Any, code: ReasonCode, ____: Any) -> None:
        if session.loss is None:  # else we know better already: paho reports its own follow-up too
            by_broker = session.online_at is not None and code.value != 0x8D  # keepalive timeout: the link's doing
            reason = f"connection lost: {code}"
            if not session.is_accepted:
                reason = f"the broker closed the connection before it accepted the login: {self._likely_cause()}"
            session.loss = _Loss(reason, by_broker, taken_over=code.value == 0x8E)

    def _likely_cause(self) -> str:
        """Why a broker may hang up before it has accepted the login."""
        if self.settings.uses_tls:
            return "does this port speak TLS (usual: 8883), and the broker MQTT 5?"
        return "is this its TLS port (then set ca_file, or tls = true), or does it not speak MQTT 5?"

    # ---- the owner thread: after a connection ----

    def _abandon(self, session: _Session, loss: _Loss) -> None:
        """Close the socket and keep what was in flight for the next connection, in its order."""
        self._online.clear()
        self._counts["losses"] += 1
        self._hear_out(session)
        if sock := session.client.socket():
            sock.close()
        for message in self._queue.give_back(session.in_flight.values(), loss.by_broker):
            logger.warning("mqtt publish cost %d connections topic=%s", message.suspicions, message.topic)

    def _hear_out(self, session: _Session) -> None:
        """The acknowledgements that are here, or about to come: what they are for would be sent twice without them."""
        until = self._clock() + LAST_WORDS_S
        with suppress(Exception):  # paho may be what broke
            while session.in_flight and (sock := session.client.socket()) and (now := self._clock()) < until:
                select.select([sock], [], [], until - now)
                session.client.loop_read()

    def _backoff(self, session: _Session, loss: _Loss) -> float:
        """Seconds to wait: full jitter, since after a power cut all boards return in the same second.

        Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015. A successful CONNACK alone resets
        nothing: two clients with one id would evict each other at the shortest delay for ever.
        """
        timing = self.timing
        lasted = 0.0 if session.online_at is None else self._clock() - session.online_at
        if lasted >= timing.stable:
            self._failures = 0
        blameless = all(message.is_birth for message in session.in_flight.values())
        if loss.taken_over or (loss.by_broker and lasted < timing.short_session and blameless):
            self._counts["evictions"] += 1
            self._evictions += 1  # mosquitto 2.0 just closes the socket of the client that is taken over
        elif not loss.by_broker or lasted >= timing.short_session:
            self._evictions = 0
        cap, base = timing.backoff_cap, timing.backoff_base
        reason = loss.reason
        if self._evictions >= 3:
            delay = self._rng.uniform(*timing.duplicate_id)
            reason += f", again and again: does another client use the id {self.settings.client_id}?"
        else:
            if loss.refused:
                cap, base = timing.refused_cap, 10 * base
            delay = self._rng.uniform(0, min(cap, base * 2 ** min(self._failures, 30)))
        self._failures += 1
        self._set_state(State.BACKOFF, reason)
        return delay

    def _set_state(self, state: State, reason: str) -> None:
        """A fault that repeats is logged once: each attempt ends in the same words until something changes."""
        if state is State.BACKOFF and reason != self._last_trouble:
            logger.warning("mqtt offline client=%s reason=%s", self.settings.client_id, reason)
            self._last_trouble = reason
        elif state is State.DEGRADED:
            logger.warning("mqtt degraded client=%s reason=%s", self.settings.client_id, reason)
        elif state is State.ONLINE:
            self._last_trouble = ""
            logger.info("mqtt online client=%s broker=%s", self.settings.client_id, reason)
        self.state, self.reason = state, reason
        (self._online.set if state is State.ONLINE else self._online.clear)()
        if self._on_state:
            self._guard(self._on_state, state, reason)

    def _shut_down(self) -> None:
        self._queue.end_all()
        self._set_state(State.STOPPED, "closed")
        self._tell()
        self._wake_read.close()
        self._wake_write.close()


def _properties(packet: int, **values: int | None) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        if value is not None:
            setattr(properties, name, value)
    return properties


def _ignore(*_: object) -> None:
    pass
