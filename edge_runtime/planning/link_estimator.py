"""Learns how well requests get through: open requests, replies, losses and the model of the link."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from edge_runtime.planning.link_model import LINK_AGE_S, LinkEstimate, LinkModel
from edge_runtime.planning.recent_values import RecentValues
from edge_runtime.wire.event import ParadigmName

MAX_OPEN = 256  # requests without a reply; then the oldest is forgotten
LOSS_AGE_S = 60.0
# The rate of link changes says little before FEW_FRAMES, and changes more than MANY_FRAMES ago count less and less.
FEW_FRAMES, MANY_FRAMES = 100, 2000


@dataclass(frozen=True, slots=True)
class LinkSnapshot:
    """None: not known."""

    estimate: LinkEstimate | None = None
    change_chance: float = 0.0  # that another link is in use at the next frame, 0..1
    slowest: LinkEstimate | None = None  # of the links that were in use lately
    reply_loss: float | None = None  # share of the latest requests that no server answered in time, 0..1
    losses_in_row: int = 0
    answers: int = 0  # since the start
    request_bytes: Mapping[ParadigmName, float] = field(default_factory=dict)  # median payload
    bytes_last_minute: int = 0  # whole payloads of all requests, also of those sent again
    bytes_last_quarter: int = 0  # the same, of the last quarter of a minute


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """A request without a reply so far."""

    paradigm: ParadigmName
    size: int  # bytes of the whole payload
    sent_at: float


class LinkEstimator:
    """Times are seconds of one clock; server_ms is the time that servers spend on a request."""

    def __init__(self) -> None:
        self.proven_at = -inf  # when the latest of the requests that were answered was sent
        self._model = LinkModel()
        self._open: dict[bytes, OpenRequest] = {}
        self._sizes: dict[ParadigmName, RecentValues] = {}
        self._losses = RecentValues(16, LOSS_AGE_S)  # 1: lost, 0: answered
        self._losses_in_row = self._answers = 0
        self._frames = 0.0

    def sent(self, request_id: bytes, paradigm: ParadigmName, size: int, at: float) -> None:
        """Only the first sending of a request counts."""
        if request_id not in self._open:
            self._open[request_id] = OpenRequest(paradigm, size, at)
            self._sizes.setdefault(paradigm, RecentValues()).add(size, at)
            if len(self._open) > MAX_OPEN:
                del self._open[next(iter(self._open))]

    def answered(self, request_id: bytes, at: float) -> OpenRequest | None:
        """Returns the request that was open; None for a second reply, or one to an unknown request."""
        if request := self._open.pop(request_id, None):
            self._answers, self._losses_in_row = self._answers + 1, 0
            self.proven_at = max(self.proven_at, request.sent_at)
            self._losses.add(0.0, at)
        return request

    def measured(self, request: OpenRequest, network_ms: float | None, at: float) -> None:
        """network_ms: from sending the request to its reply, without server_ms. None: that says nothing of the link."""
        if network_ms is None:
            self._model.not_overdue(request.sent_at)
        else:
            self._model.answered(request.size, network_ms, request.sent_at, at)

    def lost(self, request_id: bytes, server_ms: float, at: float) -> None:
        if request := self._open.pop(request_id, None):
            self._losses_in_row += 1
            self._losses.add(1.0, at)
            self._overdue(request, server_ms, at)

    def frame_handled(self) -> None:
        self._frames += 1
        if self._frames > MANY_FRAMES:
            self._frames, self._model.changes = self._frames / 2, self._model.changes / 2

    def snapshot(self, now: float, server_ms: float, bytes_last_minute: int, bytes_last_quarter: int) -> LinkSnapshot:
        """server_ms: usual; an open request shows how slow the link is at least."""
        for request in self._open.values():
            self._overdue(request, server_ms, now)
        self._open = {key: open_ for key, open_ in self._open.items() if now - open_.sent_at <= LINK_AGE_S}
        sizes = {paradigm: recent.median(now) for paradigm, recent in self._sizes.items()}
        return LinkSnapshot(
            estimate=self._model.estimate(now),
            change_chance=min(1.0, self._model.changes / (self._frames + FEW_FRAMES)),
            slowest=self._model.slowest(now),
            reply_loss=self._losses.mean(now),
            losses_in_row=self._losses_in_row,
            answers=self._answers,
            request_bytes={paradigm: size for paradigm, size in sizes.items() if size is not None},
            bytes_last_minute=bytes_last_minute,
            bytes_last_quarter=bytes_last_quarter,
        )

    def _overdue(self, request: OpenRequest, server_ms: float, now: float) -> None:
        self._model.overdue(request.size, request.sent_at, 1e3 * (now - request.sent_at) - server_ms, now)
