"""What the board has measured of its link, its servers and itself, from its own traffic.

Requests are observed on any thread: each observation waits in a bounded queue. The frame path applies them to the
estimators and gets a `Snapshot`. No clock is read: times are seconds of one clock that never steps back.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite

from edge_runtime.planning.board_estimator import STAGES, BoardEstimator, BoardSnapshot
from edge_runtime.planning.link_estimator import LinkEstimator, LinkSnapshot
from edge_runtime.planning.server_estimator import ServerEstimator, ServerSnapshot
from edge_runtime.planning.server_status import ServerStatuses
from edge_runtime.planning.thermal import ThermalState
from edge_runtime.wire import Reply
from edge_runtime.wire.event import ParadigmName

QUEUE = 1024  # observations between two frames; then the oldest is dropped and counted
MAX_VALUE = 1e9  # of a time or a size; no measurement is larger
# What was received and not used; reporting/counters.py says what each means.
IGNORED = ("status_refused", "status_contradicted", "servers_forgotten", "hops_refused", "passes_refused", "bad_value")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the policy decides on. Times are in ms."""

    is_online: bool = True  # the broker is connected, and there is a server behind it
    link: LinkSnapshot = field(default_factory=LinkSnapshot)
    server: ServerSnapshot = field(default_factory=ServerSnapshot)
    board: BoardSnapshot = field(default_factory=BoardSnapshot)


class Measurements:
    """`sent` is called before `answered` or `lost` of the same request."""

    def __init__(self, bytes_spent: Callable[[float, float], int] = lambda now, within_s: 0) -> None:
        """bytes_spent: bytes of requests sent in the within_s seconds before `now`."""
        self.counts = Counter(dict.fromkeys((*IGNORED, "overflow"), 0))
        self._is_connected, self._now = True, 0.0
        self._inbox: deque[tuple[float, Callable[[float], object]]] = deque(maxlen=QUEUE)  # (when, what to apply)
        self._link, self._board = LinkEstimator(bytes_spent), BoardEstimator()
        self._server, self._statuses = ServerEstimator(self.counts), ServerStatuses(self.counts)

    # ---- any thread ----

    def connected(self, is_connected: bool) -> None:
        """Whether the broker answers."""
        self._is_connected = is_connected

    def sent(self, request_id: bytes, paradigm: ParadigmName, size: int, now: float) -> None:
        """A request is sent, or sent again. size: bytes of its whole payload."""
        self._put(partial(self._link.sent, request_id, paradigm, size), now, size)

    def answered(self, reply: Reply, now: float, draft: Sequence[int] = ()) -> None:
        """The first reply to a request, with status ok. draft: of the board, sent or not."""
        self._put(partial(self._answered, reply, tuple(draft)), now)

    def lost(self, request_id: bytes, now: float) -> None:
        """No server answered the request in time."""
        self._put(lambda at: self._link.lost(request_id, self._server.usual_ms(at), at), now)

    def status_arrived(self, topic: str, payload: bytes, now: float) -> None:
        """A server's status, as received. Called by one thread only, the MQTT client's."""
        self._statuses.arrived(topic, payload, now)

    def _put(self, apply: Callable[[float], object], at: float, size: float = 0) -> None:
        if self._is_good(at) and self._is_good(size):
            self.counts["overflow"] += len(self._inbox) == QUEUE
            self._inbox.append((at, apply))

    def _is_good(self, number: float) -> bool:
        """Counts it if not."""
        is_good = 0 <= number <= MAX_VALUE  # False for NaN, too
        self.counts["bad_value"] += not is_good
        return is_good

    # ---- the frame path ----

    def frame_handled(self, paradigm: ParadigmName, timings_ms: Mapping[str, float], now: float) -> None:
        """What the stages of a frame took. paradigm: as planned, which says what was encoded, even if not sent."""
        if self._is_good(now):
            good = {stage: ms for stage, ms in timings_ms.items() if self._is_good(ms)}
            if paradigm == "offload" and "encode" in good:
                good["picture"] = good.pop("encode")
            self._board.frame_handled({stage: ms for stage, ms in good.items() if stage in STAGES}, now)
            self._link.frame_handled()

    def draft_written(self, accepted_unverified: bool, now: float) -> None:
        """Whether a draft was good enough to be accepted without verification, whatever happened to its frame."""
        self._board.draft_written(accepted_unverified, now)

    def thermal_read(self, state: ThermalState) -> None:
        self._board.thermal = state

    def catch_up(self, now: float) -> None:
        """Applies all observations. Called per frame: the queue must not fill while no snapshot is needed."""
        if isfinite(now):
            self._now = max(self._now, now)
        while self._inbox:
            at, apply = self._inbox.popleft()
            apply(min(at, self._now))  # a time in the future counts as now

    def snapshot(self, now: float) -> Snapshot:
        self.catch_up(now)
        now = self._now
        self._statuses.measured_pass_ms = self._server.pass_ms(now)
        return Snapshot(
            is_online=self._is_connected and not self._statuses.all_refuse(now, self._link.answered_at),
            link=self._link.snapshot(now, self._server.usual_ms(now)),
            server=self._server.snapshot(now, self._statuses.claims(now)),
            board=self._board.snapshot(now),
        )

    def _answered(self, reply: Reply, draft: Sequence[int], at: float) -> None:
        if (request := self._link.answered(reply.id, at)) is None:
            return
        self._statuses.answered(reply.server)
        total_ms = 1e3 * (at - request.sent_at)
        server_ms = sum(hop.queue_ms + hop.compute_ms for hop in reply.hops)
        if server_ms <= total_ms:
            self._link.measured(request, total_ms - server_ms, at)
            self._server.answered(request.paradigm, reply, draft, at)
        else:
            self.counts["hops_refused"] += 1
