"""One connection to the broker on one paho client, from CONNECT until it is lost.

Each connection is a new paho client, so that nothing of an old session (packet ids, half-sent packets, paho's own
resend queue) can leak into the next one. paho's thread is not used: an exception in a callback ends it silently. One
thread owns a Connection; only `Message.ack` may be called on any thread.
"""

import logging
import select
import socket
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import ceil, inf
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_runtime.logs import is_told
from edge_runtime.mqtt.reconnect import CLOSED, Loss
from edge_runtime.mqtt.send_queue import Outcome, OutgoingMessage, SendQueue
from edge_runtime.mqtt.settings import MqttSettings

logger = logging.getLogger(__name__)

# A PUBLISH adds to topic and payload: fixed header 5, topic length 2, packet id 2, properties 6 (MQTT 5, 3.3).
PUBLISH_OVERHEAD = 16
PENDING_ACKS_S = 0.1  # to read the PUBACKs that are about to arrive, before a connection is closed
GOODBYE_S = 0.5  # to write what is left and the DISCONNECT
TEMPORARY = {0x88, 0x89, 0x97, 0x9F}  # CONNACK: unavailable, busy, quota, rate. Retry as after any lost connection.
WRONG_LOGIN = {0x86, 0x87, 0x8C}  # CONNACK: bad user name or password, not authorized, bad authentication method
NOT_AUTHORIZED = 0x87  # SUBACK: an access list
KEEPALIVE_TIMEOUT, SESSION_TAKEN_OVER = 0x8D, 0x8E  # reason codes


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
    retained: bool  # the broker had kept it from before this subscription
    expiry_s: int | None  # seconds left, as the broker says
    ack: Callable[[], None]  # any thread, any number of times; has an effect only with manual_ack and QoS 1


