"""The board's requests: sends them, and turns what comes back, or does not, into events.

What becomes of a request is decided in lifecycle.py, and its events are those of request_events.py; here are the thread
around both, the byte budget and the outbox. Every request that the board submits ends in exactly one more final event.
"""

import logging
import random
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import msgspec

from edge_runtime.config import OutboxConfig
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import MqttClient, Outcome, State
from edge_runtime.reporting.events import Events
from edge_runtime.requests.actions import (
    Action,
    Answer,
    Delete,
    Found,
    Lose,
    Postpone,
    Read,
    Send,
    Settle,
    Store,
    Why,
)
from edge_runtime.requests.byte_budget import ByteBudget
from edge_runtime.requests.lifecycle import RequestLifecycle
from edge_runtime.requests.request_events import RequestEvents, unusable
from edge_runtime.requests.thread import LifecycleThread
from edge_runtime.requests.tracked import NewRequest, Row, Tracked, row_of
from edge_runtime.wire import (
    Event,
    Reply,
    Status,
    WireError,
    aged,
    decode_event,
    decode_request,
    encode_event,
    encode_request,
    topics,
)
from edge_runtime.wire.envelope import MAX_UINT32
from edge_runtime.wire.event import PARADIGMS, ParadigmName

if TYPE_CHECKING:
    from edge_runtime.requests.outbox import Outbox

logger = logging.getLogger(__name__)

NO_BYTES = Why("no_bytes", "no bytes left in this minute's budget")


@dataclass(frozen=True, slots=True)
class _Draft:
    """A frame's event with its draft, which came after its request was submitted."""

    event: Event
    compact: bytes


@dataclass(frozen=True, slots=True)
class _FoundInOutbox:
    rows: list[Found]
    missing: int


@dataclass(frozen=True, slots=True)
class _StoredInOutbox:
    ids: list[bytes]


@dataclass(frozen=True, slots=True)
class _ReadFromOutbox:
    id: bytes
    row: Row | None


_Message: TypeAlias = NewRequest | _Draft | _FoundInOutbox | _StoredInOutbox | _ReadFromOutbox


class Observer(Protocol):
    """Learns from the traffic; any thread."""

    def sent(self, request_id: bytes, paradigm: ParadigmName, size: int, now: float) -> None:
        """A request is sent, or sent again; size: bytes."""

    def answered(self, reply: Reply, now: float, draft: Sequence[int] = (), *, is_timed: bool = True) -> None:
        """The first reply to a request; draft: what the board wrote for it, sent or not.

        is_timed: False if the request has waited for the broker or for a server meanwhile.
        """

    def lost(self, request_id: bytes, now: float) -> None:
        """No reply came in time."""


