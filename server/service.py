"""The path of a request, top to bottom: receive, decode, seen before?, admit or busy, batch, bits, tail, verify, reply;
and where there is a tier above that may know better: reply, ask there, reply once more.

`receive` runs on the MQTT client's thread and never waits; `serve` owns the engine on a thread of its own; a third
brings what the tier above says. Between them are the queue and the cache of replies. Whatever becomes of a request has
a status, which its board is told, and a counter: received = replied to for good (by status) + repeated + joined
+ waiting + asked above.
"""

import logging
import random
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime import __version__
from edge_runtime.capture.picture_checks import PictureError, decode_picture
from edge_runtime.inference.bundle import Bundle, BundleError, open_bundle
from edge_runtime.inference.preprocess import to_input
from edge_runtime.reporting.metrics import exported
from edge_runtime.wire import (
    BitstreamError,
    ContentKind,
    EnvelopeError,
    Hop,
    Paradigm,
    Reply,
    Request,
    Status,
    Tier,
    decode,
    decode_request,
    encode_reply,
    encode_tokens,
)
from edge_runtime.wire.envelope import Bytes8
from server.batcher import Batch, Batcher
from server.config import Config, ServerConfig
from server.counters import SERVER, values
from server.engine import SIZES, Answer, Engine, Job
from server.escalation import (
    Bounds,
    Ranks,
    Reason,
    ask_until,
    is_loop,
    obstacle_to,
    passed_down,
    passed_up,
    reason_to_ask,
)
from server.gateway import Arrival, Gateway
from server.loading import load_engine
from server.numerics import prove
from server.reply_cache import Cached, InFlight, Key, ReplyCache
from server.upstream import Upstream

logger = logging.getLogger(__name__)

