"""The board's requests: sends them, and turns what comes back, or does not, into events.

What becomes of a request is decided in lifecycle.py; here are the thread around it, the byte budget, the events and the
outbox. Every request that the board submits ends in exactly one more final event.
"""

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Any, Protocol

import msgspec

from edge_runtime.config import OutboxConfig
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import MqttClient, State
from edge_runtime.reporting.events import Events
from edge_runtime.requests.actions import Action, Answer, Delete, Lose, Postpone, Read, Send, Settle, Store, Why
from edge_runtime.requests.byte_budget import ByteBudget
from edge_runtime.requests.lifecycle import RequestLifecycle
from edge_runtime.requests.outbox import Outbox, Row
from edge_runtime.requests.thread import LifecycleThread
from edge_runtime.wire import WireError, decode_request, encode_request, topics
from edge_runtime.wire.envelope import MAX_UINT32, Reply, Request, Tier, aged
from edge_runtime.wire.event import PARADIGMS, AnsweredBy, Event, EventHop, ParadigmName, decode_event, encode_event

logger = logging.getLogger(__name__)

MAX_AFTER_S = 1e6  # of an event
NO_BYTES = Why("no_bytes", "no bytes left in this minute's budget")


@dataclass(slots=True)
class _Tracked:
    """A request and what is known of its frame."""

    request: Request
    payload: bytes  # as it is sent next
    event: Event  # the frame's latest
    captured: float  # seconds, time.monotonic()
    is_paid: bool = False  # its bytes are taken from the budget
    compact: bytes = b""  # the same request in fewer bytes, for the outbox
    sent_at: float = 0.0  # seconds, time.monotonic(): first, in this try
    bytes_up: int = 0  # whole payloads, resends included
    is_retry: bool = False  # out of the outbox


