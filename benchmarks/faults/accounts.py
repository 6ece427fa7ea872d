"""What became of each frame, read from events alone: no counter of the runtime is believed here.

Pure: an event goes in with the time of its arrival. A frame is accepted when any of its events says that a request is,
or was, on its way; a `new` that is final needed none.
"""

from collections import Counter
from dataclasses import dataclass

from edge_runtime.wire import Event


@dataclass(slots=True)
class History:
    """The events of one frame."""

    asked: bool = False
    kept: bool = False  # the last word was that it is asked again later
    final: str = ""  # type of the final event
    is_double: bool = False  # a second `new`, a second final event, or anything behind a final one
    news: int = 0


@dataclass(frozen=True, slots=True)
class Tally:
    """Frames. accepted = answered + lost + unsettled."""

    accepted: int
    answered: int
    lost: int
    duplicates: int
    kept: int  # among the unsettled: in the outbox
    unsettled: int  # no final event yet


class Ledger:
    """The histories of the frames of one row."""

    def __init__(self) -> None:
        self._frames: dict[tuple[str, str], History] = {}  # by board: an id is unique for one board alone
        self._answered_at: list[float] = []
        self._new_at: list[tuple[float, str]] = []
        self.reasons: Counter[str] = Counter()  # of losses, without what differs from frame to frame

    def take(self, event: Event, now: float, board: str = "") -> None:
        """now: seconds, time.monotonic(); board: whose, any name for it."""
        frame = self._frames.setdefault((board, event.frame), History())
        frame.news += event.type == "new"
        frame.is_double |= bool(frame.final) or frame.news > 1
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
        """Answered frames whose answer arrived in this time."""
        return sum(since <= at < until for at in self._answered_at)

    def first_answer(self, since: float) -> float | None:
        return next((at for at in self._answered_at if at >= since), None)

    def news(self, since: float, until: float = float("inf"), board: str = "") -> int:
        """First events that arrived in this time, of one board or of all."""
        return sum(since <= at < until and board in ("", whose) for at, whose in self._new_at)

    def tally(self) -> Tally:
        asked = [frame for frame in self._frames.values() if frame.asked]
        return Tally(
            accepted=len(asked),
            answered=sum(frame.final == "update" for frame in asked),
            lost=sum(frame.final == "lost" for frame in asked),
            duplicates=sum(frame.is_double for frame in self._frames.values()),
            kept=sum(frame.kept for frame in asked),
            unsettled=sum(not frame.final for frame in asked),
        )
