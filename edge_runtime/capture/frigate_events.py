"""Which of Frigate's snapshots belongs to which of its events, for one camera. Rules over values: no clock, no thread.

Frigate publishes a snapshot of an object when it first sees it, and again whenever it has a better one. The message has
the label in its topic and no id. So a snapshot belongs to the youngest event of its label that had begun when it came,
and the newest one is the best. Ages come from the difference of two of Frigate's times: its clock need not be right.
Frigate's documentation, "MQTT"; its sources, frigate/camera/state.py.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from math import inf

from edge_runtime.capture.frigate_messages import ObjectChange, ReviewChange
from edge_runtime.wire.event import FrigateEvent

MAX_EVENTS = 128  # of one camera at one time; then the oldest is dropped
MAX_REVIEWED = 512  # events whose review item is remembered
MAX_SNAPSHOTS, MAX_SNAPSHOT_BYTES = 32, 16 << 20  # that are kept for events; then the oldest is dropped
MAX_LIFE_S = 60.0  # an object may have been in view for this time when Frigate reports it
SLACK_S = 0.5  # the first snapshot of an object may come this much before its event has begun
COUNTED = ("begun", "taken", "no_snapshot", "dropped", "missed")


@dataclass(slots=True)
class Snapshot:
    """A picture of Frigate's, still encoded."""

    label: str
    data: bytes
    arrived: float  # seconds, time.monotonic()
    is_used: bool = False


@dataclass(slots=True)
class _Tracked:
    id: str
    label: str
    begun: float  # when the object came into view, by the board's clock
    due: float  # when it is taken at the latest, if there is a snapshot
    is_taken: bool = False
    has_ended: bool = False


@dataclass(slots=True)
class FrigateEvents:
    """The events of one camera that have not ended. begun = taken + no_snapshot + dropped + open, at every moment."""

    wait_s: float  # for a better snapshot, from the first message of an event
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTED, 0)))
    _events: dict[str, _Tracked] = field(default_factory=dict)
    _snapshots: deque[Snapshot] = field(default_factory=deque)
    _reviewed: dict[str, tuple[str, str]] = field(default_factory=dict)  # event -> review item and its severity

    @property
    def open(self) -> int:
        """Events that wait to be taken."""
        return sum(not event.is_taken for event in self._events.values())

    def object_changed(self, change: ObjectChange, now: float) -> None:
        """A message of `frigate/events`."""
        tracked = change.after
        if change.type == "new" and tracked.id not in self._events:
            self.counts["begun"] += 1
            age = min(max(0.0, tracked.frame_time - tracked.start_time), MAX_LIFE_S)
            event = _Tracked(tracked.id, tracked.label, now - age - SLACK_S, now + self.wait_s)
            self._events[tracked.id] = event
            if len(self._events) > MAX_EVENTS:
                oldest = self._events.pop(next(iter(self._events)))
                self.counts["dropped"] += not oldest.is_taken
        elif change.type == "end":
            if (known := self._events.get(tracked.id)) is None:
                self.counts["missed"] += 1  # it began before this board did, or while it was not connected
            elif known.is_taken:
                del self._events[tracked.id]
            elif self._best(known) is None:  # what was published before has arrived before: no snapshot will come
                del self._events[tracked.id]
                self.counts["no_snapshot"] += 1
            else:
                known.has_ended = True

    def review_changed(self, change: ReviewChange) -> None:
        """A message of `frigate/reviews`."""
        review = change.after
        for event in review.data.detections:
            self._reviewed.pop(event, None)  # so that it becomes the newest
            self._reviewed[event] = review.id, review.severity
        while len(self._reviewed) > MAX_REVIEWED:
            del self._reviewed[next(iter(self._reviewed))]

    def snapshot_arrived(self, label: str, data: bytes, now: float) -> int:
        """A message of `frigate/<camera>/<label>/snapshot`. Returns how many older ones were dropped without use."""
        unused = 0
        self._snapshots.append(Snapshot(label, data, now))
        while (
            len(self._snapshots) > MAX_SNAPSHOTS or sum(len(each.data) for each in self._snapshots) > MAX_SNAPSHOT_BYTES
        ):
            unused += not self._snapshots.popleft().is_used
        return unused

    def next_due(self) -> float:
        """When `take` will have something, if nothing else arrives. inf: not before something does."""
        waiting = (event for event in self._events.values() if not event.is_taken and self._best(event))
        return min((-inf if event.has_ended else event.due for event in waiting), default=inf)

    def take(self, now: float) -> tuple[FrigateEvent, Snapshot] | None:
        """An event whose time has come, the oldest first, with its best snapshot. Each event is taken once."""
        for event in tuple(self._events.values()):
            if event.is_taken or not (event.has_ended or event.due <= now):
                continue
            snapshot = self._best(event)
            if snapshot is None and event.has_ended:  # so many came since that its own was dropped
                del self._events[event.id]
                self.counts["no_snapshot"] += 1
            if snapshot is None:
                continue  # its first one is taken when it comes
            event.is_taken = snapshot.is_used = True
            self.counts["taken"] += 1
            if event.has_ended:
                del self._events[event.id]
            review, severity = self._reviewed.get(event.id, (None, None))
            return FrigateEvent(event.id, event.label, review, severity), snapshot  # type: ignore[arg-type]
        return None

    def clear(self) -> int:
        """The camera is switched off: nothing that waits is answered. Returns how many snapshots were not used."""
        self.counts["dropped"] += self.open
        unused = sum(not snapshot.is_used for snapshot in self._snapshots)
        self._events.clear()
        self._snapshots.clear()
        return unused

    def _best(self, event: _Tracked) -> Snapshot | None:
        """The newest snapshot that belongs to the event. If none is its own, the newest one since the event began: two
        objects of one label that come into view together share a picture.
        """
        since = [each for each in self._snapshots if each.label == event.label and each.arrived >= event.begun]
        others = (
            each.begun for each in self._events.values() if each.label == event.label and each.begun > event.begun
        )
        until = min(others, default=inf)
        own = [each for each in since if each.arrived < until]
        return (own or since)[-1] if since else None