class Connection:
    """Set `loss` to end it; it is set here when the connection is lost."""

    def __init__(
        self,
        settings: MqttSettings,
        queue: SendQueue,
        *,
        subscriptions: Callable[[], Mapping[str, int]],
        optional: frozenset[str],
        will: Publish | None,
        manual_ack: bool,
        handshake_s: float,
        on_message: Callable[[Message], None] | None,
        on_ready: "Callable[[Connection], None]",
        guard: Callable[..., Any],
        wake: Callable[[], None],
        counts: "Counter[str]",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """subscriptions: topic filter to QoS, the ones wanted now. guard: calls a callback, and lets no exception out.

        on_ready: called once, after CONNACK and SUBACK. wake: makes the owner call `send_acks` soon.
        """
        self.loss: Loss | None = None
        self.online_at: float | None = None
        self.in_flight: dict[int, OutgoingMessage] = {}  # by packet id, in the order of sending
        self.forbidden: set[str] = set()  # optional topic filters that the broker has refused
        self._settings, self._queue, self._counts, self._clock = settings, queue, counts, clock
        self._subscriptions, self._optional, self._will = subscriptions, optional, will
        self._manual_ack, self._on_message, self._on_ready, self._wake = manual_ack, on_message, on_ready, wake
        self._started_at, self._has_connack = clock(), False
        self._max_packet = 268_435_460  # the protocol's own limit, until CONNACK says less
        self._window = 1
        self._progress_at = 0.0  # the last PUBACK, or when work began
        self._requested: Mapping[str, int] = {}  # sent to the broker, not necessarily granted yet
        self._subscribing: dict[int | None, list[str]] = {}  # packet id -> filters without a SUBACK
        self._serial = 0
        self._unacked: dict[int, int] = {}  # manual acknowledgement: serial -> packet id
        self._acks: deque[int] = deque()  # serials; bounded by what the broker has in flight to us
        client = self._client = paho.Client(
            CallbackAPIVersion.VERSION2,
            settings.client_id,
            protocol=paho.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=manual_ack,
        )
        client.connect_timeout = handshake_s
        client.max_inflight_messages = 0  # no limit: `_window` is the limit
        # With a write callback paho only queues, and never writes (and calls back) inside publish(); see `exchange`.
        client.on_socket_register_write = _ignore
        client.on_connect = partial(guard, self._connected)
        client.on_subscribe = partial(guard, self._subscribed)
        client.on_publish = partial(guard, self._published)
        client.on_message = partial(guard, self._received)
        client.on_disconnect = partial(guard, self._disconnected)
        if will:
            client.will_set(will.topic, will.payload, will.qos, will.retain)

    def open(self) -> None:
        """TCP, TLS and the CONNECT packet. Raises OSError: no route, refused, timed out, no such name,
        certificates; ConfigError for the password's file."""
        settings, client = self._settings, self._client
        if settings.username is not None:
            client.username_pw_set(settings.username, settings.password())
        if context := settings.tls_context():
            client.tls_set_context(context)
        size, count = settings.max_inbound_bytes, settings.receive_maximum
        limits = _properties(PacketTypes.CONNECT, MaximumPacketSize=size, ReceiveMaximum=count)
        # Clean start and no Session Expiry Interval: a broker that keeps the session of a $share member keeps sending
        # requests to it while it is dead.
        client.connect(settings.host, settings.port, settings.keepalive_s, clean_start=True, properties=limits)
        if isinstance(sock := client.socket(), socket.socket):
            # Nagle holds a second small packet until the first is acknowledged, some 40 ms (RFC 9293, 3.7.4).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def exchange(self, wait_ms: float, wake: socket.socket) -> None:
        """Wait for the connection, for another thread at `wake` or for the time; then read and write what is there."""
        client = self._client
        sock = client.socket()
        if self.loss or sock is None:
            self.loss = self.loss or Loss("connection closed")
            return
        poll = select.poll()
        poll.register(sock, select.POLLIN | (select.POLLOUT if client.want_write() else 0))
        poll.register(wake, select.POLLIN)
        buffered = isinstance(sock, ssl.SSLSocket) and sock.pending()  # whole packets that poll() cannot see
        ready = dict(poll.poll(0 if buffered else wait_ms))
        if buffered or ready.get(sock.fileno(), 0) & ~select.POLLOUT:
            client.loop_read()
        if client.want_write():
            client.loop_write()
        client.loop_misc()

    @property
    def has_room(self) -> bool:
        return len(self.in_flight) < self._window

    def send(self, message: OutgoingMessage, now: float) -> None:
        """Put a message into flight, unless the broker does not accept its size."""
        if len(message.topic.encode()) + (size := len(message.payload)) + PUBLISH_OVERHEAD > self._max_packet:
            self._queue.end(message, Outcome.OVERSIZED)
            if is_told(self._queue.counts()["oversized"]):
                client, topic, most = self._settings.client_id, message.topic, self._max_packet
                logger.warning("mqtt publish too large client=%s topic=%s bytes=%d most=%d", client, topic, size, most)
            return
        # The time that is left now: in paho's own queue it would not decrease.
        expiry_s = None if message.deadline == inf else max(1, ceil(message.deadline - now))
        properties = _properties(PacketTypes.PUBLISH, MessageExpiryInterval=expiry_s)
        if not self.in_flight:
            self._progress_at = now
        info = self._client.publish(message.topic, message.payload, message.qos, message.retain, properties)
        self.in_flight[info.mid] = message

    def update_subscriptions(self) -> None:
        """Ask the broker for what differs from the subscriptions that this connection has asked for."""
        wanted = dict(self._subscriptions())
        if wanted == self._requested:
            return
        added = {topic: qos for topic, qos in wanted.items() if self._requested.get(topic) != qos}
        if removed := [topic for topic in self._requested if topic not in wanted]:
            self._client.unsubscribe(removed)
        if added:
            _, packet_id = self._client.subscribe([(topic, SubscribeOptions(qos=qos)) for topic, qos in added.items()])
            self._subscribing[packet_id] = list(added)
        self._requested = wanted

    def send_acks(self) -> None:
        while self._acks:
            packet_id = self._unacked.pop(self._acks.popleft(), None)
            if packet_id is not None:  # None: acknowledged before
                self._client.ack(packet_id, 1)

    def check_handshake(self, now: float, timeout_s: float) -> None:
        """Give the connection up if CONNACK and SUBACK have not come in time."""
        if self.online_at is None and now - self._started_at > timeout_s:
            self.loss = Loss(f"no {'SUBACK' if self._has_connack else 'CONNACK'} in {timeout_s:g} s")

    def stalled_s(self, now: float) -> float:
        """Seconds since the last PUBACK while messages are in flight, else 0."""
        return now - self._progress_at if self.in_flight else 0.0

    @property
    def keepalive_s(self) -> int:
        return self._client.keepalive or self._settings.keepalive_s  # the broker may have set it to 0

    def say_goodbye(self) -> None:
        self.loss = CLOSED
        # 0x04 makes the broker send the will (MQTT 5, 3.14.2.1).
        name = "Disconnect with will message" if self._will else "Normal disconnection"
        self._client.disconnect(ReasonCode(PacketTypes.DISCONNECT, name))
        until = self._clock() + GOODBYE_S
        while self._client.want_write() and self._clock() < until and (sock := self._client.socket()):
            _wait(sock, select.POLLOUT, GOODBYE_S / 5)
            self._client.loop_write()

    def close(self) -> None:
        """Before closing a connection, read the pending PUBACKs, so that acknowledged messages are not sent again."""
        until = self._clock() + PENDING_ACKS_S
        with suppress(Exception):  # paho may be what broke
            while self.in_flight and (sock := self._client.socket()) and (now := self._clock()) < until:
                _wait(sock, select.POLLIN, until - now)
                self._client.loop_read()
        if last := self._client.socket():
            last.close()

    # ---- what paho reports; no exception leaves these, see `guard` ----

    def _connected(self, _: Any, __: Any, ___: Any, code: ReasonCode, got: Any) -> None:
        self._has_connack = True
        if code.is_failure:
            advice = self._settings.login_advice() if code.value in WRONG_LOGIN else ""
            self.loss = Loss(f"the broker refused the login: {code}{advice}", refused=code.value not in TEMPORARY)
            return
        self._max_packet = getattr(got, "MaximumPacketSize", self._max_packet)
        self._window = min(self._settings.window, getattr(got, "ReceiveMaximum", 65535))
        self.update_subscriptions()
        self._ready_if_subscribed()

    def _subscribed(self, _: Any, __: Any, packet_id: int, codes: list[ReasonCode], ___: Any) -> None:
        asked = zip(self._subscribing.pop(packet_id, []), codes, strict=False)
        refused = {topic: code for topic, code in asked if code.is_failure}
        for topic in refused.keys() & self._optional:
            code = refused.pop(topic)
            self.forbidden.add(topic)
            logger.info("mqtt goes on without client=%s topic=%s (%s)", self._settings.client_id, topic, code)
        if refused:  # A client that is online but deaf would be worse than one that is offline with a reason.
            told = ", ".join(f"{topic} ({code})" for topic, code in refused.items())
            forbidden = [topic for topic, code in refused.items() if code.value == NOT_AUTHORIZED]
            advice = self._settings.topic_advice(forbidden[0]) if forbidden else ""
            self.loss = Loss(f"the broker refused to subscribe {told}{advice}", refused=True)
        else:
            self._ready_if_subscribed()

    def _ready_if_subscribed(self) -> None:
        if self.online_at is None and not self._subscribing:
            self.online_at = self._progress_at = self._clock()
            self._on_ready(self)

    def _published(self, _: Any, __: Any, packet_id: int, code: ReasonCode, ___: Any) -> None:
        message = self.in_flight.pop(packet_id, None)
        if message is None:
            return
        self._progress_at = self._clock()
        # An access list or a quota: sent again it would be refused again.
        self._queue.end(message, Outcome.REFUSED if code.is_failure else Outcome.DELIVERED)
        if code.is_failure and is_told(self._queue.counts()["refused"]):
            client = self._settings.client_id
            logger.warning("mqtt publish refused client=%s topic=%s reason=%s", client, message.topic, code)

    def _received(self, _: Any, __: Any, raw: paho.MQTTMessage) -> None:
        self._counts["received"] += 1
        self._serial += 1
        ack: Callable[[], None] = _ignore
        if self._manual_ack and raw.qos == 1:
            self._unacked[self._serial] = raw.mid
            ack = partial(self._request_ack, self._serial)
        try:
            if len(raw.payload) > self._settings.max_inbound_bytes:  # the broker ignores our Maximum Packet Size
                self._counts["inbound_oversized"] += 1
                ack()
            elif self._on_message:
                expiry = getattr(raw.properties, "MessageExpiryInterval", None)
                self._on_message(Message(raw.topic, bytes(raw.payload), raw.qos, raw.retain, expiry, ack))
        except Exception:
            ack()
            raise

    def _request_ack(self, serial: int) -> None:  # any thread
        self._acks.append(serial)
        self._wake()

    def _disconnected(self, _: Any, __: Any, ___: Any, code: ReasonCode, ____: Any) -> None:
        if self.loss:  # a better reason is known: paho also reports what followed from it
            return
        if not self._has_connack:
            port = "is this a TLS port (8883)? then set ca_file, or tls;"
            if self._settings.uses_tls:
                port = "does it want a client certificate? then set cert_file and key_file;"
            self.loss = Loss(f"closed before CONNACK: {port} does it speak MQTT 5?")
            return
        by_broker = self.online_at is not None and code.value != KEEPALIVE_TIMEOUT  # a timeout is the link's fault
        self.loss = Loss(f"connection lost: {code}", by_broker, taken_over=code.value == SESSION_TAKEN_OVER)


def _wait(sock: Any, event: int, seconds: float) -> None:
    """Unlike select.select, poll() works beyond descriptor 1023."""
    poll = select.poll()
    poll.register(sock, event)
    poll.poll(1000 * seconds)


def _properties(packet: int, **values: int | None) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        if value is not None:
            setattr(properties, name, value)
    return properties


def _ignore(*_: object) -> None:
    pass
