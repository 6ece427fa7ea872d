"""What comes back, or does not: every request that the board sent ends in exactly one more final event.

One thread owns the table of open requests. The frame path and the MQTT client only put values on its queue; it sends,
publishes the "new" event behind the request, sends again with the same id, turns replies into "update" events and
passed deadlines into "lost" events.

A reply that is not final is an answer too, which a higher tier may improve: its "update" is not final, and at the
deadline, or with the higher tier's reply, a last one follows. With an outbox, a request that found no answer in time is
kept instead of lost: its "update" says that the draft stands for now, and it is asked again when the link has room.
"""

import logging
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from math import inf
from typing import Any, Protocol

import msgspec

from edge_runtime.config import OutboxConfig
from edge_runtime.inference.bundle import Bundle
from edge_runtime.logs import is_told
from edge_runtime.mqtt.client import MqttClient, Outcome, State
from edge_runtime.reporting.events import Events
from edge_runtime.requests.byte_budget import Ledger
from edge_runtime.requests.outbox import Counts, Outbox
from edge_runtime.requests.store import Kept
from edge_runtime.requests.table import Lost, OpenRequests
from edge_runtime.wire import (
    AnsweredBy,
    Event,
    EventHop,
    Reply,
    Request,
    Status,
    Tier,
    WireError,
    aged,
    decode_event,
    decode_reply,
    decode_request,
    encode_event,
    encode_request,
    topics,
)
from edge_runtime.wire.envelope import MAX_VIA
from edge_runtime.wire.event import PARADIGMS, ParadigmName

logger = logging.getLogger(__name__)

QUEUE = 256  # values between threads; a board has a few a second
IDLE_S = 0.5  # the longest wait between two looks at the clock
WRITE_S = 0.3  # for the outbox to write a request that must not be lost, before it leaves all the same
REPLAY_S = 30.0  # for the answer to a request out of the outbox
MAX_AFTER_S = 1e6  # of an event
AWAY_S = 5.0  # after a frame that found the link away, nothing is replayed
PUT_S = 1.0  # that the outbox's thread waits for room; without, it asks the request again later


@dataclass(slots=True)
class Question:
    """A request on its way and what is known of its frame."""

    request: Request
    payload: bytes  # the request as first sent
    seen: Event  # what the frame's next event starts from
    captured: float  # seconds, time.monotonic()
    deadline: float  # the same clock: the draft stands after it
    keeps: bool = False  # not to be sent now: the link is away
    is_replay: bool = False  # out of the outbox
    is_kept: bool = False  # the outbox has it
    is_announced: bool = False  # its "new" event has come behind it
    compact: bytes = b""  # the same request in fewer bytes, for the outbox
    not_final: int = 0  # replies so far that a higher tier may improve
    begun: float = 0.0  # the same clock: when the answers' thread took it
    asked: float = 0.0  # the same clock: when it was first sent
    bytes_up: int = 0  # whole payloads, resends included; counted by the answers' thread


@dataclass(frozen=True, slots=True)
class NotTaken:
    """The broker did not take a request, and will not."""

    request_id: bytes
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Due:
    """A request that the outbox wants asked again."""

    item: Kept
    age_s: float  # since capture


@dataclass(frozen=True, slots=True)
class Written:
    """Requests that outlive a power cut from now on."""

    ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Announced:
    """What is known of a frame behind its question."""

    seen: Event
    compact: bytes


class Observer(Protocol):
    """Learns from the traffic; any thread."""

    def sent(self, request_id: bytes, paradigm: ParadigmName, size: int, now: float) -> None:
        """A request leaves, or leaves again; size: bytes."""

    def answered(self, reply: Reply, now: float, draft: Sequence[int] = ()) -> None:
        """The first reply to a request; draft: what the board wrote for it, sent or not."""

    def lost(self, request_id: bytes, now: float) -> None:
        """No reply came in time."""


