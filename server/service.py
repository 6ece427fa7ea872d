"""The path of a request, top to bottom: receive, admit, decode its picture, batch, ask the target, reply; and if the
tier above may know better: reply, ask there, reply once more.

`receive` runs on the MQTT client's thread and never waits. `decode_picture` and `answer`, which calls the target
(targets/target.py), run on threads that serving.py starts. Replies of the tier above come on another thread. Between
the threads are two queues, one before the pictures' threads and one before the target, each of which forms batches
(batcher.py), and the cache of replies. Every request ends in a status, which its board is told, and in a counter:
received = last replies (by status) + repeated + joined + waiting + being answered + asked above.
"""

import logging
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import msgspec

from edge_runtime import __version__
from edge_runtime.picture_checks import PictureError
from edge_runtime.wire import (
    ContentKind,
    EnvelopeError,
    Hop,
    ReferenceLostError,
    Reply,
    Status,
    Tier,
    WireError,
    decode_request,
    encode_reply,
    encode_tokens,
)
from edge_runtime.wire.envelope import MAX_TEXT, Bytes8
from server.admission import refusal_of
from server.batch_times import BatchTimes
from server.batcher import Batch, Batcher
from server.config import ServerConfig
from server.counters import by_label
from server.escalation import Bounds
from server.escalator import Escalator
from server.gateway import Arrival
from server.pictures import PictureCostError, PictureDecoder, PictureWorkerError
from server.received import Received
from server.reply_cache import ReplyCache, Seen
from server.target_failures import TargetFailures
from server.targets import Answer, FeaturesError, Target
from server.upstream import Upstream

logger = logging.getLogger(__name__)

MIN_RETRY_MS = 50
NO_BUNDLE = bytes(8)  # of a board that sends pictures alone
ELSEWHERE_RETRY_MS = 100  # the broker gives the next copy to another server of the pool, which may have the bundle
TAKE_S = 0.2  # how often a thread that waits for work looks whether it should stop


