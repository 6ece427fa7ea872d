"""What the MQTT client has yet to send: two bounds, deadlines, and for every message exactly one outcome.

Knows nothing of MQTT and of clocks: time is an argument, in seconds on any one clock. Thread-safe; the lock is held for
a few appends and never while somebody's callback runs.
"""

import enum
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import inf

MAX_SENDS = 3  # a message that was in flight when the broker closed so many connections is taken for the cause


class Outcome(enum.Enum):
    DELIVERED = "delivered"  # the broker acknowledged it (QoS 0: it was written to the socket)
    REFUSED = "refused"  # the broker said no (access list, quota), or closed every connection that carried it
    DROPPED = "dropped"  # the queue was full and this was the oldest, or a newer birth took its place
    OVERSIZED = "oversized"  # larger than our own bound or than the broker's Maximum Packet Size
    EXPIRED = "expired"  # its time ran out before an acknowledgement was seen
    CLOSED = "closed"  # the client was closed first


@dataclass(slots=True, eq=False)
class Outgoing:
    """One message until it ends."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    deadline: float = inf
    on_outcome: Callable[[Outcome], None] | None = None
    is_birth: bool = False  # of no use to the next connection, which has its own
    suspicions: int = 0  # connections that the broker closed while this was in flight


class OutgoingQueue:
    """Messages wait here, are taken into flight, come back when the connection is lost, and end.

    At most max_messages and max_bytes of payload wait: the oldest makes room. What came back is not counted there and
    goes first; it is at most what was in flight.
    """

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages, self._max_bytes = max_messages, max_bytes
        self._lock = threading.Lock()
        self._new: deque[Outgoing] = deque()
        self._new_bytes = 0
        self._again: deque[Outgoing] = deque()  # was in flight; the oldest first
        self._next_deadline = inf  # nothing that waits expires earlier
        self._is_closed = False
        self._accepted = 0
        self._outcomes: Counter[Outcome] = Counter()
        # To be told. Short: the client's thread empties it on every pass, and an entry holds no payload.
        self._untold: deque[tuple[Callable[[Outcome], None], Outcome]] = deque()

    def accept(self, message: Outgoing, refusal: Outcome | None = None) -> Outcome | None:
        """Take a message over; refusal: it ends at once, so. Returns how it ended, None if it has not.

        A birth waits for nothing and is only counted.
        """
        with self._lock:
            self._accepted += 1
            if message.is_birth:
                return None
            refusal = Outcome.CLOSED if self._is_closed else refusal
            if refusal:
                self._end(message, refusal)
            else:
                self._new.append(message)
                self._new_bytes += len(message.payload)
                self._next_deadline = min(self._next_deadline, message.deadline)
                while len(self._new) > self._max_messages or self._new_bytes > self._max_bytes:
                    self._end(self._pop_new(), Outcome.DROPPED)
            return refusal

    def take(self, in_flight: Collection[Outgoing]) -> Outgoing | None:
        """The next message that may be sent beside those in flight.

        A message under suspicion flies alone: only then can the next lost connection convict it.
        """
        with self._lock:
            waiting = self._again or self._new
            if not waiting or (in_flight and (waiting[0].suspicions or any(m.suspicions for m in in_flight))):
                return None
            return self._again.popleft() if self._again else self._pop_new()

    def give_back(self, in_flight: Iterable[Outgoing], by_broker: bool) -> list[Outgoing]:
        """The connection is lost: what was in flight, in its order, goes first on the next. Returns the convicted.

        by_broker: the broker closed the connection, so one of these may be why.
        """
        messages, convicted = list(in_flight), []
        with self._lock:
            for message in reversed(messages):
                message.suspicions += by_broker
                if message.is_birth:
                    self._end(message, Outcome.DROPPED)
                elif message.suspicions >= MAX_SENDS:
                    self._end(message, Outcome.REFUSED)
                    convicted.append(message)
                else:
                    self._again.appendleft(message)
                    self._next_deadline = min(self._next_deadline, message.deadline)
        return convicted

    def end(self, message: Outgoing, outcome: Outcome) -> None:
        """A message that was taken has ended."""
        with self._lock:
            self._end(message, outcome)

    def sweep(self, now: float) -> float:
        """End what has expired while it waited. Returns when the next one will."""
        with self._lock:
            if now >= self._next_deadline:  # deadlines are not in order: look at all
                for message in [m for m in (*self._again, *self._new) if m.deadline <= now]:
                    self._end(message, Outcome.EXPIRED)
                self._again = deque(m for m in self._again if m.deadline > now)
                self._new = deque(m for m in self._new if m.deadline > now)
                self._new_bytes = sum(len(m.payload) for m in self._new)
                self._next_deadline = min((m.deadline for m in (*self._again, *self._new)), default=inf)
            return self._next_deadline

    def close(self) -> None:
        """What comes from now on ends as CLOSED; what waits may still be taken."""
        with self._lock:
            self._is_closed = True

    def end_all(self) -> None:
        """What waits ends as CLOSED."""
        with self._lock:
            while self._again or self._new:
                self._end(self._again.popleft() if self._again else self._pop_new(), Outcome.CLOSED)

    def next_untold(self) -> tuple[Callable[[Outcome], None], Outcome] | None:
        """A callback, and the outcome to call it with."""
        with self._lock:
            return self._untold.popleft() if self._untold else None

    def counts(self) -> dict[str, int]:
        """published = the outcomes + pending (waiting or in flight)."""
        with self._lock:
            ended = {outcome.value: self._outcomes[outcome] for outcome in Outcome}
            return {"published": self._accepted, "pending": self._accepted - sum(ended.values()), **ended}

    def _pop_new(self) -> Outgoing:
        message = self._new.popleft()
        self._new_bytes -= len(message.payload)
        return message

    def _end(self, message: Outgoing, outcome: Outcome) -> None:
        self._outcomes[outcome] += 1
        if message.on_outcome:
            self._untold.append((message.on_outcome, outcome))