class RequestTracker:
    """The board's requests; `with` starts and ends its thread, and the outbox's."""

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
        byte_budget: ByteBudget | None = None,
        on_reply: Callable[[Reply], None] = lambda _: None,
        find_silence: Callable[[], str] = str,
        has_other_server: Callable[[AbstractSet[str], float], bool] = lambda refused, now: True,
        unknown_share: float = 0.0,
    ) -> None:
        """capacity: requests that wait for a reply; byte_budget: None: no limit; on_reply: is told each reply.

        find_silence: why no server can answer now, in words for people; "" if one can.
        has_other_server, unknown_share: see RequestLifecycle.
        """
        self._client, self._observer, self._find_silence = client, observer, find_silence
        self._capacity, self._budget, self._on_reply = capacity, byte_budget or ByteBudget(), on_reply
        self._request_events = RequestEvents(events, bundle, lambda: client.state is State.ONLINE, find_silence)
        self._lost_early: dict[bytes, Lose[Tracked]] = {}  # before the frame's draft came: their events wait for it
        self._topic = topics.request(site, board)
        self._outbox = self._new_outbox(outbox) if outbox else None
        self.stores_first = bool(outbox and outbox.every_request)  # each request, before it is sent
        self._lifecycle: RequestLifecycle[Tracked] = RequestLifecycle(
            capacity,
            min_resend_s=resend_s,
            unknown_share=unknown_share,
            has_other_server=has_other_server,
            rng=random.Random(),
            outbox=outbox,
            size_of=lambda tracked: row_of(tracked).size,
            may_store=lambda tracked: tracked.may_be_stored,
            is_complete=lambda tracked: tracked.draft_until == -inf,
        )
        self._thread: LifecycleThread[Tracked, _Message] = LifecycleThread(
            "requests", self._lifecycle, self._receive, self._perform, self._reply, self._before_step
        )
        self.reply_arrived = self._thread.reply_arrived  # each message on the board's reply topic; any thread
        self._submitted = 0  # by the frame path
        self._sent_bytes = 0  # of all requests that the broker has
        # Requests that were answered without the outbox, and their seconds since capture.
        self._answer_seconds = 0, 0.0

    def _new_outbox(self, config: OutboxConfig) -> "Outbox":
        from edge_runtime.requests.outbox import Outbox  # here, as a board without one need not load SQLite

        return Outbox(
            config,
            on_found=lambda rows, missing: self._thread.put(_FoundInOutbox(rows, missing)),
            on_stored=lambda ids: self._thread.put(_StoredInOutbox(ids)),
            on_read=lambda request_id, row: self._thread.put(_ReadFromOutbox(request_id, row)),
        )

    def __enter__(self) -> "RequestTracker":
        if self._outbox:
            self._outbox.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.close(Why("stopping", "the board stops"))
        self._tell_early_losses(until=inf)
        for row in self._outbox.close() if self._outbox else []:
            tracked = self._restore(row, time.monotonic())
            self._thread.follow(self._lifecycle.on_unwritten(row.id, tracked))

    # ---- the frame path: it alone may wait, since a board that is so far behind must not take more frames ----

    @property
    def has_outbox(self) -> bool:
        return self._outbox is not None

    def has_room(self) -> bool:
        """Whether one more request may wait for its reply."""
        return self._thread.counts.open < self._capacity

    def submit(self, new: NewRequest) -> bool:
        """Takes over a request. False: its bytes do not fit into this minute's budget, and nothing is sent."""
        if not new.keep and not self._budget.take(len(new.payload), time.monotonic()):
            return False
        self._submitted += 1
        self._thread.put(new)
        return True

    def announce(self, event: Event, compact: bytes = b"") -> None:
        """The draft's event, which may come after the request is on its way. Published unless the answer was faster.

        compact: the same request with features instead of its picture, for the outbox.
        """
        self._thread.put(_Draft(event, compact))

    # ---- any thread ----

    def hangs(self) -> bool:
        """The thread of the requests hangs. Any thread may ask, while this is open."""
        return self._thread.hangs(time.monotonic())

    def wait_until_settled(self, timeout_s: float, stop: Any, on_turn: Callable[[], None] = lambda: None) -> None:
        """Waits until no request is open, until the time is up or the event `stop` is set.

        on_turn: called again and again meanwhile.
        """
        until = time.monotonic() + timeout_s
        while not self._is_settled() and time.monotonic() < until and not stop.is_set():
            on_turn()
            # Not stop.wait(): its lock must be free when a signal interrupts this thread to set it.
            time.sleep(0.02)

    def _is_settled(self) -> bool:
        counts = self._thread.counts
        return counts.accepted == self._submitted and counts.open == 0 and counts.improvable == 0

    def summary(self) -> dict[str, Any]:
        """Counters: accepted + found = answered + lost + open + kept; under "reply", replies by what became of them."""
        counts = self._thread.counts
        names = ("accepted", "found", "answered", "lost", "open", "kept", "resent", "busy")
        values: dict[str, Any] = {name: getattr(counts, name) for name in (*names, "duplicate", "late", "unknown")}
        count, seconds = self._answer_seconds
        values |= {"replayed": counts.retried, "request_bytes": self._sent_bytes}
        values["answer_seconds"] = {"count": count, "sum": seconds}
        replies = {**self._thread.replies, "not_final_again": counts.repeated}
        return values | {"reply": {kind: count for kind, count in replies.items() if count}}

    # ---- the thread: messages ----

    def _tell_early_losses(self, until: float) -> None:
        """Of frames whose drafts have not come by then."""
        for request_id, lose in list(self._lost_early.items()):
            if lose.content and lose.content.draft_until <= until:
                lose.content.draft_until = -inf
                self._thread.follow([self._lost_early.pop(request_id)])

    def _before_step(self, now: float) -> bool:
        self._tell_early_losses(until=now)
        self._lifecycle.can_store = self._outbox is not None and self._outbox.has_room()
        budget = self._budget.bytes_per_minute
        has_bytes = not budget or self._budget.spent(now) < budget / 2  # live frames come first
        return has_bytes and self._client.state is State.ONLINE and not self._find_silence()

    def _receive(self, message: _Message, now: float) -> Sequence[Action[Tracked]]:
        actions: Sequence[Action[Tracked]] = ()
        match message:
            case NewRequest(request, payload, event, captured, deadline, keep, compact):
                tracked = Tracked(request, payload, event, captured, compact=compact, is_paid=not keep)
                is_complete = event.tokens and (self._outbox is None or tracked.may_be_stored)
                tracked.draft_until = -inf if is_complete else deadline
                actions = self._lifecycle.on_request(request.id, tracked, deadline, now, link_is_away=keep)
            case _Draft(event, compact):
                actions = self._announce(event, compact, now)
            case _FoundInOutbox(rows, missing):
                actions = self._lifecycle.on_found(rows, missing, now)
            case _StoredInOutbox(ids):
                actions = self._lifecycle.on_stored(ids, now)
            case _ReadFromOutbox(request_id, row):
                actions = self._read(request_id, row, now)
        return actions

    def _announce(self, event: Event, compact: bytes, now: float) -> Sequence[Action[Tracked]]:
        """An event that comes after the frame's answer would take the answer back; one without a draft says nothing."""
        request_id = bytes.fromhex(event.frame)
        if (lose := self._lost_early.pop(request_id, None)) and lose.content:
            lose.content.event, lose.content.draft_until = event, -inf
            return [lose]
        tracked = self._lifecycle.find(request_id)
        if self._lifecycle.has_ended(request_id) or (tracked and tracked.answer):
            self._thread.replies["overtaken"] += 1
            return ()
        if tracked:
            tracked.event, tracked.compact, tracked.draft_until = event, compact, -inf
        if event.tokens or tracked is None:
            self._request_events.announced(event, tracked)
        return self._lifecycle.on_complete(request_id, now)

    def _reply(self, reply: Reply, now: float) -> Sequence[Action[Tracked]]:
        self._on_reply(reply)
        if reply.status is Status.OK and (tracked := self._lifecycle.find(reply.id)):
            try:
                tracked.answer = self._request_events.update(tracked, reply, now)
                encode_event(tracked.answer)
            except WireError as error:  # within a reply's limits, but not within an event's
                return self._lifecycle.on_unusable_answer(reply.id, unusable(reply, error))
        return self._lifecycle.on_reply(reply, now)

    def _read(self, request_id: bytes, row: Row | None, now: float) -> Sequence[Action[Tracked]]:
        if row is None:
            return self._lifecycle.on_read(request_id, None, now)
        try:
            tracked = self._restore(row, now)
        except WireError as error:  # written by another version, or damaged
            return self._lifecycle.on_read(request_id, None, now, str(error))
        return self._lifecycle.on_read(request_id, tracked, now)

    # ---- the thread: actions ----

    def _perform(self, action: Action[Tracked], now: float) -> Sequence[Action[Tracked]]:
        match action:
            case Send():
                return self._send(action, now)
            case Answer():
                return self._answer(action, now)
            case Settle():
                self._request_events.settled(action.content, action.why, now)
            case Postpone():
                self._refund(action.content, now)
                self._observe_loss(action.id, now)
                self._request_events.postponed(action.content, action.why, now)
            case Lose(request_id, Tracked(draft_until=until)) if now < until:
                self._lost_early[request_id] = action
            case Lose():
                self._refund(action.content, now)
                self._lose(action, now)
            case Store() if self._outbox:
                self._outbox.put(row_of(action.content))
            case Read() if self._outbox:
                self._outbox.read(action.id)
            case Delete() if self._outbox:
                self._outbox.delete(action.id)
        return ()

    def _send(self, send: Send[Tracked], now: float) -> Sequence[Action[Tracked]]:
        tracked = send.content
        if send.is_resend and not send.is_asked_for and (why := self._why_not_again(tracked)):
            return self._lifecycle.on_unsent(send, Why("no_reply", why), now)
        payload = tracked.payload
        if send.is_resend or tracked.is_retry:
            payload = encode_request(aged(tracked.request, send.waited_s, send.left_s))
        if not tracked.is_paid and not self._budget.take(len(payload), now):
            self._thread.replies["over_budget"] += 1
            return self._lifecycle.on_unsent(send, NO_BYTES, now)
        tracked.is_paid = False  # that was for this time
        tracked.offered += len(payload)
        if not send.is_resend:
            tracked.sent_at = now
        if self._observer and not tracked.is_retry:
            self._observer.sent(send.id, PARADIGMS[tracked.request.paradigm], len(payload), now)
        outcome = partial(self._copy_ended, send.id, tracked, len(payload))
        self._client.publish(self._topic, payload, qos=1, expiry_s=max(0.0, send.left_s), on_outcome=outcome)
        return ()

    def _why_not_again(self, tracked: Tracked) -> str:
        """Why another copy of a request would be in vain; "" if it would not."""
        if tracked.offered > tracked.ended:
            return "an earlier copy is still on its way to the broker"
        return self._find_silence() if self._client.state is State.ONLINE else ""

    def _copy_ended(self, request_id: bytes, tracked: Tracked, size: int, outcome: Outcome) -> None:
        """On the client's thread: what became of one copy of a request."""
        is_delivered = outcome is Outcome.DELIVERED
        self._sent_bytes += is_delivered * size
        tracked.copy_ended(size, is_delivered)
        self._thread.copy_ended(request_id, outcome)

    def _answer(self, answer: Answer[Tracked], now: float) -> Sequence[Action[Tracked]]:
        tracked = answer.content
        if answer.is_first and not tracked.is_retry:
            self._answer_seconds = (self._answer_seconds[0] + 1, self._answer_seconds[1] + now - tracked.captured)
        if self._observer and answer.is_first:
            self._observer.answered(answer.reply, now, tracked.event.tokens, is_timed=not answer.is_unclear)
        self._request_events.answered(tracked, answer.reply, now)
        return ()

    def _lose(self, lose: Lose[Tracked], now: float) -> None:
        if lose.content and not lose.content.is_retry:
            self._observe_loss(lose.id, now)
        self._request_events.lost(lose, now)

    def _refund(self, tracked: Tracked | None, now: float) -> None:
        """Give back the bytes of a request that was paid for and never sent."""
        if tracked and tracked.is_paid:
            tracked.is_paid = False
            self._budget.refund(len(tracked.payload), now)

    def _observe_loss(self, request_id: bytes, now: float) -> None:
        if self._observer:
            self._observer.lost(request_id, now)

    def _restore(self, row: Row, now: float) -> Tracked:
        """A row of the outbox as a request. Raises WireError for what another version wrote."""
        request, event = decode_request(row.payload), decode_event(row.event)
        age_s = max(0.0, row.kept - row.captured) + self._lifecycle.kept_for_s(row.id, now)
        request = msgspec.structs.replace(request, age_ms=min(int(1e3 * age_s), MAX_UINT32))
        return Tracked(request, row.payload, event, now - age_s, is_retry=True, delivered=event.bytes_up)