class Service:
    """The path of a request in one server. Knows nothing of MQTT.

    upstream: the tier above, if there is one. bounds: what may be passed up there.
    """

    def __init__(
        self,
        config: ServerConfig,
        target: Target[Any],
        replies: ReplyCache,
        upstream: Upstream | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        self.config, self.target, self.replies, self.upstream = config, target, replies, upstream
        self.tier, limits = Tier[config.tier.upper()], target.limits
        self.takes_pictures = config.pictures and target.abilities.pictures
        self.picture_queue: Batcher[Received] = Batcher(config.queue, 1, 0.0, time.monotonic)
        # With several calls at once, one board may occupy half of them, so that the others always get some.
        self.target_queue: Batcher[Received] = Batcher(
            config.queue, limits.batch, config.batch_wait_ms / 1e3, time.monotonic, (limits.calls + 1) // 2
        )
        self.batch_times = BatchTimes(limits.call_s)
        self._failures = TargetFailures(target.abilities.name)
        self.counts: Counter[tuple[str, str]] = Counter()  # by name and label, see counters.py
        self.metrics_problem = ""  # set on the metrics' thread
        self._lock = threading.Lock()  # over counts and _is_stopping; held for a few statements
        self._is_stopping = False
        self.escalator = Escalator(upstream, bounds or Bounds(), config.id, self.tier, self._count, self._finish)

    # ---- the MQTT client's thread ----

    def receive(self, arrival: Arrival) -> None:
        """From bytes to a place in a queue, or to a reply at once."""
        self._count("received")
        try:
            request = decode_request(arrival.payload)
        except EnvelopeError as error:
            self._count("replies", "bad_request")
            refusal = self._own(readable_id(arrival.payload), Status.BAD_REQUEST, error=str(error))
            arrival.reply(encode_reply(refusal), 0.0)
        else:
            self._admit(Received(arrival, request, arrival.at + request.budget_ms / 1e3))
        arrival.acknowledge()

    def _admit(self, received: Received) -> None:
        """Finds out whether the request is new and can be answered here."""
        request, reply = received.request, received.arrival.reply
        first = self.escalator.first_reply(received.key)  # read before `begin`, see `_finish`
        seen = self.replies.begin(received.key)
        if isinstance(seen, bytes):
            self._count("repeated")
            reply(seen, request.budget_ms / 1e3)
        elif first or seen is Seen.IN_FLIGHT:
            self._count("joined")  # its reply is on the way
            if first:
                reply(first, request.budget_ms / 1e3)
        elif refusal := refusal_of(request, self.target.abilities, self.config.id, self.takes_pictures):
            if refusal.counted:
                self._count(*refusal.counted)
            retry_ms = ELSEWHERE_RETRY_MS if refusal.status is Status.UNKNOWN_BUNDLE else None
            self._refuse(received, refusal.status, refusal.why, retry_ms)
        else:
            if request.options and request.options.prompt:
                self._count("prompts", "asked")
            is_latent = request.content_kind is ContentKind.LATENT
            self._enqueue(received, self.target_queue if is_latent else self.picture_queue)

    def _enqueue(self, received: Received, queue: Batcher[Received]) -> None:
        """Into a queue, if an answer can be expected in time: otherwise it would only delay the others."""
        now = time.monotonic()
        wait_ms, left_ms = self._expected_ms(received), 1e3 * (received.deadline - now)
        if self.batch_times.is_late(now):
            self._busy(received, "the engine of this server hangs: another one may answer")
        elif wait_ms > left_ms > 0:  # a request without time left ends in `_tell_stale`, not in a promise
            self._busy(received, f"an answer takes {wait_ms:.0f} ms now, {left_ms:.0f} are left: come back later")
        else:
            with self._lock:  # so that nothing new comes in once the server stops
                # A picture that has been decoded was accepted before.
                is_open = not self._is_stopping or received.pixels is not None
                refused = queue.put(received.arrival.board, received, received.deadline) if is_open else None
            if not is_open:
                self._busy(received, "this server stops: another one may answer")
            elif refused:
                self._busy(refused, f"{self.config.queue} requests wait already: come back later")

    def _expected_ms(self, received: Received) -> float:
        """From now until the engine has answered, as batches take lately; 0 while nobody is ahead of it."""
        ahead = self.target_queue.ahead_of(received.arrival.board)
        limits = self.target.limits
        batches = 1 + ahead / (limits.batch * limits.calls)
        return self.batch_times.medians_ms()["batch"] * batches if ahead else 0.0

    # ---- the pictures' threads ----

    def decode_picture(self, decoder: PictureDecoder) -> None:
        """Takes one picture out of its queue, if one comes soon, and puts its pixels into the engine's queue."""
        batch = self.picture_queue.take(TAKE_S)
        self._tell_stale(batch)
        for received in batch.items:
            started = time.monotonic()
            try:
                pixels = decoder.decode(received.request.content)
            except PictureWorkerError as error:
                self._busy(received, f"{error}: another server may answer")
            except PictureError as error:
                self._count("pictures", "too_costly" if isinstance(error, PictureCostError) else "unreadable")
                self._refuse(received, Status.BAD_REQUEST, str(error))
            else:
                self._count("pictures", "decoded")
                took_ms = 1e3 * (time.monotonic() - started)
                self._enqueue(replace(received, pixels=pixels, picture_ms=took_ms), self.target_queue)
            finally:
                self.picture_queue.done(received.arrival.board, 1e3 * (time.monotonic() - started))

    # ---- the threads that call the target ----

    def answer(self, batch: Batch[Received]) -> None:
        """One batch, from contents to replies. The cost of each request is charged to its board."""
        self._tell_stale(batch)
        if not batch.items:
            return
        started = time.monotonic()
        self.batch_times.begin(started)
        costs_ms = [0.0] * len(batch.items)
        try:
            jobs: dict[int, Any] = {}  # by place in the batch
            for i, received in enumerate(batch.items):
                began = time.monotonic()
                if (job := self._job(received)) is not None:
                    jobs[i] = job
                costs_ms[i] = 1e3 * (time.monotonic() - began)
            if jobs:
                decoded = time.monotonic()
                answers = self._compute(list(jobs.values()))
                done = time.monotonic()
                shares = [answer.passes or 1 for answer in answers]  # a target may count no passes
                for i, answer, share in zip(jobs, answers, shares, strict=True):
                    costs_ms[i] += 1e3 * (done - decoded) * share / sum(shares)
                    try:
                        self._reply(batch.items[i], jobs[i], answer, started, decoded, done)
                    except EnvelopeError as error:  # numbers that no reply may have
                        why = f"the target's answer cannot be sent: {error}"
                        self._target_failed(batch.items[i], Status.FAILED, why)
        finally:
            self.batch_times.end()
            for received, cost_ms in zip(batch.items, costs_ms, strict=True):
                self.target_queue.done(received.arrival.board, cost_ms)

    def _job(self, received: Received) -> Any:
        """The job for the target; None: the request was refused, its content is not readable."""
        options, known = received.request.options, self.target.question_names()
        for name in options.questions if options else ():
            self._count("questions", "asked" if name in known else "unknown")
        try:
            return self.target.job(received)
        except WireError as error:
            is_lost = isinstance(error, ReferenceLostError)
            self._refuse(received, Status.REFERENCE_LOST if is_lost else Status.BAD_REQUEST, str(error))
        except PictureWorkerError as error:
            self._busy(received, f"{error}: another server may answer")
        except FeaturesError as error:
            self._target_failed(received, Status.FAILED, str(error))
        except Exception as error:  # a target may run networks here too: as in `_compute`
            logger.exception("content not read id=%s", received.request.id.hex())
            self._refuse(received, Status.FAILED, _in_engine(error))
        return None

    def _compute(self, jobs: list[Any]) -> list[Answer]:
        """The target's answers. The times of the batch and of a pass are recorded, for the status's `price_ms`."""
        started = time.monotonic()
        try:
            answers = self.target.answer(jobs)
            if len(answers) != len(jobs):
                raise ValueError(f"{len(answers)} answers to {len(jobs)} jobs")
        except Exception as error:  # whatever it is, the boards must be told and the server must go on
            logger.exception("batch failed rows=%d", len(jobs))
            return [Answer(error=_in_engine(error))] * len(jobs)
        passes_ms = max(answer.stages_ms.get("passes", 0.0) for answer in answers)
        passes = max(1, *(answer.passes for answer in answers))
        self.batch_times.add(1e3 * (time.monotonic() - started), passes_ms / passes)
        self._count("batched", count=len(jobs))
        for answer in answers:
            self._count("decoding", "proposed", answer.proposed)
            self._count("decoding", "accepted", answer.accepted)
            self._count("decoding", "tokens", len(answer.tokens))
            self._count("decoding", "passes", answer.passes)
            if answer.checked:
                self._count("prompts", "valid" if answer.checked.valid else "invalid")
        return answers

    def _reply(self, received: Received, job: Any, answer: Answer, started: float, decoded: float, done: float) -> None:
        """From an answer to a reply; the times are of its batch."""
        if answer.error:
            status = Status.FAILED if answer.retry_after_ms is None else Status.BUSY
            self._target_failed(received, status, answer.error, answer.retry_after_ms)
            return
        if len(answer.text) > MAX_TEXT:
            why = f"the target wrote {len(answer.text)} characters, want {MAX_TEXT}"
            self._target_failed(received, Status.FAILED, why)
            return
        stages_ms = {"decode": 1e3 * (decoded - started) + received.picture_ms} | answer.stages_ms
        queued_ms = max(0.0, 1e3 * (started - received.arrival.at) - received.picture_ms)
        compute_ms = 1e3 * (done - started) + received.picture_ms
        # The board of a picture may have another bundle, whose vocabulary has other words under these ids.
        bundle = received.request.bundle
        tokens = answer.tokens if bundle in (NO_BUNDLE, *self.target.abilities.bundles) else ()
        reply = self._own(
            received.request.id,
            Status.OK,
            tokens=encode_tokens(tokens),
            text=answer.text,
            accepted=answer.accepted,
            proposed=answer.proposed,
            passes=answer.passes,
            confidence=None if answer.confidence is None else min(answer.confidence, 1.0),
            unsure=answer.unsure,
            is_cut=answer.is_cut,
            hops=(Hop(self.tier, self.config.id, queued_ms, compute_ms, stages_ms, answer.usage),),
            label=next(iter(answer.scores), None),
            scores=answer.scores or None,
            answers=answer.answers or None,
            is_reference=received.pixels is None and self.target.abilities.references,
            checked=answer.checked,
        )
        self._failures.answered()
        above = self.target.request_above(received, job) if self.upstream else received
        if not self.escalator.ask(above, reply):
            self._finish(received, reply)

    def _target_failed(self, received: Received, status: Status, why: str, retry_ms: int | None = None) -> None:
        """Refuses a request since the target has no answer, and tells the log, which boards refer to."""
        if not self._is_stopping:  # a target that is closed ends its calls, as it must
            self._failures.failed(status.name.lower(), why, time.monotonic())
        self._refuse(received, status, why, retry_ms)

    # ---- any thread ----

    def status(self) -> dict[str, Any]:
        """For everybody who watches servers."""
        can, now = self.target.abilities, time.monotonic()
        batches, compute_s = self.batch_times.totals()
        with self._lock:
            counts = by_label(self.counts)
        return {
            "version": __version__,
            "tier": self.config.tier,
            "bundles": {},
            "target": can.status(self.target.limits),
            "pictures": self.takes_pictures,
            "queue": {"waiting": len(self.target_queue) + len(self.picture_queue), "capacity": self.config.queue},
            "engine": {
                "busy_s": round(self.batch_times.busy_s(now), 1),
                "late": self.batch_times.is_late(now),
                "batches": batches,
                "compute_s": round(compute_s, 3),
            },
            "asked_above": len(self.escalator),
            "upstream": self.upstream.status() if self.upstream else None,
            "price_ms": self.batch_times.medians_ms(),  # without a draft a text takes a pass per token
            "strict": can.verified == "strict",  # a text's bits do not depend on drafts, batches and neighbours
            "numerics": "",
            "shapes": {},
            "questions": {},
            "questions_error": "",
            "usage": None,
            "assistant": None,
            **self.target.status(),
            "problems": {"metrics": self.metrics_problem} if self.metrics_problem else {},
            "counts": counts,
        }

    # ---- the watchdog's thread ----

    def load_questions(self) -> bool:
        """Reads the files of the newest message to set questions. Whether there was a message."""
        is_set = self.target.load_questions()
        if is_set is not None:
            self._count("setting", "set" if is_set else "refused")
        return is_set is not None

    def engine_hangs(self, is_new: bool) -> None:
        """Its present batch has taken too long: what waits behind it is given to other servers."""
        self._count("late", count=is_new)
        self.hand_back("the engine of this server hangs: another one may answer")

    # ---- any thread: the end of the service ----

    def accept_no_more(self) -> None:
        """From now on, new requests are given to other servers."""
        with self._lock:
            self._is_stopping = True

    def hand_back(self, why: str) -> None:
        """Waiting requests are given to other servers."""
        for queue in (self.picture_queue, self.target_queue):
            for received in queue.clear():
                self._busy(received, why)

    def _tell_stale(self, batch: Batch[Received]) -> None:
        for received in batch.stale:
            self._refuse(received, Status.STALE, f"its {received.request.budget_ms} ms were spent in the queue")

    def _busy(self, received: Received, why: str) -> None:
        self._refuse(received, Status.BUSY, why, max(MIN_RETRY_MS, int(self._expected_ms(received))))

    def _refuse(self, received: Received, status: Status, why: str, retry_ms: int | None = None) -> None:
        self._finish(received, self._own(received.request.id, status, error=why, retry_after_ms=retry_ms))

    def _own(self, request_id: bytes, status: Status, error: str = "", **fields: Any) -> Reply:
        """A reply of this server's."""
        name = self.config.id
        return Reply(id=request_id, status=status, tier=self.tier, server=name, error=error[:1024], **fields)

    def _finish(self, received: Received, reply: Reply) -> None:
        """The end of every request that could be read.

        This reply is cached before the first one of an escalated request is forgotten. So a repeat, which looks in the
        other order, always finds one of them.
        """
        data = encode_reply(reply)
        if reply.status is Status.OK:
            self.replies.put(received.key, data)
        else:  # asking again may end otherwise
            self.replies.forget(received.key)
        self.escalator.forget(received.key)
        self._count("replies", reply.status.name.lower())
        # Last: a repeat that crosses it must not be told that a reply is still to come.
        received.arrival.reply(data, received.deadline - time.monotonic())

    def _count(self, name: str, label: str = "", count: int = 1) -> None:
        with self._lock:
            self.counts[name, label] += count


def _in_engine(error: Exception) -> str:
    return f"{type(error).__name__} in the engine, see the server's log"


class _Identified(msgspec.Struct, array_like=True):
    """The start of every request, of any version."""

    version: int
    id: Bytes8


def readable_id(payload: bytes) -> bytes:
    """The id of a request that cannot be read otherwise, so that its board learns why; zeros if there is none."""
    try:
        return msgspec.msgpack.decode(payload, type=_Identified).id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return bytes(8)