STATUS_PERIOD_S = 10.0
PROBE_PERIOD_S = 1.0  # until the broker is proven to deliver
RECENT = 64  # batches whose times give the prices in the status
MIN_RETRY_MS = 50
# Of a picture; boards send 224 x 224. More would be small to send (146 KB of PNG can claim 50 million) and hold up
# everybody's answers for a second.
MAX_PIXELS = 4_000_000


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that will be answered."""

    arrival: Arrival
    request: Request
    deadline: float  # seconds, time.monotonic()

    @property
    def key(self) -> Key:
        return self.arrival.board, self.request.id


@dataclass(slots=True)
class AskedAbove:
    """A request whose board has a first reply, and gets one more."""

    accepted: Accepted
    reason: Reason
    own: Reply  # this server's
    standing: Reply  # what the board was told last: the last word, if nothing better follows


class Service:
    """What one server does with requests. Knows nothing of MQTT.

    upstream: the tier above, if there is one; its bounds are in `escalation`. chance: uniform in [0, 1).
    """

    def __init__(
        self,
        config: ServerConfig,
        bundle: Bundle,
        engine: Engine,
        replies: ReplyCache,
        upstream: Upstream | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.config, self.bundle, self.engine, self.replies = config, bundle, engine, replies
        self.upstream, self._chance = upstream, chance
        self.tier = Tier[config.tier.upper()]
        wait_s = config.batch_wait_ms / 1e3
        self.batcher: Batcher[Accepted] = Batcher(config.queue, config.max_batch, wait_s, time.monotonic)
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()  # over counts, prices and _is_stopping; held for a few statements
        self._is_stopping = False
        self._asked_above: dict[Key, bytes] = {}  # the first reply, for a board that asks again because it lost it
        self._ranks = Ranks()
        self._prices = {name: deque[float]([], RECENT) for name in ("batch", "pass")}  # ms

    # ---- the MQTT client's thread ----

    def receive(self, arrival: Arrival) -> None:
        """From bytes to a place in the queue, or to a refusal at once."""
        self._count("received")
        try:
            request = decode_request(arrival.payload)
        except EnvelopeError as error:
            self._count("bad_request")
            refusal = self._own(readable_id(arrival.payload), Status.BAD_REQUEST, error=str(error))
            arrival.reply(encode_reply(refusal), 0.0)
        else:
            accepted = Accepted(arrival, request, arrival.at + request.budget_ms / 1e3)
            first = self._asked_above.get(accepted.key)  # before `begin`: the last reply is cached before this is gone
            seen = self.replies.begin(*accepted.key)
            if isinstance(seen, Cached):
                self._count("repeated")
                arrival.reply(seen.reply, request.budget_ms / 1e3)
            elif first or isinstance(seen, InFlight):
                self._count("joined")  # its reply is on the way
                if first:
                    arrival.reply(first, request.budget_ms / 1e3)
            elif objection := self._objection(request):
                self._refuse(accepted, *objection)
            else:
                self._admit(accepted)
        arrival.accept()

    def _objection(self, request: Request) -> tuple[Status, str] | None:
        """Why this server cannot answer, now or later."""
        options = request.options
        if request.content_kind is ContentKind.LATENT and request.bundle != self.bundle.id:
            ours = self.bundle.id.hex()
            return Status.UNKNOWN_BUNDLE, f"bundle {request.bundle.hex()} is not here, {ours} is: install one on both"
        if options and is_loop(options, self.config.id):
            self._count("loop")
            way = " -> ".join((*options.via, self.config.id))
            return Status.BAD_REQUEST, f"a loop, or too many tiers: {way}: let [upstream] name a tier above"
        if options and options.temperature:
            return (
                Status.BAD_REQUEST,
                f"temperature {options.temperature} is wanted, this server writes greedily: want 0",
            )
        return None

    def _admit(self, accepted: Accepted) -> None:
        """Into the queue, if its answer can be expected in time: else it would only keep others from theirs."""
        wait_ms, left_ms = self._expected_ms(accepted), 1e3 * (accepted.deadline - time.monotonic())
        with self._lock:
            is_open = not self._is_stopping
            is_hopeless = wait_ms > left_ms > 0
            if is_open and not is_hopeless:
                refused = self.batcher.put(accepted.arrival.board, accepted, accepted.deadline)
        if not is_open:
            self._busy(accepted, "this server stops: another one may answer")
        elif is_hopeless:
            self._busy(accepted, f"an answer takes {wait_ms:.0f} ms now, {left_ms:.0f} are left: come back later")
        elif refused:
            self._busy(refused, f"{self.config.queue} requests wait already: come back later")

    def _expected_ms(self, accepted: Accepted) -> float:
        """From now until its answer, as batches take lately; 0 while nobody is ahead of it."""
        with self._lock:
            batch_ms = statistics.median(self._prices["batch"] or [0.0])
        ahead = self.batcher.ahead_of(accepted.arrival.board)
        return batch_ms * (1 + ahead / self.config.max_batch) if ahead else 0.0

    # ---- the thread that owns the engine ----

    def serve(self, stop: threading.Event, heartbeat: Callable[[], bool]) -> None:
        """Answers until `stop` is set, then finishes what was accepted, as far as `stop_s` allows.

        heartbeat tells the status, and whether the broker is proven to deliver; it is called here, so that a worker
        that hangs is seen.
        """
        next_beat = time.monotonic()
        while not stop.is_set():
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + (STATUS_PERIOD_S if heartbeat() else PROBE_PERIOD_S)
            self.answer(self.batcher.take(timeout_s=0.2))
        with self._lock:
            self._is_stopping = True
        give_up = time.monotonic() + self.config.stop_s
        while len(self.batcher):
            batch = self.batcher.take(timeout_s=0)
            if time.monotonic() < give_up:
                self.answer(batch)
            else:
                for accepted in (*batch.items, *batch.stale):
                    self._busy(accepted, "this server stops before it could answer: another one may")

    def answer(self, batch: Batch[Accepted]) -> None:
        """One batch, from content bytes to replies."""
        for accepted in batch.stale:
            self._refuse(accepted, Status.STALE, f"its {accepted.request.budget_ms} ms were spent in the queue")
        started = time.monotonic()
        jobs = [(accepted, job) for accepted in batch.items if (job := self._job(accepted)) is not None]
        if not jobs:
            return
        decoded = time.monotonic()
        try:
            answers = self.engine.answer([job for _, job in jobs])
        except Exception as error:  # whatever it is, the boards must be told and the server must go on
            logger.exception("batch failed rows=%d", len(jobs))
            answers = [Answer((), error=f"{type(error).__name__} in the engine, see the server's log")] * len(jobs)
        done = time.monotonic()
        for (accepted, _), answer in zip(jobs, answers, strict=True):
            if answer.error:
                self._refuse(accepted, Status.FAILED, answer.error)
                continue
            stages = {"decode": 1e3 * (decoded - started)} | answer.stages_ms
            queued_ms, compute_ms = 1e3 * (started - accepted.arrival.at), 1e3 * (done - started)
            hop = Hop(self.tier, self.config.id, queued_ms, compute_ms, stages)
            self._conclude(accepted, self._ok(accepted.request.id, answer, hop), answer)
        passes_ms = max(answer.stages_ms.get("passes", 0.0) for answer in answers)
        with self._lock:
            self._prices["batch"].append(1e3 * (done - started))
            self._prices["pass"].append(passes_ms / max(1, *(answer.passes for answer in answers)))

    def _job(self, accepted: Accepted) -> Job | None:
        """What the engine is asked; None: refused, its content is not readable."""
        request = accepted.request
        try:
            symbols, gain = self._symbols(request)
        except (BitstreamError, PictureError, BundleError) as error:
            self._refuse(accepted, Status.BAD_REQUEST, str(error))
            return None
        max_tokens = request.options.max_tokens if request.options else None
        wants_label = bool(self.bundle.manifest.classes)
        # A board without a draft that asks for speculation gets the server's; else "split" is the target alone.
        proposes = request.options is not None and request.options.propose
        is_speculative = request.draft or request.paradigm is Paradigm.SPECULATIVE or proposes
        draft = tuple(request.draft_ids) if is_speculative else None
        return Job(symbols, gain, draft, self.config.tier, max_tokens, wants_label)

    def _symbols(self, request: Request) -> tuple[NDArray[np.int8], float]:
        """The latent's symbols and the gain of their level. Raises BitstreamError, PictureError, BundleError."""
        if request.content_kind is not ContentKind.LATENT:
            return self.engine.symbols(to_input(decode_picture(request.content, MAX_PIXELS))), 1.0
        decoded = decode(request.content, self.bundle.tables)
        if not decoded.checked:  # a cut message and a damaged one look alike, and MQTT cuts none
            raise BitstreamError("bitstream ends early, so nothing vouches for it: send it whole")
        return decoded.symbols, self.bundle.manifest.latent.gains[decoded.header.level]

    def _ok(self, request_id: bytes, answer: Answer, hop: Hop) -> Reply:
        return self._own(
            request_id,
            Status.OK,
            tokens=encode_tokens(answer.tokens),
            text=self.bundle.text(list(answer.tokens)),
            accepted=answer.accepted,
            proposed=answer.proposed,
            passes=answer.passes,
            confidence=min(answer.confidence, 1.0),
            hops=(hop,),
            label=next(iter(answer.scores), None),
            scores=answer.scores or None,
        )

    def _conclude(self, accepted: Accepted, own: Reply, answer: Answer) -> None:
        """This server's text is the last word, unless the tier above should be asked and can be."""
        bounds = self.upstream.bounds if self.upstream else Bounds()
        rank = self._ranks.rank(answer.confidence, self._chance())
        options = accepted.request.options
        reason = reason_to_ask(options, self.tier, answer.confidence, rank, bounds, self._chance())
        if reason is None:
            self._finish(accepted, own)
            return
        now, until = time.monotonic(), ask_until(accepted.arrival.at, accepted.deadline)
        if obstacle := obstacle_to(self.upstream.above(now) if self.upstream else None, until - now):
            self._count(f"alone_{obstacle}")
            self._finish(accepted, own)
            return
        assert self.upstream is not None  # to have none is an obstacle
        self._count("escalated")
        self._count(f"escalated_{reason}")
        asked = AskedAbove(accepted, reason, own, own)
        self._reply_for_now(asked)
        waited_s, tell = now - accepted.arrival.at, partial(self._from_above, asked)
        try:
            self.upstream.ask(passed_up(accepted.request, self.config.id, answer.tokens, waited_s), until, tell)
        except EnvelopeError:  # content that just fits an envelope
            self._from_above(asked, None, "too_large")

    def _reply_for_now(self, asked: AskedAbove) -> None:
        """One more reply follows."""
        data = encode_reply(msgspec.structs.replace(asked.standing, final=False))
        self._asked_above[asked.accepted.key] = data
        asked.accepted.arrival.reply(data, asked.accepted.deadline - time.monotonic())

    # ---- the thread of the tier above ----

    def _from_above(self, asked: AskedAbove, reply: Reply | None, why: str) -> None:
        """What the tier above says, or why it says nothing more: then what the board has is the last word.

        A reply that is not final takes the place of this server's own: if nothing better follows, the board keeps the
        best text that it has seen, and learns whose that is.
        """
        if reply is None:
            self._count(f"alone_{why}")
        else:
            asked.standing = passed_down(asked.own, reply)
            if not reply.final:
                self._reply_for_now(asked)
                return
            self._count("answered_above")
            if reply.tokens == asked.own.tokens:
                self._count("unchanged")
            else:
                self._count("changed")
                self._count(f"changed_{asked.reason}")  # of "explore" alone it says what the bounds miss
        self._finish(asked.accepted, msgspec.structs.replace(asked.standing, final=True))

    # ---- any thread ----

    def status(self) -> dict[str, Any]:
        """For everybody who watches servers."""
        proof = self.engine.proof
        with self._lock:
            counts = dict(self.counts)
            prices = {name: round(statistics.median(recent or [0.0]), 2) for name, recent in self._prices.items()}
        return {
            "version": __version__,
            "tier": self.config.tier,
            "bundles": {self.bundle.id.hex(): self.bundle.manifest.name},
            "queue": {"waiting": len(self.batcher), "capacity": self.config.queue},
            "asked_above": len(self._asked_above),
            "upstream": self.upstream.status() if self.upstream else None,
            "price_ms": prices,  # of a batch, and of a pass: without a draft a text costs a pass a token
            "strict": proof.may_speculate,  # a text's bits do not depend on drafts, batches and neighbours
            "numerics": proof.numerics,
            "shapes": {"tail": proof.tail_sizes, "look": proof.look_sizes, "pass": proof.shapes},
            "counts": counts,
        }

    def _busy(self, accepted: Accepted, why: str) -> None:
        retry_ms = max(MIN_RETRY_MS, int(self._expected_ms(accepted)))
        self._finish(accepted, self._own(accepted.request.id, Status.BUSY, error=why, retry_after_ms=retry_ms))

    def _refuse(self, accepted: Accepted, status: Status, why: str) -> None:
        self._finish(accepted, self._own(accepted.request.id, status, error=why))

    def _own(self, request_id: bytes, status: Status, error: str = "", **fields: Any) -> Reply:
        """A reply of this server's."""
        name = self.config.id
        return Reply(id=request_id, status=status, tier=self.tier, server=name, error=error[:1024], **fields)

    def _finish(self, accepted: Accepted, reply: Reply) -> None:
        """The end of every request that had an id."""
        data = encode_reply(reply)
        if reply.status is Status.OK:
            self.replies.put(*accepted.key, data)
        else:  # asking again may end otherwise
            self.replies.forget(*accepted.key)
        self._asked_above.pop(accepted.key, None)
        self._count(reply.status.name.lower())
        # Last: a repeat that crosses it must not be told that a reply is still to come.
        accepted.arrival.reply(data, accepted.deadline - time.monotonic())

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1