class Observer(Protocol):
    """Learns from the traffic; any thread. planning.Measurements says what each call means."""

    def sent(self, request_id: bytes, paradigm: ParadigmName, size: int, now: float) -> None: ...
    def answered(self, reply: Reply, now: float, draft: Sequence[int] = ()) -> None: ...
    def lost(self, request_id: bytes, now: float) -> None: ...


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
    ) -> None:
        """capacity: requests that wait for a reply; byte_budget: None: no limit."""
        self._client, self._bundle, self._events, self._observer = client, bundle, events, observer
        self._capacity, self._budget = capacity, byte_budget or ByteBudget()
        self._topic = topics.request(site, board)
        self._outbox: Outbox | None = None
        if outbox:
            self._outbox = Outbox(
                outbox,
                on_found=lambda rows, missing: self._thread.put(partial(self._lifecycle.on_found, rows, missing)),
                on_stored=lambda ids: self._thread.put(partial(self._lifecycle.on_stored, ids)),
                on_read=lambda request_id, row: self._thread.put(partial(self._read, request_id, row)),
            )
        self._lifecycle: RequestLifecycle[_Tracked] = RequestLifecycle(
            capacity, min_resend_s=resend_s, rng=random.Random(), outbox=outbox, size_of=lambda t: _row(t).size
        )
        self._thread = LifecycleThread("requests", self._lifecycle, self._perform, self._before_step, self._reply)
        self.reply_arrived = self._thread.reply_arrived  # each message on the board's reply topic; any thread
        self._submitted = 0  # by the frame path

    def __enter__(self) -> "RequestTracker":
        if self._outbox:
            self._outbox.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.close(Why("stopping", "the board stops"))
        for row in self._outbox.close() if self._outbox else []:
            tracked = self._restore(row, time.monotonic())
            self._thread.follow(self._lifecycle.on_unwritten(row.id, tracked))

    # ---- the frame path: it alone may wait, since a board that is so far behind must not take more frames ----

    @property
    def has_outbox(self) -> bool:
        return self._outbox is not None

    def has_room(self) -> bool:
        """Whether one more request may wait for its reply."""
        return self._thread.counts["open"] < self._capacity

    def submit(
        self, request: Request, payload: bytes, event: Event, captured: float, deadline: float, keep: bool = False
    ) -> bool:
        """Takes over a request. False: its bytes do not fit into this minute's budget, and nothing is sent.

        payload: the encoded request, as it is first sent; event: what the frame's next event starts from. Times are
        seconds of time.monotonic(); after the deadline the draft is the final answer. keep: the link is away, so the
        request goes to the outbox at once and is not sent.
        """
        if not keep and not self._budget.take(len(payload), time.monotonic()):
            return False
        self._submitted += 1
        tracked = _Tracked(request, payload, event, captured, is_paid=not keep)
        self._thread.put(partial(self._lifecycle.on_request, request.id, tracked, deadline, link_is_away=keep))
        return True

    def announce(self, event: Event, compact: bytes = b"") -> None:
        """The draft's event, which may come after the request is on its way. Published unless the answer was faster.

        compact: the same request in fewer bytes, for the outbox.
        """
        self._thread.put(partial(self._announce, event, compact))

    # ---- any thread ----

    def wait_until_settled(self, timeout_s: float, stop: Any) -> None:
        """Waits until no request is open, until the time is up or the event `stop` is set."""
        until = time.monotonic() + timeout_s
        while not self._is_settled() and time.monotonic() < until and not stop.is_set():
            # Not stop.wait(): its lock must be free when a signal interrupts this thread to set it.
            time.sleep(0.02)

    def _is_settled(self) -> bool:
        counts = self._thread.counts
        return counts["accepted"] == self._submitted and counts["open"] == counts["improvable"] == 0

    def summary(self) -> dict[str, Any]:
        """Counters: accepted + found = answered + lost + open + kept; under "reply", replies by what became of them."""
        values: dict[str, Any] = dict(self._thread.counts)
        del values["improvable"]
        replies = {**self._thread.replies, "not_final_again": values.pop("repeated")}
        return values | {"reply": {kind: count for kind, count in replies.items() if count}}

    # ---- the thread: messages ----

    def _before_step(self, now: float) -> bool:
        self._lifecycle.can_store = self._outbox is not None and self._outbox.has_room()
        budget = self._budget.bytes_per_minute
        has_bytes = not budget or self._budget.spent(now) < budget / 2  # live frames come first
        return has_bytes and self._client.state is State.ONLINE

    def _announce(self, event: Event, compact: bytes, _: float) -> Sequence[Action[_Tracked]]:
        """An event that comes after the frame's answer would take the answer back; one without a draft says nothing."""
        request_id = bytes.fromhex(event.frame)
        if tracked := self._lifecycle.find(request_id):
            tracked.event, tracked.compact = event, compact
        if self._lifecycle.has_ended(request_id):
            self._thread.replies["overtaken"] += 1
        elif event.tokens or tracked is None:
            self._events.publish(event)
        return ()

    def _reply(self, reply: Reply, now: float) -> Sequence[Action[_Tracked]]:
        if tracked := self._lifecycle.find(reply.id):
            try:
                encode_event(self._update(tracked, reply, now))
            except WireError as error:  # within a reply's limits, but not within an event's
                return self._lifecycle.on_refused(reply.id, Why("failed", f"server {reply.server}: {error}"))
        return self._lifecycle.on_reply(reply, now)

    def _read(self, request_id: bytes, row: Row | None, now: float) -> Sequence[Action[_Tracked]]:
        if row is None:
            return self._lifecycle.on_read(request_id, None, now)
        try:
            tracked = self._restore(row, now)
        except WireError as error:  # written by another version, or damaged
            return self._lifecycle.on_read(request_id, None, now, str(error))
        return self._lifecycle.on_read(request_id, tracked, now)

    # ---- the thread: actions ----

    def _perform(self, action: Action[_Tracked], now: float) -> Sequence[Action[_Tracked]]:
        match action:
            case Send():
                return self._send(action, now)
            case Answer():
                return self._answer(action, now)
            case Settle():
                self._publish(action.content, now, final=True, why=action.why.text)
            case Postpone():
                self._observe_loss(action.id, now)
                why = f"{action.why.text}: kept, asked again later"
                self._publish(action.content, now, type="update", final=False, why=why[:1024])
            case Lose():
                self._lose(action, now)
            case Store() if self._outbox:
                self._outbox.put(_row(action.content))
            case Read() if self._outbox:
                self._outbox.read(action.id)
            case Delete() if self._outbox:
                self._outbox.delete(action.id)
        return ()

    def _send(self, send: Send[_Tracked], now: float) -> Sequence[Action[_Tracked]]:
        tracked = send.content
        payload = tracked.payload
        if send.is_resend or tracked.is_retry:
            payload = encode_request(aged(tracked.request, send.waited_s, send.left_s))
        if not tracked.is_paid and not self._budget.take(len(payload), now):
            self._thread.replies["over_budget"] += 1
            return self._lifecycle.on_unsent(send.id, NO_BYTES, now)
        tracked.is_paid = False  # that was for this time
        tracked.bytes_up += len(payload)
        if not send.is_resend:
            tracked.sent_at = now
        if self._observer and not tracked.is_retry:
            self._observer.sent(send.id, PARADIGMS[tracked.request.paradigm], len(payload), now)
        outcome = partial(self._thread.was_sent, send.id)
        self._client.publish(self._topic, payload, qos=1, expiry_s=max(0.0, send.left_s), on_outcome=outcome)
        return ()

    def _answer(self, answer: Answer[_Tracked], now: float) -> Sequence[Action[_Tracked]]:
        tracked = answer.content
        if self._observer and answer.is_first:
            self._observer.answered(answer.reply, now, tracked.event.tokens)
        tracked.event = self._update(tracked, answer.reply, now)
        self._events.publish(tracked.event)
        return ()

    def _update(self, tracked: _Tracked, reply: Reply, now: float) -> Event:
        event = tracked.event
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
            "bytes_up": tracked.bytes_up,
            "timings_ms": event.timings_ms | {"answer": round(1e3 * (now - tracked.sent_at), 1)},
            "after_ms": _after_ms(now - tracked.captured),
        }
        return msgspec.structs.replace(event, **changes)

    def _lose(self, lose: Lose[_Tracked], now: float) -> None:
        logger.info("request lost id=%s reason=%s", lose.id.hex(), lose.why.text)
        self._observe_loss(lose.id, now)
        if lose.content:
            self._publish(lose.content, now, type="lost", final=True, why=lose.why.text[:1024])
        else:
            captured = datetime.now(timezone.utc)  # nobody knows any more
            lost = Event(type="lost", frame=lose.id.hex(), camera="unknown", captured=captured, final=True)
            self._events.publish(msgspec.structs.replace(lost, why=lose.why.text[:1024]))

    def _observe_loss(self, request_id: bytes, now: float) -> None:
        if self._observer:
            self._observer.lost(request_id, now)

    def _publish(self, tracked: _Tracked, now: float, **changes: Any) -> None:
        after_ms = _after_ms(now - tracked.captured)
        changes |= {"bytes_up": tracked.bytes_up, "after_ms": after_ms}
        self._events.publish(msgspec.structs.replace(tracked.event, **changes))

    def _restore(self, row: Row, now: float) -> _Tracked:
        """A row of the outbox as a request. Raises WireError for what another version wrote."""
        request, event = decode_request(row.payload), decode_event(row.event)
        age_s = max(0.0, row.kept - row.captured) + self._lifecycle.kept_for_s(row.id, now)
        request = msgspec.structs.replace(request, age_ms=min(int(1e3 * age_s), MAX_UINT32))
        return _Tracked(request, row.payload, event, now - age_s, is_retry=True, bytes_up=event.bytes_up)


def _row(tracked: _Tracked) -> Row:
    """What the outbox stores of a request."""
    captured = tracked.event.captured.timestamp()
    kept = captured + time.monotonic() - tracked.captured  # a wall clock that jumped would make it years old
    payload = tracked.compact or tracked.payload
    return Row(tracked.request.id, captured, kept, payload, encode_event(tracked.event))


def answered_by(reply: Reply) -> AnsweredBy:
    return AnsweredBy("cloud" if reply.tier is Tier.CLOUD else "edge", reply.server)


def _after_ms(seconds: float) -> float:
    """As an event can hold it: what was kept for weeks, or under a clock that jumped, is as old as can be said."""
    return 1e3 * min(max(0.0, seconds), MAX_AFTER_S)
