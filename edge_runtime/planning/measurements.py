"""The board's measurements of its link, its servers and itself, from its own traffic.

Whoever observes requests may do so from any thread: each observation is a message on a bounded queue. The frame path
applies these messages to the estimators and gets a `Snapshot`. No clock is read: times are seconds of one clock that
never steps back.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from math import isfinite

from edge_runtime.planning.board_estimator import STAGES, BoardEstimator, BoardSnapshot
from edge_runtime.planning.link_estimator import LinkEstimator, LinkSnapshot
from edge_runtime.planning.server_estimator import ServerEstimator, ServerSnapshot
from edge_runtime.planning.server_status import ServerStatuses, Takes
from edge_runtime.planning.thermal import ThermalState
from edge_runtime.wire import Reply
from edge_runtime.wire.event import ParadigmName

QUEUE = 1024  # messages between two frames; then the oldest is dropped and counted
MAX_VALUE = 1e9  # of a time or a size; no measurement is larger
MINUTE_S = 60.0
IGNORED = (  # what was received and not used, by the name of its counter
    "status_refused",  # a payload that is not the status of this server
    "status_contradicted",  # a claim that is far from what was measured
    "servers_forgotten",  # a status more than are remembered
    "hops_refused",  # a server claims to have worked longer than the board waited
    "passes_refused",  # a server claims more passes of the decoder than its text has tokens
    "bad_value",  # not a time or a size
    "overflow",  # more messages between two frames than the queue holds
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The input of the policy. Times are in ms."""

    is_online: bool = True  # the broker is connected, and there is a server behind it
    why_offline: str = "no server takes requests"  # if it is not online
    awaited: str = ""  # if it is not online: what says when it is again, so that no frame has to find out; "": nothing
    link: LinkSnapshot = field(default_factory=LinkSnapshot)
    server: ServerSnapshot = field(default_factory=ServerSnapshot)
    board: BoardSnapshot = field(default_factory=BoardSnapshot)
    takes: Takes = field(default_factory=Takes)  # what the servers take


@dataclass(frozen=True, slots=True)
class RequestSent:
    """Maybe not for the first time."""

    request_id: bytes
    paradigm: ParadigmName
    size: int  # bytes of the whole payload
    at: float


@dataclass(frozen=True, slots=True)
class RequestAnswered:
    """A reply with status ok arrived."""

    reply: Reply
    draft: tuple[int, ...]  # of the board, whether the request contained it or not
    at: float
    is_timed: bool = True  # False: its time says nothing of the link


@dataclass(frozen=True, slots=True)
class RequestLost:
    """No server answered in time."""

    request_id: bytes
    at: float


