"""The connection to the tier above: this server asks there as a board would, under its own id as the board's.

One thread owns the table of open requests, as on a board. The engine's thread and the MQTT client only put values on
its queue; it sends, sends again with the same id, and tells whoever asked: any number of replies that are not final,
then exactly once how it ended, by a final reply or by the reason why there is none. So nothing here is waited for, and
a tier above that is gone, slow, or hostile costs a request its improvement and never its answer.

A request that is asked while the broker answers and is cut off later is not given up before its time: the connection
may come back, the request is then sent again, and the board has a text to show meanwhile.
"""

import logging
import queue
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import msgspec

from edge_runtime.mqtt.client import Message, MqttClient, Outcome, State
from edge_runtime.requests.table import Lost, OpenRequests
from edge_runtime.wire import (
    EnvelopeError,
    Reply,
    Request,
    RequestIds,
    Status,
    aged,
    decode_reply,
    encode_request,
    topics,
)
from edge_runtime.wire.envelope import MAX_UINT32, MAX_VIA
from server.config import UpstreamConfig
from server.escalation import Above, Bounds

logger = logging.getLogger(__name__)

QUEUE = 256  # replies that wait for the thread; more are dropped, and asked for again
IDLE_S = 0.5  # the longest wait between two looks at the clock
TRIPS = 64  # round trips that the estimate is made of
TRIP_AGE_S = 60.0  # and how long each counts: a tier above that was slow is tried again after it

Tell = Callable[[Reply | None, str], None]


@dataclass(slots=True)
class Question:
    """A request that was passed up."""

    request: Request  # as it was when asked
    until: float  # seconds, time.monotonic(): then whoever asked goes on without
    tell: Tell  # on the thread of Upstream; None: there is no reply, and why
    asked: float  # seconds, time.monotonic()
    not_final: int = 0  # replies so far
    latest: bytes = b""  # of them, without its times


@dataclass(frozen=True, slots=True)
class _NotTaken:
    """The broker did not take a request, and will not."""

    id: bytes


