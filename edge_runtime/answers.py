"""What comes back, or does not: every request that the board sent ends in exactly one more event.

One thread owns the table of open requests. The frame path and the MQTT client only put values on its queue; it sends,
sends again with the same id, turns replies into "update" events and passed deadlines into "lost" events.
"""

import logging
import queue
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from edge_runtime.bundle import Bundle
from edge_runtime.events import Events
from edge_runtime.mqtt import MqttClient, Outcome
from edge_runtime.open_requests import Lost, Open, OpenRequests
from edge_runtime.wire import (
    AnsweredBy,
    Event,
    EventHop,
    Reply,
    Request,
    Status,
    WireError,
    decode_reply,
    encode_request,
    topics,
)

logger = logging.getLogger(__name__)

QUEUE = 256  # values between threads; a board has a few a second
IDLE_S = 0.5  # the longest wait between two looks at the clock


@dataclass(slots=True)
class Question:
    """A request on its way and the event that announced it."""

    request: Request
    payload: bytes  # the request as first sent
    seen: Event  # the "new" event of the same frame
    deadline: float  # seconds, time.monotonic(): the draft stands after it
    bytes_up: int = 0  # whole payloads, resends included; counted by the answers' thread


@dataclass(frozen=True, slots=True)
class NotTaken:
    """The broker did not take a request, and will not."""

    request_id: bytes
    outcome: Outcome


class Answers:
    """The board's open requests; `with` starts and ends its thread."""

    def __init__(
        self, client: MqttClient, bundle: Bundle, site: str, board: str, events: Events, capacity: int, resend_s: float
    ) -> None:
        self._client, self._bundle, self._events = client, bundle, events
        self._requests: OpenRequests[Question] = OpenRequests(capacity, min_resend_s=resend_s, rng=random.Random())
        self._topic = topics.request(site, board)
        self._inbox: queue.Queue[Question | NotTaken | bytes | None] = queue.Queue(QUEUE)
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._asked = 0
        self.counts: Counter[str] = Counter()  # replies by status, and those that were none or found no room

    def __enter__(self) -> "Answers":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._inbox.put(None)
        self._thread.join()

    def ask(self, question: Question) -> None:
        """Takes a question over; one thread, the frame path's. Never waits for the network."""
        self._asked += 1
        self._inbox.put(question)

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
        counts = self._requests.counts
        return counts.answered + counts.lost == self._asked

    def _tell(self, value: "NotTaken | bytes") -> None:
        """From the MQTT client's thread, which must not wait: without room the request is sent again, or lost."""
        try:
            self._inbox.put_nowait(value)
        except queue.Full:
            self.counts["overflow"] += 1

    def summary(self) -> dict[str, int]:
        """Counters; accepted = answered + lost + open."""
        counts = self._requests.counts
        names = ("accepted", "answered", "lost", "open", "resent", "busy", "duplicate", "late", "unknown")
        return {name: getattr(counts, name) for name in names} | {f"reply_{k}": n for k, n in self.counts.items()}

    def _run(self) -> None:
        while True:
            wait = min(IDLE_S, max(0.0, self._requests.next_at() - time.monotonic()))
            try:
                item = self._inbox.get(timeout=wait)
            except queue.Empty:
                self._look_at_the_clock()
                continue
            if item is None:
                break
            if isinstance(item, Question):
                self._open(item)
            elif isinstance(item, NotTaken):
                self._end_lost(self._requests.lose(item.request_id, f"broker: {item.outcome.value}"))
            else:
                self._reply(item)
            self._look_at_the_clock()
        for lost in self._requests.close("the board stops"):
            self._end_lost(lost)

    def _open(self, question: Question) -> None:
        now = time.monotonic()
        for lost in self._requests.open(question.request.id, question, question.deadline, now):
            self._end_lost(lost)
        self._send(question, question.payload, question.deadline - now)

    def _send(self, question: Question, payload: bytes, left_s: float) -> None:
        question.bytes_up += len(payload)
        outcome = partial(self._sent, question.request.id)
        self._client.publish(self._topic, payload, qos=1, expiry_s=max(0.0, left_s), on_outcome=outcome)

    def _sent(self, request_id: bytes, outcome: Outcome) -> None:  # on the MQTT client's thread
        # What the queue dropped or what expired there is sent again, or lost at its deadline, as anything unanswered.
        if outcome in (Outcome.REFUSED, Outcome.OVERSIZED):
            self._tell(NotTaken(request_id, outcome))

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for lost in self._requests.expired(now):
            self._end_lost(lost)
        for entry in self._requests.due(now):
            question, left_s = entry.content, entry.deadline - now
            waited_ms = int(1e3 * (now - entry.opened_at))
            again = msgspec.structs.replace(
                question.request, age_ms=question.request.age_ms + waited_ms, budget_ms=int(1e3 * left_s)
            )
            self._send(question, encode_request(again), left_s)

    def _reply(self, payload: bytes) -> None:
        try:
            reply = decode_reply(payload)
        except WireError as error:
            self.counts["unreadable"] += 1
            logger.warning("reply unreadable error=%s", error)
            return
        now = time.monotonic()
        self.counts[reply.status.name.lower()] += 1
        if reply.status is Status.BUSY:
            self._requests.busy(reply.id, (reply.retry_after_ms or 1000) / 1e3, now)
        elif reply.status is Status.OK:
            entry = self._requests.answered(reply.id, now)
            if entry:
                try:
                    self._events.publish(_update(entry, reply, self._bundle, now))
                except WireError as error:  # within a reply's bounds, but not within an event's
                    self._end_lost(Lost(entry.id, entry.content, f"server {reply.server}: {error}"))
        else:
            status = reply.status.name.lower()
            self._end_lost(self._requests.lose(reply.id, f"server {reply.server}: {status}: {reply.error}"))

    def _end_lost(self, lost: Lost[Question] | None) -> None:
        if lost is None:
            return
        logger.info("request lost id=%s reason=%s", lost.id.hex(), lost.reason)
        question = lost.content
        self._events.publish(
            msgspec.structs.replace(
                question.seen, type="lost", final=True, why=lost.reason[:1024], bytes_up=question.bytes_up
            )
        )


def _update(entry: Open[Question], reply: Reply, bundle: Bundle, now: float) -> Event:
    """The verified answer to the event that announced the frame."""
    seen = entry.content.seen
    changes: dict[str, Any] = {
        "type": "update",
        "final": True,
        "tokens": tuple(reply.token_ids),
        "text": reply.text or bundle.text(reply.token_ids),
        "answered_by": AnsweredBy("cloud" if reply.tier.name == "CLOUD" else "edge", reply.server),
        "accepted": reply.accepted,
        "proposed": reply.proposed,
        "passes": reply.passes,
        "hops": tuple(EventHop.from_hop(hop) for hop in reply.hops),
        "label": reply.label,
        "scores": reply.scores or {},
        "bytes_up": entry.content.bytes_up,
        "timings_ms": seen.timings_ms | {"answer": round(1e3 * (now - entry.opened_at), 1)},
    }
    return msgspec.structs.replace(seen, **changes)