class Measurements:
    """`sent` is called before `answered` or `lost` of the same request."""

    def __init__(self, bytes_spent: Callable[[float, float], int] = lambda now, within_s: 0, bundle: str = "") -> None:
        """bytes_spent: bytes of requests sent in the within_s seconds before `now`. bundle: the id of the board's."""
        self.counts = Counter(dict.fromkeys(IGNORED, 0))
        self._bytes_spent, self._is_connected, self._now = bytes_spent, True, 0.0
        self._inbox: deque[RequestSent | RequestAnswered | RequestLost] = deque(maxlen=QUEUE)
        self._link, self._board = LinkEstimator(), BoardEstimator()
        self._server, self._statuses = ServerEstimator(self.counts), ServerStatuses(self.counts, bundle)

    # ---- any thread ----

    def connected(self, is_connected: bool) -> None:
        """Whether the broker answers."""
        self._is_connected = is_connected

    def sent(self, request_id: bytes, paradigm: ParadigmName, size: int, now: float) -> None:
        """A request is sent, or sent again. size: bytes of its whole payload."""
        self._put(RequestSent(request_id, paradigm, size, now), size, now)

    def answered(self, reply: Reply, now: float, draft: Sequence[int] = (), *, is_timed: bool = True) -> None:
        """The first reply to a request, with status ok. draft: of the board, sent or not.

        is_timed: False if the request has waited for the broker or for a server.
        """
        self._put(RequestAnswered(reply, tuple(draft), now, is_timed), now)

    def lost(self, request_id: bytes, now: float) -> None:
        """No server answered the request in time."""
        self._put(RequestLost(request_id, now), now)

    def status_arrived(self, topic: str, payload: bytes, now: float, is_retained: bool = False) -> None:
        """A server's status, as received. Called by one thread only, the MQTT client's.

        is_retained: the broker had kept it.
        """
        self._statuses.arrived(topic, payload, now, is_retained)

    def find_silence(self) -> str:
        """Why no server can be expected to answer, in words; "" if one can."""
        return self._statuses.find_silence()

    def has_other_server(self, refused: AbstractSet[str], now: float) -> bool:
        """Whether a server besides these takes requests, as far as is known."""
        return self._statuses.has_other(refused, now)

    def _put(self, message: RequestSent | RequestAnswered | RequestLost, *numbers: float) -> None:
        if not all(self._is_good(number) for number in numbers):
            return
        if len(self._inbox) == QUEUE:
            self.counts["overflow"] += 1
        self._inbox.append(message)

    def _is_good(self, number: float) -> bool:
        """Counts it if not."""
        is_good = 0 <= number <= MAX_VALUE  # False for NaN, too
        self.counts["bad_value"] += not is_good
        return is_good

    # ---- the frame path ----

    def frame_handled(self, paradigm: ParadigmName, timings_ms: Mapping[str, float], now: float) -> None:
        """The times of the stages of a frame. paradigm: as planned, which says what was encoded, even if not sent."""
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
        """Applies all messages. Called for each frame, so that the queue never fills while no snapshot is needed."""
        if isfinite(now):
            self._now = max(self._now, now)
        while self._inbox:
            self._apply(self._inbox.popleft())

    def takes(self, now: float, prompt: str = "", samples: bool = False) -> Takes:
        """What the servers take. prompt, samples: as for `snapshot`."""
        self.catch_up(now)
        return self._statuses.takes(self._now, prompt, samples)

    def snapshot(self, now: float, prompt: str = "", samples: bool = False) -> Snapshot:
        """From all messages until now. prompt: only servers that have it count in `takes`; empty: all do.

        samples: only servers that sample count.
        """
        self.catch_up(now)
        now = self._now
        self._statuses.measured_pass_ms = self._server.pass_ms(now)
        last_minute, last_quarter = (self._bytes_spent(now, within_s) for within_s in (MINUTE_S, MINUTE_S / 4))
        is_connected = self._is_connected
        return Snapshot(
            is_online=is_connected and not self._statuses.all_refuse(now, self._link.proven_at),
            why_offline=self._statuses.why_refused() if is_connected else "no connection to the broker",
            awaited="a server's status says when one does" if is_connected and self._statuses.will_say(now) else "",
            link=self._link.snapshot(now, self._server.usual_ms(now), last_minute, last_quarter),
            server=self._server.snapshot(now, self._statuses.claims(now)),
            board=self._board.snapshot(now),
            takes=self._statuses.takes(now, prompt, samples),
        )

    def _apply(self, message: RequestSent | RequestAnswered | RequestLost) -> None:
        at = min(message.at, self._now)  # a time in the future counts as now
        match message:
            case RequestSent(request_id, paradigm, size):
                self._link.sent(request_id, paradigm, size, at)
            case RequestLost(request_id):
                self._link.lost(request_id, self._server.usual_ms(at), at)
            case RequestAnswered(reply, draft, _, is_timed):
                if (request := self._link.answered(reply.id, at)) is None:
                    return
                # A higher tier, which `server` may name, publishes its status to another broker.
                self._statuses.answered(reply.hops[0].server if reply.hops else reply.server)
                total_ms = 1e3 * (at - request.sent_at)
                server_ms = sum(hop.queue_ms + hop.compute_ms for hop in reply.hops)
                if server_ms <= total_ms:
                    self._link.measured(request, total_ms - server_ms if is_timed else None, at)
                    self._server.answered(request.paradigm, reply, draft, at)
                else:
                    self.counts["hops_refused"] += 1
