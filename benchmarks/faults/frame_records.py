"""Counts the outcome of each frame, from events alone. The board's own counters are not trusted here.

No clock and no I/O: an event goes in with the time of its arrival. A frame counts as accepted if any of its events says
that there is, or was, a request for it. A `new` event that is final needed no request.
"""

from collections import Counter
from dataclasses import dataclass

from edge_runtime.wire import Event


@dataclass(slots=True)
class FrameRecord:
    """The events of one frame."""

    asked: bool = False  # there is or was a request
    kept: bool = False  # its last event says that the request is sent again later
    final: str = ""  # type of the final event
    is_duplicate: bool = False  # a second `new`, a second final event, or any event after a final one
    first_events: int = 0


@dataclass(frozen=True, slots=True)
class FrameCounts:
    """Numbers of frames. accepted = answered + lost + unsettled."""

    accepted: int
    answered: int
    lost: int
    duplicates: int
    kept: int  # of the unsettled: in the outbox
    unsettled: int  # without a final event


class FrameRecords:
    """The records of all frames of one scenario."""

    def __init__(self) -> None:
        self._frames: dict[tuple[str, str], FrameRecord] = {}  # by board, since a frame's id is unique per board only
        self._answered_at: list[float] = []
        self._new_at: list[tuple[float, str]] = []
        self.reasons: Counter[str] = Counter()  # of losses, with numbers replaced by N

    def add(self, event: Event, now: float, board: str = "") -> None:
        """now: seconds, time.monotonic(). board: any name for it."""
        frame = self._frames.setdefault((board, event.frame), FrameRecord())
        frame.first_events += event.type == "new"
        frame.is_duplicate |= bool(frame.final) or frame.first_events > 1
        frame.asked |= event.type != "new" or not event.final
        frame.kept = event.type == "update" and not event.final
        if event.type == "new":
            self._new_at.append((now, board))
        if event.final and not frame.final:
            frame.final = event.type
            if event.type == "update":
                self._answered_at.append(now)
            elif event.type == "lost":
                self.reasons[" ".join("N" if word.isdecimal() else word for word in event.why.split())] += 1

    def answers(self, since: float, until: float = float("inf")) -> int:
        """Frames whose answer arrived in this time."""
        return sum(since <= at < until for at in self._answered_at)

    def first_answer(self, since: float) -> float | None:
        """When the first answer after this time arrived."""
        return next((at for at in self._answered_at if at >= since), None)

    def first_events(self, since: float, until: float = float("inf"), board: str = "") -> int:
        """First events that arrived in this time, of one board or of all."""
        return sum(since <= at < until and board in ("", whose) for at, whose in self._new_at)

    def counts(self) -> FrameCounts:
        asked = [frame for frame in self._frames.values() if frame.asked]
        return FrameCounts(
            accepted=len(asked),
            answered=sum(frame.final == "update" for frame in asked),
            lost=sum(frame.final == "lost" for frame in asked),
            duplicates=sum(frame.is_duplicate for frame in self._frames.values()),
            kept=sum(frame.kept for frame in asked),
            unsettled=sum(not frame.final for frame in asked),
        )
