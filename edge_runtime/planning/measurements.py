"""What the board knows of its link, its servers and itself, learned from its own traffic.

Values and times come in, `Facts` come out. Any thread may feed: each call only puts on a bounded queue what the frame
path takes off in `facts`, so nothing is shared but that queue. Reads no clock: times are seconds of one that never
steps back.

What a server claims in its status serves until there are answers: what we measured outranks it.
"""

import logging
import statistics
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf, isfinite
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from edge_runtime.errors import AiflowError
from edge_runtime.planning.link_model import LINK_AGE_S, Link, Network
from edge_runtime.planning.thermal import Vitals
from edge_runtime.requests.byte_budget import ByteBudget
from edge_runtime.wire import Hop, Reply, TopicError, topics
from edge_runtime.wire.envelope import Millis, Name, UInt32
from edge_runtime.wire.event import ParadigmName

logger = logging.getLogger(__name__)

QUEUE = 1024  # what is told between two frames; more is dropped and counted
OPEN = 256  # requests whose answer is awaited; the oldest is forgotten
MAX_VALUE = 1e9  # of a time in ms or a size: beyond it, it was not measured
MAX_STATUS = 16 * 1024  # bytes of JSON; a server writes 1 KB
SERVERS = 16  # whose claims are remembered
FAR_OFF = 8.0  # times: a claim that differs more from what we measured is counted
CLAIM_AGE_S = 60.0  # a server tells every 10 s
MINUTE_S = 60.0
FEW_FRAMES, MANY_FRAMES = 100, 2000  # before and after which a count of changes says little about the next frame
RECENT = 9  # values of a running median: forgets in five, and two odd ones do not matter
UNUSED = (  # what was told and not used, as it is counted
    "status_refused",  # a server's status that is none, or another server's
    "status_contradicted",  # a claim far from what was measured
    "servers_forgotten",  # more servers than are remembered
    "hops_refused",  # a server that says it worked longer than we waited
    "passes_refused",  # or took more passes than its text has tokens
    "bad_value",  # no time or size
    "overflow",  # more between two frames than is remembered
)
Kind = Literal["plain", "drafted"]  # decoding without a draft, and with


@dataclass(frozen=True, slots=True)
class Facts:
    """What the policy decides on. None: not known. Times in ms, medians of what was seen lately."""

    is_online: bool = True  # the connection to the broker, and a server behind it
    link: Link | None = None
    change_chance: float = 0.0  # that the link is another one at the next frame
    slowest: Link | None = None  # of the links met lately
    reply_loss: float | None = None  # share of the latest requests, 0..1
    losses_in_row: int = 0
    answers: int = 0  # since the start
    resize_ms: float | None = None
    head_ms: float | None = None
    draft_ms: float | None = None
    encode_ms: float | None = None  # of a latent
    picture_ms: float | None = None  # encoding of a picture
    request_bytes: Mapping[ParadigmName, float] = field(default_factory=dict)
    queue_ms: float | None = None  # a server's
    server_ms: float | None = None  # a server's work on a latent before and beside the decoder's passes
    # The same, by what was asked lately: a board that drafts meanwhile may share its processor with the server.
    kind_server_ms: Mapping[Kind, float] = field(default_factory=dict)
    picture_server_ms: float | None = None  # on a picture
    pass_ms: float | None = None  # of the decoder, at whatever paradigm
    kind_pass_ms: Mapping[Kind, float] = field(default_factory=dict)  # where seen lately
    tokens: float | None = None  # of a verified text
    plain_passes: float | None = None  # for a text without a draft
    drafted_passes: float | None = None  # for a text with one
    accepted_share: float | None = None  # of the drafts' tokens, 0..1
    stands_share: float | None = None  # of the latest drafts that needed nobody, 0..1
    temperature_c: float | None = None
    throttled: bool | None = None
    bytes_last_minute: int = 0  # whole payloads, resends included
    bytes_last_quarter: int = 0  # of a minute
    interval_ms: float | None = None  # between frames
    cpu_share: float | None = None  # the frames' stages, of one core


class StatusError(AiflowError, ValueError):
    """A server's status that is none."""


class _Queue(Struct, frozen=True):
    waiting: UInt32 = 0


class _Price(Struct, frozen=True):
    batch: Millis = 0.0
    one_pass: Millis = msgspec.field(default=0.0, name="pass")


class ServerStatus(Struct, frozen=True):
    """The part of a server's status that a board reads; the rest is ignored."""

    state: Literal["online", "offline"]
    server: Annotated[Name, Meta(min_length=1)]
    queue: _Queue = _Queue()
    price_ms: _Price = _Price()


_status = msgspec.json.Decoder(ServerStatus)


