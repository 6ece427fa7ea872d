"""Messages that the MQTT client has not sent yet, with two bounds, deadlines, and exactly one outcome per message.

This module knows nothing of MQTT and of clocks: time is an argument, in seconds of any one clock. It is thread-safe.
The lock is held for a few appends and never while a callback runs.
"""

import enum
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import inf

MAX_SENDS = 3  # A message that was in flight when the broker closed this many connections is taken for the cause.


class Outcome(enum.Enum):
    DELIVERED = "delivered"  # the broker acknowledged it; with QoS 0 it was written to the socket
    REFUSED = "refused"  # the broker said no (access list, quota), or closed every connection that carried it
    DROPPED = "dropped"  # the queue was full and this was the oldest, or a newer birth message replaced it
    OVERSIZED = "oversized"  # larger than our own bound or than the broker's Maximum Packet Size
    EXPIRED = "expired"  # its time ran out before an acknowledgement came
    CLOSED = "closed"  # the client was closed first


@dataclass(slots=True, eq=False)
class OutgoingMessage:
    topic: str
    payload: bytes
    qos: int
    retain: bool
    deadline: float = inf
    on_outcome: Callable[[Outcome], None] | None = None
    is_birth: bool = False  # ends with its connection: the next connection sends its own birth messages
    suspicions: int = 0  # connections that the broker closed while this message was in flight


class SendQueue:
    """Messages wait here, are taken into flight, come back when the connection is lost, and end.

    At most max_messages and max_bytes of payload wait; the oldest message makes room. Messages that came back are not
    counted there and are sent first. They are at most what was in flight.
    """

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages, self._max_bytes = max_messages, max_bytes
        self._lock = threading.Lock()
        self._new: deque[OutgoingMessage] = deque()
        self._new_bytes = 0
        self._again: deque[OutgoingMessage] = deque()  # was in flight before; the oldest first
        self._next_deadline = inf  # no waiting message expires earlier
        self._is_closed = False
        self._accepted = 0
        self._outcomes: Counter[Outcome] = Counter()
        # Callbacks to call. This stays short: the client's thread empties it on every pass. No entry holds a payload.
        self._untold: deque[tuple[Callable[[Outcome], None], Outcome]] = deque()

    def accept(self, message: OutgoingMessage, refusal: Outcome | None = None) -> Outcome | None:
        """Take over a message. Returns its outcome if it has ended already, else None.

        refusal: the message ends at once with this outcome. A birth message is only counted, it does not wait here.
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

    def take(self, in_flight: Collection[OutgoingMessage]) -> OutgoingMessage | None:
        """The next message to send while these are in flight.

        Send a suspect message alone. If the connection drops again, this message is the cause.
        """
        with self._lock:
            waiting = self._again or self._new
            if not waiting or (in_flight and (waiting[0].suspicions or any(m.suspicions for m in in_flight))):
                return None
            return self._again.popleft() if self._again else self._pop_new()

    def give_back(self, in_flight: Iterable[OutgoingMessage], by_broker: bool) -> list[OutgoingMessage]:
        """The connection is lost: send these messages first on the next one, in the same order.

        by_broker: the broker closed the connection, so one of these messages may be the cause. Returns the messages
        that ended as REFUSED because they were in flight at MAX_SENDS such losses.
        """
        messages, refused = list(in_flight), []
        with self._lock:
            for message in reversed(messages):
                message.suspicions += by_broker
                if message.is_birth:
                    self._end(message, Outcome.DROPPED)
                elif message.suspicions >= MAX_SENDS:
                    self._end(message, Outcome.REFUSED)
                    refused.append(message)
                else:
                    self._again.appendleft(message)
                    self._next_deadline = min(self._next_deadline, message.deadline)
        return refused

    def end(self, message: OutgoingMessage, outcome: Outcome) -> None:
        """A message that was taken has ended."""
        with self._lock:
            self._end(message, outcome)

    def sweep(self, now: float) -> float:
        """End the waiting messages that have expired. Returns when the next one expires."""
        with self._lock:
            if now >= self._next_deadline:  # deadlines are not sorted: look at all messages
                for message in [m for m in (*self._again, *self._new) if m.deadline <= now]:
                    self._end(message, Outcome.EXPIRED)
                self._again = deque(m for m in self._again if m.deadline > now)
                self._new = deque(m for m in self._new if m.deadline > now)
                self._new_bytes = sum(len(m.payload) for m in self._new)
                self._next_deadline = min((m.deadline for m in (*self._again, *self._new)), default=inf)
            return self._next_deadline

    def close(self) -> None:
        """Messages that come from now on end as CLOSED. Waiting messages may still be taken."""
        with self._lock:
            self._is_closed = True

    def end_all(self) -> None:
        with self._lock:
            while self._again or self._new:
                self._end(self._again.popleft() if self._again else self._pop_new(), Outcome.CLOSED)

    def next_untold(self) -> tuple[Callable[[Outcome], None], Outcome] | None:
        """A callback, and the outcome to call it with."""
        with self._lock:
            return self._untold.popleft() if self._untold else None

    def counts(self) -> dict[str, int]:
        """published = the outcomes + pending (waiting or in flight), at every moment."""
        with self._lock:
            ended = {outcome.value: self._outcomes[outcome] for outcome in Outcome}
            return {"published": self._accepted, "pending": self._accepted - sum(ended.values()), **ended}

    def _pop_new(self) -> OutgoingMessage:
        message = self._new.popleft()
        self._new_bytes -= len(message.payload)
        return message

    def _end(self, message: OutgoingMessage, outcome: Outcome) -> None:
        self._outcomes[outcome] += 1
        if message.on_outcome:
            self._untold.append((message.on_outcome, outcome))