class Upstream:
    """The requests that wait for the tier above; `with` starts and ends connection and thread."""

    def __init__(self, config: UpstreamConfig, server: str) -> None:
        """Raises ConfigError if no connection can ever work."""
        self.bounds = Bounds(config.min_confidence, config.max_share, config.explore)
        self._capacity = config.open_requests
        self._requests: OpenRequests[Question] = OpenRequests(
            config.open_requests, min_resend_s=config.resend_ms / 1e3, rng=random.Random()
        )
        self._topic = topics.request(config.site, server)
        self._ids = RequestIds()
        # Its questions are bounded by the table's capacity (see `above`), its replies by QUEUE: no put ever waits.
        self._inbox: queue.SimpleQueue[Question | _NotTaken | bytes | None] = queue.SimpleQueue()
        self._asked = 0  # written by the asking thread alone, read by it too
        self._ended = 0  # written by our thread alone
        self._trips: tuple[tuple[float, float], ...] = ()  # (when, seconds), replaced whole: two threads read it
        self.counts: Counter[str] = Counter()  # replies by status, and those that were none or found no room
        self._thread = threading.Thread(target=self._run, name="upstream", daemon=True)
        self._client = MqttClient(
            config.settings(server),
            subscriptions=[(topics.reply(config.site, server), 1)],
            on_message=self._arrived,
        )

    def __enter__(self) -> "Upstream":
        self._client.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._inbox.put(None)
        self._thread.join()
        self._client.close(drain_s=0.0)  # nobody waits for what is still to be sent

    # ---- the engine's thread ----

    def above(self, now: float) -> Above:
        """What `escalation.obstacle_to` wants to know. Only the thread that asks adds to the table."""
        is_online = self._client.state is State.ONLINE
        return Above(is_online, self._asked - self._ended < self._capacity, self._round_trip_s(0.95, now))

    def ask(self, request: Request, until: float, tell: Tell) -> None:
        """Passes a request up, under an id of our own. Never waits. Raises EnvelopeError where it is too large."""
        request = msgspec.structs.replace(request, id=self._ids.next(time.time_ns() // 1_000_000, secrets.randbits(16)))
        # In its longest form: numbers grow with their values, and a later copy is older.
        encode_request(msgspec.structs.replace(request, age_ms=MAX_UINT32, budget_ms=MAX_UINT32))
        self._asked += 1
        self._inbox.put(Question(request, until, tell, time.monotonic()))

    # ---- any thread ----

    def wait_online(self, timeout_s: float) -> bool:
        """Whether the broker has answered in that time."""
        return self._client.wait_online(timeout_s)

    def status(self) -> dict[str, Any]:
        """Connection, round trip in ms and counters: accepted = answered + lost + open."""
        now, counts = time.monotonic(), self._requests.counts
        names = ("accepted", "answered", "lost", "open", "resent", "busy", "duplicate", "late", "unknown")
        return {
            "state": self._client.state.value,
            "round_trip_ms": {f"p{int(100 * p)}": round(1e3 * self._round_trip_s(p, now), 1) for p in (0.5, 0.95)},
            "requests": {name: getattr(counts, name) for name in names},
            "replies": dict(self.counts),
        }

    def _round_trip_s(self, share: float, now: float) -> float:
        """What this share of the late round trips stayed below, 0: not known."""
        late = sorted(seconds for at, seconds in self._trips if now - at <= TRIP_AGE_S)
        return late[ceil(share * len(late)) - 1] if late else 0.0

    # ---- the MQTT client's thread ----

    def _arrived(self, message: Message) -> None:
        if self._inbox.qsize() < QUEUE + self._capacity:
            self._inbox.put(message.payload)
        else:
            self.counts["overflow"] += 1

    def _sent(self, request_id: bytes, outcome: Outcome) -> None:
        # What the queue dropped or what expired there is sent again, or lost at its deadline, as anything unanswered.
        if outcome in (Outcome.REFUSED, Outcome.OVERSIZED):
            self._inbox.put(_NotTaken(request_id))

    # ---- the thread of its own ----

    def _run(self) -> None:
        while True:
            wait_s = min(IDLE_S, max(0.0, self._requests.next_at() - time.monotonic()))
            try:
                item = self._inbox.get(timeout=wait_s)
            except queue.Empty:
                self._look_at_the_clock()
                continue
            if item is None:
                break
            if isinstance(item, Question):
                self._open(item)
            elif isinstance(item, _NotTaken):
                self._end_without(self._requests.lose(item.id, "refused by the broker"), "not_taken")
            else:
                self._reply(item)
            self._look_at_the_clock()
        for lost in self._requests.close():
            self._end_without(lost, "stopping")

    def _open(self, question: Question) -> None:
        if lost := self._requests.open(question.request.id, question, question.until, time.monotonic()):
            self._end_without(lost, "full")
        else:
            self._send(question)

    def _send(self, question: Question) -> None:
        now = time.monotonic()
        left_s = max(0.0, question.until - now)
        payload = encode_request(aged(question.request, now - question.asked, left_s))
        outcome = partial(self._sent, question.request.id)
        self._client.publish(self._topic, payload, expiry_s=left_s, on_outcome=outcome)

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for lost in self._requests.expired(now):
            # It would have taken longer still: so a tier above that is gone is soon left alone.
            self._add_trip(now, now - lost.content.asked)
            self._end_without(lost, "no_reply")
        for entry in self._requests.due(now):
            self._send(entry.content)

    def _reply(self, payload: bytes) -> None:
        try:
            reply = decode_reply(payload)
        except EnvelopeError as error:
            self.counts["unreadable"] += 1
            if self.counts["unreadable"] == 1:  # the counter has the others
                logger.warning("reply from above unreadable error=%s", error)
            return
        now = time.monotonic()
        status = reply.status.name.lower()
        self.counts[status] += 1
        entry = self._requests.find(reply.id)
        if entry is None:
            self._requests.answered(reply.id, now)  # for its counters: a duplicate, late, or nothing we asked
        elif reply.status is Status.BUSY and now + (reply.retry_after_ms or 0) / 1e3 < entry.deadline:
            self._requests.busy(reply.id, (reply.retry_after_ms or 1000) / 1e3, now)
        elif reply.status is not Status.OK:
            logger.info("refused above server=%s status=%s error=%s", reply.server, status, reply.error)
            self._end_without(self._requests.lose(reply.id, status), status)
        elif not reply.final:
            self._not_final(entry.content, reply)
        else:
            self._requests.answered(reply.id, now)
            if entry.sends == 1:  # Karn's rule, RFC 6298, section 3
                self._add_trip(now, now - entry.opened_at)
            self._end(entry.content, reply, "")

    def _not_final(self, question: Question, reply: Reply) -> None:
        """Each new text once, and no more than there can be tiers above: the board need not see the rest."""
        tokens_of = reply.server.encode() + b"\0" + reply.tokens
        if question.not_final >= MAX_VIA or tokens_of == question.latest:
            self.counts["not_final_again"] += 1
            return
        question.not_final, question.latest = question.not_final + 1, tokens_of
        self._tell(question, reply, "")

    def _add_trip(self, now: float, seconds: float) -> None:
        self._trips = (*self._trips[1 - TRIPS :], (now, seconds))

    def _end_without(self, lost: Lost[Question] | None, why: str) -> None:
        if lost is not None:
            self._end(lost.content, None, why)

    def _end(self, question: Question, reply: Reply | None, why: str) -> None:
        self._ended += 1
        self._tell(question, reply, why)

    def _tell(self, question: Question, reply: Reply | None, why: str) -> None:
        try:
            question.tell(reply, why)
        except Exception:  # whatever it is, the other requests must still end
            self.counts["broken"] += 1
            logger.exception("reply from above could not be told id=%s", question.request.id.hex())