def decode_status(payload: bytes) -> ServerStatus:
    """Raises StatusError."""
    if len(payload) > MAX_STATUS:
        raise StatusError(f"status of {len(payload)} bytes, at most {MAX_STATUS} are read: this is no server's")
    try:
        return _status.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StatusError(f"not a server's status: {error}") from error


class Recent:
    """The latest values, for as long as they count."""

    def __init__(self, count: int = RECENT, max_age_s: float = inf) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=count)
        self._max_age_s = max_age_s

    def add(self, value: float, now: float) -> None:
        self._values.append((now, value))

    def values(self, now: float) -> list[float]:
        return [value for at, value in self._values if now - at <= self._max_age_s]

    def median(self, now: float) -> float | None:
        values = self.values(now)
        return statistics.median(values) if values else None

    def mean(self, now: float) -> float | None:
        values = self.values(now)
        return statistics.fmean(values) if values else None


def _by_kind() -> dict[Kind, Recent]:
    return {"plain": Recent(max_age_s=MINUTE_S), "drafted": Recent(max_age_s=MINUTE_S)}


def _known(recent: Mapping[Kind, Recent], now: float) -> dict[Kind, float]:
    """The medians of what was seen lately."""
    return {kind: ms for kind, values in recent.items() if (ms := values.median(now)) is not None}


@dataclass(slots=True)
class _Open:
    paradigm: ParadigmName
    size: int
    sent_at: float