class Answers:
    """The board's open requests; `with` starts and ends its thread, and the outbox's."""

    def __init__(
        self,
        client: MqttClient,
        bundle: Bundle,
        site: str,
        board: str,
        events: Events,
        capacity: int,
        resend_s: float,
        outbox: OutboxConfig | None = None,
        observer: Observer | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """ledger: of the bytes that may leave; none: any number."""
        self._ledger = ledger or Ledger()
        self._client, self._bundle, self._events, self._capacity = client, bundle, events, capacity
        self._observer = observer
        self._outbox = (
            Outbox(
                outbox,
                on_due=self._due,
                on_dropped=self._dropped,
                may_replay=self._may_replay,
                on_kept=self._written,
            )
            if outbox
            else None
        )
        self._keeps_every_request = outbox is not None and outbox.every_request
        self._requests: OpenRequests[Question] = OpenRequests(capacity, min_resend_s=resend_s, rng=random.Random())
        self._topic = topics.request(site, board)
        self._improving: dict[bytes, Question] = {}  # answered; a higher tier may answer once more
        self._unwritten: dict[bytes, Question] = {}  # leave when the outbox has them on disk
        self._inbox: queue.Queue[Question | Announced | NotTaken | Due | Written | bytes | None] = queue.Queue(QUEUE)
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._asked = 0  # by the frame path
        self._kept_unsent = self._put_by = self._replayed = 0  # into the outbox, at once or in vain; out of it
        self._outdated = 0  # in the outbox, and not readable
        self._away_at = -inf  # when a frame last found the link away
        self.counts: Counter[str] = Counter()  # replies by status, and those that were none or found no room

    def __enter__(self) -> "Answers":
        if self._outbox:
            self._outbox.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._inbox.put(None)
        self._thread.join()
        if self._outbox:
            self._outbox.close()

    # ---- the frame path: it alone may wait, since a board that is so far behind must not take more frames ----

    @property
    def has_outbox(self) -> bool:
        return self._outbox is not None

    def has_room(self) -> bool:
        """Whether one more request may wait for its answer."""
        return self._requests.counts.open < self._capacity

    def affords(self, size: int) -> bool:
        """Whether a request of so many bytes may leave in this minute; then they are spent."""
        return self._ledger.take(size, time.monotonic())

    def ask(self, question: Question) -> None:
        """Takes over a question, whose bytes are spent already. Never waits for the network."""
        self._asked += 1
        self._inbox.put(question)

    def announce(self, seen: Event, compact: bytes = b"") -> None:
        """What is known of a frame behind its question: the "new" event, unless the answer was faster.

        compact: the same question in fewer bytes, for the outbox."""
        self._inbox.put(Announced(seen, compact))

    # ---- any thread ----

    def reply_arrived(self, payload: bytes) -> None:
        """One message on the board's reply topic; on the MQTT client's thread."""
        self._tell(payload)

    def wait_until_settled(self, timeout_s: float, stop: threading.Event) -> None:
        """Waits until every question has its answer or is lost, until the time is up or `stop` is set."""
        until = time.monotonic() + timeout_s
        while not self._is_settled() and time.monotonic() < until and not stop.is_set():
            # Not stop.wait(): its lock must be free when a signal interrupts this thread to set it.
            time.sleep(0.02)

    def _is_settled(self) -> bool:
        return self._accepted() == self._asked and self._requests.counts.open == 0 and not self._improving

    def _accepted(self) -> int:
        """Questions that have a place, on their way or in the outbox."""
        return self._requests.counts.accepted - self._replayed + self._kept_unsent

    def _tell(self, value: "NotTaken | bytes") -> None:
        """From the MQTT client's thread, which must not wait: without room the request is sent again, or lost."""
        try:
            self._inbox.put_nowait(value)
        except queue.Full:
            self.counts["overflow"] += 1

    def summary(self) -> dict[str, Any]:
        """Counters; accepted + found = answered + lost + open + kept, where found was kept by an earlier run."""
        counts = self._requests.counts
        box = self._outbox.counts if self._outbox else Counts()
        # By the outbox: too old, too many, lost by the disk, or written by a version that wrote otherwise.
        gone = sum(box.dropped.values()) + box.gaps + self._outdated
        values = {
            "accepted": self._accepted(),
            "found": box.found,
            "answered": counts.answered,
            "lost": counts.lost - self._put_by + gone,
            "open": counts.open,
            "kept": box.found + self._kept_unsent + self._put_by - self._replayed - gone,
            "replayed": self._replayed,
        }
        values |= {name: getattr(counts, name) for name in ("resent", "busy", "duplicate", "late", "unknown")}
        return values | {"reply": dict(self.counts)}  # a copy in one step: the answers' thread adds kinds

    def _run(self) -> None:
        while True:
            until = min([self._requests.next_at(), *(question.deadline for question in self._improving.values())])
            wait = min(IDLE_S, max(0.0, until - time.monotonic()))
            try:
                item = self._inbox.get(timeout=wait)
            except queue.Empty:
                self._look_at_the_clock()
                continue
            if item is None:
                break
            try:
                self._take(item)
            except Exception:  # whatever one message holds, the other requests must still end
                self.counts["broken"] += 1
                logger.exception("answers: not handled: %r", item)
            self._look_at_the_clock()
        for question in self._unwritten.values():  # the outbox has it
            self._kept_unsent += 1
            if not question.is_announced:
                self._events.publish(question.seen)
        for lost in self._requests.close("the board stops"):
            self._unanswered(lost)
        for question in self._improving.values():
            self._stand(question, "the board stops before a higher tier answered")

    def _take(self, item: "Question | Announced | NotTaken | Due | Written | bytes") -> None:
        if isinstance(item, Question):
            self._begin(item)
        elif isinstance(item, Announced):
            self._announce(item.seen, item.compact)
        elif isinstance(item, NotTaken):
            self._end_lost(self._requests.lose(item.request_id, f"broker: {item.outcome.value}"))
        elif isinstance(item, Due):
            self._ask_again(item)
        elif isinstance(item, Written):
            for question in filter(None, [self._unwritten.pop(request_id, None) for request_id in item.ids]):
                self._open(question)
        else:
            self._reply(item)

    def _begin(self, question: Question) -> None:
        """On its way, into the outbox, or on its way as soon as the outbox has written it."""
        question.begun = time.monotonic()
        if question.keeps:
            self._away_at = question.begun
        if question.keeps and self._keep(question):
            self._kept_unsent += 1
        elif question.keeps and not self._ledger.take(len(question.payload), question.begun):
            full = self._requests.open(question.request.id, question, question.deadline, question.begun)
            self._end_lost(full or self._requests.lose(question.request.id, "no room in outbox and byte budget"))
        elif self._keeps_every_request and self._keep(question, held=True):
            self._unwritten[question.request.id] = question
        else:
            self._open(question)

    def _open(self, question: Question) -> None:
        question.asked = now = time.monotonic()
        self._replayed += question.is_replay
        if lost := self._requests.open(question.request.id, question, question.deadline, now):
            self._unanswered(lost)
            return
        self._send(question, question.payload, question.deadline - now)

    def _announce(self, seen: Event, compact: bytes) -> None:
        """An event that its frame's answer has overtaken would only take the answer back; one without a draft says
        nothing, but where the frame waits in the outbox.
        """
        request_id = bytes.fromhex(seen.frame)
        entry = self._requests.find(request_id)
        question = entry.content if entry else self._unwritten.get(request_id)
        is_told = bool(seen.tokens) or question is None
        if question:
            question.seen, question.compact, question.is_announced = seen, compact, is_told
        if self._requests.has_ended(request_id):
            self.counts["overtaken"] += 1
        elif is_told:
            self._events.publish(seen)

    def _send(self, question: Question, payload: bytes, left_s: float) -> None:
        question.bytes_up += len(payload)
        if self._observer and not question.is_replay:
            paradigm = PARADIGMS[question.request.paradigm]
            self._observer.sent(question.request.id, paradigm, len(payload), time.monotonic())
        outcome = partial(self._sent, question.request.id)
        self._client.publish(self._topic, payload, qos=1, expiry_s=max(0.0, left_s), on_outcome=outcome)

    def _sent(self, request_id: bytes, outcome: Outcome) -> None:  # on the MQTT client's thread
        # What the queue dropped or what expired there is sent again, or lost at its deadline, as anything unanswered.
        if outcome in (Outcome.REFUSED, Outcome.OVERSIZED):
            self._tell(NotTaken(request_id, outcome))

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for request_id, question in list(self._improving.items()):
            if question.deadline <= now:
                del self._improving[request_id]
                self._stand(question, "no higher tier answered in time")
        overdue = now - WRITE_S  # a disk that hangs or is full holds nobody up for longer
        for question in [q for q in self._unwritten.values() if q.begun <= overdue]:
            del self._unwritten[question.request.id]
            self._open(question)
        for lost in self._requests.expired(now):
            self._unanswered(lost)
        for entry in self._requests.due(now):
            question, left_s = entry.content, entry.deadline - now
            payload = encode_request(aged(question.request, now - entry.opened_at, left_s))
            if self._ledger.take(len(payload), now):
                self._send(question, payload, left_s)
            else:
                self._requests.unsent(entry.id)
                self.counts["over_budget"] += 1

    def _reply(self, payload: bytes) -> None:
        try:
            reply = decode_reply(payload)
        except WireError as error:
            self.counts["unreadable"] += 1
            if is_told(self.counts["unreadable"]):
                logger.warning("reply unreadable count=%d error=%s", self.counts["unreadable"], error)
            return
        now = time.monotonic()
        self.counts[reply.status.name.lower()] += 1
        if reply.status is Status.BUSY:
            self._requests.busy(reply.id, (reply.retry_after_ms or 1000) / 1e3, now)
        elif reply.status is not Status.OK and self._requests.find(reply.id):
            status = reply.status.name.lower()
            self._end_lost(self._requests.lose(reply.id, f"server {reply.server}: {status}: {reply.error}"))
        elif reply.status is Status.OK and (question := self._improving.get(reply.id)):
            self._improve(question, reply, now)
        elif entry := self._requests.answered(reply.id, now):
            self._forget(entry.content)
            if self._observer:
                self._observer.answered(reply, now, entry.content.seen.tokens)
            self._update(entry.content, reply, now)

    def _improve(self, question: Question, reply: Reply, now: float) -> None:
        """Each new text once, and no more than there can be tiers: repeats come with every copy of a request."""
        seen = question.seen
        is_same = seen.tokens == tuple(reply.token_ids) and seen.answered_by == answered_by(reply)
        if not reply.final and (is_same or question.not_final > MAX_VIA):
            self.counts["not_final_again"] += 1
        else:
            self._update(question, reply, now)

    def _update(self, question: Question, reply: Reply, now: float) -> None:
        """A reply to the event that it is for its users."""
        seen = question.seen
        changes: dict[str, Any] = {
            "type": "update",
            "final": reply.final,
            "tokens": tuple(reply.token_ids),
            "text": reply.text or self._bundle.text(reply.token_ids),
            "answered_by": answered_by(reply),
            "accepted": reply.accepted,
            "proposed": reply.proposed,
            "passes": reply.passes,
            "hops": tuple(EventHop.from_hop(hop) for hop in reply.hops),
            "label": reply.label,
            "scores": reply.scores or {},
            "bytes_up": question.bytes_up,
            "timings_ms": seen.timings_ms | {"answer": round(1e3 * (now - question.asked), 1)},
            "after_ms": _after_ms(now - question.captured),
        }
        event = msgspec.structs.replace(seen, **changes)
        try:
            self._events.publish(event)
        except WireError as error:  # within a reply's bounds, but not within an event's
            self._improving.pop(reply.id, None)
            self._end_lost(Lost(reply.id, question, f"server {reply.server}: {error}"))
            return
        question.seen = event
        self._improving.pop(reply.id, None)
        if reply.final:
            return
        if len(self._improving) >= self._capacity:
            self._stand(self._improving.pop(next(iter(self._improving))), "too many wait for a higher tier")
        question.not_final += 1
        self._improving[reply.id] = question

    def _stand(self, question: Question, why: str) -> None:
        """The answer that there is becomes the last word."""
        self._publish(question, final=True, why=why)

    def _unanswered(self, lost: Lost[Question]) -> None:
        """The time is up: the outbox has it from here on, or it is lost."""
        question = lost.content
        if self._outbox and question.is_kept:
            self._outbox.failed(lost.id)
        elif not self._keep(question):
            self._end_lost(lost)
            return
        if self._observer:
            self._observer.lost(lost.id, time.monotonic())
        self._put_by += 1
        if not question.is_replay:
            why = f"{lost.reason}: kept, asked again later"
            self._publish(question, type="update", final=False, why=why[:1024])

    def _end_lost(self, lost: Lost[Question] | None) -> None:
        if lost is None:
            return
        logger.info("request lost id=%s reason=%s", lost.id.hex(), lost.reason)
        self._forget(lost.content)
        if self._observer:
            self._observer.lost(lost.id, time.monotonic())
        self._publish(lost.content, type="lost", final=True, why=lost.reason[:1024])

    def _publish(self, question: Question, **changes: Any) -> None:
        after_ms = _after_ms(time.monotonic() - question.captured)
        self._events.publish(
            msgspec.structs.replace(question.seen, bytes_up=question.bytes_up, after_ms=after_ms, **changes)
        )

    # ---- the outbox ----

    def _keep(self, question: Question, held: bool = False) -> bool:
        """Into the outbox, if there is one and it takes more."""
        if self._outbox is None:
            return False
        captured = question.seen.captured.timestamp()
        now = captured + time.monotonic() - question.captured  # a wall clock that jumped would make it years old
        payload = question.compact or question.payload
        item = Kept(question.request.id, captured, now, payload, encode_event(question.seen))
        question.is_kept = self._outbox.keep(item, held=held)
        return question.is_kept

    def _forget(self, question: Question) -> None:
        """It has ended: the outbox need not ask it again."""
        if self._outbox and question.is_kept:
            self._outbox.done(question.request.id)

    def _ask_again(self, due: Due) -> None:
        item, now = due.item, time.monotonic()
        if self._requests.find(item.request_id):
            return
        try:
            request, seen = decode_request(item.payload), decode_event(item.seen)
        except WireError as error:  # written by another version
            self._give_up(item, f"outbox: {error}")
            return
        again = aged(msgspec.structs.replace(request, age_ms=0), due.age_s, REPLAY_S)
        payload, captured = encode_request(again), now - due.age_s
        if self._ledger.take(len(payload), now):
            self._open(Question(again, payload, seen, captured, now + REPLAY_S, is_replay=True, is_kept=True))
        else:
            self.counts["over_budget"] += 1
            assert self._outbox is not None
            self._outbox.failed(item.request_id)

    def _may_replay(self) -> bool:  # on the outbox's thread, as the next ones
        """Live frames come first: in the table, in the budget, and on a link that has just been away for them."""
        now = time.monotonic()
        budget = self._ledger.bytes_per_minute
        return (
            self._client.state is State.ONLINE
            and now - self._away_at > AWAY_S
            and self._requests.counts.open < max(1, self._capacity // 2)
            and (not budget or self._ledger.spent(now) < budget / 2)
        )

    def _written(self, ids: tuple[bytes, ...]) -> None:
        if self._keeps_every_request:
            self._inbox.put(Written(ids), timeout=PUT_S)

    def _due(self, item: Kept, age_s: float) -> None:
        self._inbox.put(Due(item, age_s), timeout=PUT_S)

    def _dropped(self, items: list[Kept], reason: str) -> None:
        for item in items:
            self._publish_lost(item, f"outbox: {reason}")

    def _give_up(self, item: Kept, why: str) -> None:
        assert self._outbox is not None
        self._outdated += 1
        self._outbox.done(item.request_id)
        self._publish_lost(item, why)

    def _publish_lost(self, item: Kept, why: str) -> None:
        captured = datetime.fromtimestamp(item.captured, timezone.utc)
        try:
            seen = decode_event(item.seen)
        except WireError:
            seen = Event(type="lost", frame=item.request_id.hex(), camera="unknown", captured=captured)
        after_ms = _after_ms(time.time() - item.captured)
        self._events.publish(msgspec.structs.replace(seen, type="lost", final=True, why=why[:1024], after_ms=after_ms))


def answered_by(reply: Reply) -> AnsweredBy:
    """Whose text a reply has."""
    return AnsweredBy("cloud" if reply.tier is Tier.CLOUD else "edge", reply.server)


def _after_ms(seconds: float) -> float:
    """As an event can hold it: what was kept for weeks, or under a clock that jumped, is as old as can be said."""
    return 1e3 * min(max(0.0, seconds), MAX_AFTER_S)