class _Identified(msgspec.Struct, array_like=True):
    """The start of every request, of whatever version."""

    version: int
    id: Bytes8


def readable_id(payload: bytes) -> bytes:
    """The id of a request that cannot be read otherwise, so that its board learns why; zeros if there is none."""
    try:
        return msgspec.msgpack.decode(payload, type=_Identified).id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return bytes(8)


def load(config: ServerConfig) -> tuple[Bundle, Engine]:
    """Opens the bundle, loads the tier's networks and runs the start test. Raises BundleError."""
    bundle = open_bundle(Path(config.bundle))
    _ = bundle.tables, bundle.words  # what is none is found at start
    engine = load_engine(bundle, (config.tier,), config.device, config.threads)
    engine.proof = prove(engine, [size for size in SIZES if size <= config.max_batch])
    return bundle, engine


def run_server(config: Config, stop: threading.Event) -> None:
    """Serves until `stop` is set, then finishes what was accepted and says offline.

    Raises BundleError, MqttConfigError and ConfigError for what cannot start, and RuntimeError for whatever ends it
    later: that is no mistake of the configuration, and the server is worth starting again.
    """
    settings, server = config.mqtt_settings(), config.server
    bundle, engine = load(server)
    upstream = Upstream(config.upstream, server.id) if config.upstream else None
    service = Service(server, bundle, engine, ReplyCache(), upstream)
    logger.info("server ready id=%s bundle=%s proof=%s", server.id, bundle.id.hex(), engine.proof)
    with ExitStack() as stack:
        gateway = Gateway(settings, server.site, server.id, server.pool, service.receive, service.status)
        stack.enter_context(gateway)
        if upstream:  # ends first, so that what it leaves open can still be told
            stack.enter_context(upstream)
        stack.enter_context(
            exported(
                config.metrics, "server", SERVER, lambda: values(service.status() | {"gateway": gateway.summary()})
            )
        )
        try:
            service.serve(stop, gateway.heartbeat)
        except Exception as error:
            raise RuntimeError("the server broke while it served") from error
    logger.info("server stopped id=%s counts=%s", server.id, dict(service.counts))