class Estimates:
    """Fed by everybody, read by the frame path. `sent` comes before its `answered` or `lost`."""

    def __init__(self, ledger: ByteBudget | None = None) -> None:
        """ledger: of the bytes sent."""
        self._ledger = ledger or ByteBudget()
        self.counts = Counter(dict.fromkeys(UNUSED, 0))
        self._inbox: deque[Callable[[], None]] = deque(maxlen=QUEUE)
        self._now = 0.0
        self._network, self._is_connected = Network(), True
        self._open: dict[bytes, _Open] = {}
        self._stages = {name: Recent() for name in ("resize", "head", "draft", "encode", "picture")}
        self._busy, self._intervals, self._frames, self._last_frame = Recent(), Recent(), 0.0, -inf
        self._sizes: dict[ParadigmName, Recent] = {}
        self._queued, self._answered_at, self._answers = Recent(max_age_s=CLAIM_AGE_S), -inf, 0
        # What was slow once is worth a try later: a paradigm that is not in use is not measured.
        self._fixed = {"latent": Recent(max_age_s=600.0), "picture": Recent(max_age_s=MINUTE_S)}
        self._pass_ms = Recent(max_age_s=600.0)
        self._kind_fixed, self._kind_pass_ms = _by_kind(), _by_kind()
        self._passes: dict[str, Recent] = {name: Recent(32, 600.0) for name in ("plain", "drafted", "shadow")}
        self._tokens, self._accepted, self._stood = Recent(32), Recent(32), Recent(32)
        self._outcomes, self._losses_in_row = Recent(16, MINUTE_S), 0  # 1: lost
        # (when, claim) by server; replaced whole by the one thread that hears them, as is what they are held against.
        self._claims: dict[str, tuple[float, ServerStatus]] = {}
        self._measured_pass_ms: float | None = None
        self._vitals = Vitals()

    # ---- any thread ----

    def connected(self, is_connected: bool) -> None:
        """Whether the broker answers."""
        self._put(self._connected, is_connected)

    def sent(self, request_id: bytes, paradigm: ParadigmName, size: int, now: float) -> None:
        """A request leaves; size: its whole payload. Leaving again teaches nothing new."""
        self._put(self._sent, request_id, paradigm, size, now)

    def answered(self, reply: Reply, now: float, draft: Sequence[int] = ()) -> None:
        """The first reply, status ok, to a request; draft: what the board wrote for it, sent or not."""
        self._put(self._answered, reply, tuple(draft), now)

    def lost(self, request_id: bytes, now: float) -> None:
        """No server answered it in time."""
        self._put(self._lost, request_id, now)

    def status_arrived(self, topic: str, payload: bytes, now: float) -> None:
        """A server's status, as it came from the network. One thread, the MQTT client's."""
        try:
            server, status = topics.server_of(topic), decode_status(payload)
            if status.server != server:
                raise StatusError(f"it says that it is of {status.server!r}")
        except (TopicError, StatusError) as error:
            self._object("status_refused", topic, str(error))
            return
        ours, claimed = self._measured_pass_ms, status.price_ms.one_pass
        if ours and claimed and not ours / FAR_OFF < claimed < FAR_OFF * ours:
            self._object(
                "status_contradicted", server, f"a pass of {claimed} ms, we measured {ours:.2f} ms: that stands"
            )
        others = [item for item in self._claims.items() if item[0] != server]
        if len(others) >= SERVERS:
            self._object("servers_forgotten", others[0][0], f"more than {SERVERS} servers tell their status")
        self._claims = dict([*others[1 - SERVERS :], (server, (now, status))])

    def _object(self, kind: str, whose: str, why: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            logger.warning("%s server=%.128r why=%s", kind.replace("_", " "), whose, why)

    # ---- the frame path ----

    def took(self, paradigm: ParadigmName, timings_ms: Mapping[str, float], now: float) -> None:
        """What the stages of a frame took: resize, head, draft, encode."""
        self._put(self._took, paradigm, dict(timings_ms), now)

    def drafted(self, stands: bool, now: float) -> None:
        """Whether a draft was sure enough to need nobody, whatever became of it."""
        self._put(self._stood.add, float(stands), now)

    def measured(self, vitals: Vitals) -> None:
        """How the board is."""
        self._put(self._measured, vitals)

    def catch_up(self, now: float) -> None:
        """Takes in what was told until now; to be called for each frame, also where nobody wants the facts."""
        if isfinite(now):
            self._now = max(self._now, now)
        while self._inbox:
            self._inbox.popleft()()

    def facts(self, now: float) -> Facts:
        """Of all that was told until now."""
        self.catch_up(now)
        now = self._now
        server_ms = self._usual_server_ms(now)
        for waiting in self._open.values():
            self._look_at(waiting, server_ms, now)
        self._forget(now)
        stages = {name: recent.median(now) for name, recent in self._stages.items()}
        claims = [
            claim for at, claim in self._claims.values() if abs(now - at) <= CLAIM_AGE_S and claim.state == "online"
        ]
        claimed_passes = [claim.price_ms.one_pass for claim in claims if claim.price_ms.one_pass]
        pass_ms = self._measured_pass_ms = self._pass_ms.median(now)
        queue_ms = self._queued.median(now)
        if queue_ms is None and claims:
            queue_ms = statistics.median(claim.price_ms.batch if claim.queue.waiting else 0.0 for claim in claims)
        drafted = self._passes["drafted"].mean(now)
        interval, busy = self._intervals.median(now), self._busy.median(now)
        return Facts(
            is_online=self._is_connected and not self._all_servers_left(),
            link=self._network.link(now),
            change_chance=min(1.0, self._network.changes / (self._frames + FEW_FRAMES)),
            slowest=self._network.slowest(now),
            reply_loss=self._outcomes.mean(now),
            losses_in_row=self._losses_in_row,
            answers=self._answers,
            **{f"{name}_ms": value for name, value in stages.items()},
            request_bytes={
                name: size for name, recent in self._sizes.items() if (size := recent.median(now)) is not None
            },
            queue_ms=queue_ms,
            server_ms=self._fixed["latent"].median(now),
            picture_server_ms=self._fixed["picture"].median(now),
            pass_ms=pass_ms if pass_ms is not None or not claimed_passes else statistics.median(claimed_passes),
            kind_server_ms=_known(self._kind_fixed, now),
            kind_pass_ms=_known(self._kind_pass_ms, now),
            tokens=self._tokens.median(now),
            plain_passes=self._passes["plain"].mean(now),
            drafted_passes=self._passes["shadow"].mean(now) if drafted is None else drafted,
            accepted_share=self._accepted.mean(now),
            stands_share=self._stood.mean(now),
            temperature_c=self._vitals.temperature_c,
            throttled=self._vitals.throttled,
            bytes_last_minute=self._ledger.spent(now),
            bytes_last_quarter=self._ledger.spent(now, MINUTE_S / 4),
            interval_ms=interval,
            cpu_share=min(1.0, busy / interval) if busy is not None and interval else None,
        )

    # ---- what was told, on the frame path ----

    def _put(self, what: Callable[..., None], *values: object) -> None:
        if not all(0 <= value <= MAX_VALUE for value in values if isinstance(value, int | float)):
            self.counts["bad_value"] += 1
            return
        if len(self._inbox) == QUEUE:
            self.counts["overflow"] += 1  # the oldest goes
        self._inbox.append(partial(what, *values))

    def _past(self, at: float) -> float:
        """A time from the future is now."""
        return min(at, self._now)

    def _connected(self, is_connected: bool) -> None:
        self._is_connected = is_connected

    def _sent(self, request_id: bytes, paradigm: ParadigmName, size: int, at: float) -> None:
        at = self._past(at)
        if request_id not in self._open:
            self._open[request_id] = _Open(paradigm, size, at)
            self._sizes.setdefault(paradigm, Recent()).add(size, at)
            if len(self._open) > OPEN:
                del self._open[next(iter(self._open))]

    def _forget(self, now: float) -> None:
        for request_id in [i for i, waiting in self._open.items() if now - waiting.sent_at > LINK_AGE_S]:
            del self._open[request_id]

    def _answered(self, reply: Reply, draft: tuple[int, ...], at: float) -> None:
        waiting, at = self._open.pop(reply.id, None), self._past(at)
        if waiting is None:
            return  # a second reply, or to nothing we know: answers.py counts it
        self._answers, self._answered_at, self._losses_in_row = self._answers + 1, at, 0
        self._outcomes.add(0.0, at)
        total_ms = 1e3 * (at - waiting.sent_at)
        server_ms = sum(hop.queue_ms + hop.compute_ms for hop in reply.hops)
        if not server_ms <= total_ms:
            self.counts["hops_refused"] += 1  # a server that worked longer than we waited
            return
        self._network.answered(waiting.size, total_ms - server_ms, waiting.sent_at, at)
        if reply.hops:
            self._served(waiting.paradigm, reply, reply.hops[0], at)
        if draft and (tokens := reply.token_ids):
            self._compared(waiting.paradigm, reply, tokens, draft, at)

    def _served(self, paradigm: ParadigmName, reply: Reply, hop: Hop, at: float) -> None:
        passes_ms = min(hop.compute_ms, (hop.stages_ms or {}).get("passes", 0.0))
        self._queued.add(hop.queue_ms, at)
        kind: Kind = "drafted" if paradigm == "speculative" else "plain"
        self._fixed["picture" if paradigm == "offload" else "latent"].add(hop.compute_ms - passes_ms, at)
        if paradigm != "offload":
            self._kind_fixed[kind].add(hop.compute_ms - passes_ms, at)
        if reply.passes > len(reply.token_ids) + 1:  # each pass brings a token, the last one the end
            self.counts["passes_refused"] += 1
        elif reply.passes:
            self._passes[kind].add(reply.passes, at)
            self._pass_ms.add(passes_ms / reply.passes, at)
            self._kind_pass_ms[kind].add(passes_ms / reply.passes, at)

    def _compared(
        self, paradigm: ParadigmName, reply: Reply, tokens: list[int], draft: tuple[int, ...], at: float
    ) -> None:
        """Every verified text teaches what its draft was worth, even if it was not sent."""
        self._tokens.add(len(tokens), at)
        same = next((n for n, pair in enumerate(zip(tokens, draft, strict=False)) if pair[0] != pair[1]), None)
        same = min(len(tokens), len(draft)) if same is None else same
        was_sent = paradigm == "speculative" and reply.proposed
        self._accepted.add(min(1.0, reply.accepted / reply.proposed) if was_sent else same / len(draft), at)
        # One pass verifies the draft as far as it is right, then one a token: at most so many.
        self._passes["shadow"].add(max(1, len(tokens) - same + 1), at)

    def _lost(self, request_id: bytes, at: float) -> None:
        waiting, at = self._open.pop(request_id, None), self._past(at)
        if waiting is None:
            return
        self._losses_in_row += 1
        self._outcomes.add(1.0, at)
        self._look_at(waiting, self._usual_server_ms(at), at)

    def _usual_server_ms(self, now: float) -> float:
        passes_ms = (self._tokens.median(now) or 0.0) * (self._pass_ms.median(now) or 0.0)
        return (self._queued.median(now) or 0.0) + (self._fixed["latent"].median(now) or 0.0) + passes_ms

    def _look_at(self, waiting: _Open, server_ms: float, now: float) -> None:
        """A request that is open says at least how slow the link is."""
        self._network.overdue(waiting.size, waiting.sent_at, 1e3 * (now - waiting.sent_at) - server_ms, now)

    def _all_servers_left(self) -> bool:
        """They say so, and none has answered since."""
        return bool(self._claims) and all(
            claim.state == "offline" and min(at, self._now) >= self._answered_at for at, claim in self._claims.values()
        )

    def _took(self, paradigm: ParadigmName, timings_ms: dict[str, float], at: float) -> None:
        at = self._past(at)
        for stage, ms in timings_ms.items():
            if not 0 <= ms <= MAX_VALUE:
                self.counts["bad_value"] += 1
                continue
            name = "picture" if stage == "encode" and paradigm == "offload" else stage
            if name in self._stages:
                self._stages[name].add(ms, at)
        self._frames += 1
        if self._frames > MANY_FRAMES:  # changes long ago count less and less
            self._frames, self._network.changes = self._frames / 2, self._network.changes / 2
        self._busy.add(sum(ms for name, ms in timings_ms.items() if name in self._stages and 0 <= ms <= MAX_VALUE), at)
        if self._last_frame >= 0:
            self._intervals.add(1e3 * max(0.0, at - self._last_frame), at)
        self._last_frame = max(at, self._last_frame)

    def _measured(self, vitals: Vitals) -> None:
        self._vitals = vitals
