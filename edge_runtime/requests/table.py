"""The board's requests that wait for a reply: when to send again, and how each of them ends.

A PUBACK says only that a broker took a message, and a server that dies takes its share with it. So a request stays open
until a reply with its id comes, is sent again with the *same* id (servers answer a repeat from their cache), and at its
deadline ends as lost. accepted = answered + lost + open, at every moment.

Pure: time is an argument (seconds on any one clock that never goes back), so is the source of jitter. One thread.
"""

import random
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Any, Generic, TypeVar

T = TypeVar("T")

ENDED = 4096  # requests whose end is remembered, some hundred bytes each
SAMPLES = 64  # reply times that the resend interval is made of: some seconds of a busy board
MAX_DOUBLINGS = 16
# Waits after "busy" are no shorter than the first, doubled each time up to the second, whatever the server says: one
# that says 1 ms would be asked hundreds of times a second.
MIN_BUSY_S, MAX_BUSY_S = 0.05, 3.2


@dataclass(frozen=True, slots=True)
class Open(Generic[T]):
    """A request that waits. `content` is the caller's: what to send again, and whom to tell."""

    id: bytes
    content: T
    opened_at: float
    deadline: float
    resend_at: float
    sends: int = 1
    doublings: int = 0  # of its resend interval
    busy: int = 0  # replies that said so
    was_told: bool = False  # when to send again, by the latest of those


@dataclass(frozen=True, slots=True)
class Lost(Generic[T]):
    """A request that ended without a reply, and why."""

    id: bytes
    content: T
    reason: str


@dataclass(frozen=True, slots=True)
class Counts:
    """accepted = answered + lost + open. The rest explains them."""

    accepted: int
    answered: int
    lost: int
    open: int
    resent: int
    busy: int  # "come again later" from a server
    duplicate: int  # replies to what was answered before
    late: int  # replies to what was lost before
    unknown: int  # replies to nothing we remember


class OpenRequests(Generic[T]):
    """At most `capacity` open requests; one more is lost at once, unsent.

    Those that wait are nearer to their answer, and link and server have worked for them already: to drop the oldest
    instead would, where a server is slower than its boards, end each request shortly before its reply.
    """

    def __init__(self, capacity: int, *, min_resend_s: float = 3.0, rng: random.Random) -> None:
        if capacity < 1 or min_resend_s <= 0:
            raise ValueError(f"capacity = {capacity}, min_resend_s = {min_resend_s}: want at least 1, and more than 0")
        self._capacity, self._min_resend_s, self._rng = capacity, min_resend_s, rng
        self._open: dict[bytes, Open[T]] = {}  # in the order of opening
        self._ended: OrderedDict[bytes, str] = OrderedDict()  # id -> what a further reply is; the latest ENDED
        self._reply_times: deque[float] = deque(maxlen=SAMPLES)
        self._doublings = 0  # that the next request begins with
        self._counts: Counter[str] = Counter()

    def open(self, request_id: bytes, content: T, deadline: float, now: float) -> Lost[T] | None:
        """Take a request that is to be sent now; not None: there is no room. ValueError: the id is open already."""
        if request_id in self._open:
            raise ValueError(f"request {request_id.hex()} is open already: ids are used once")
        self._counts["accepted"] += 1
        is_full = len(self._open) >= self._capacity
        resend_at = now + self._interval(self._doublings)
        self._open[request_id] = Open(request_id, content, now, deadline, resend_at, doublings=self._doublings)
        return self._lose(request_id, f"{self._capacity} requests wait already") if is_full else None

    def find(self, request_id: bytes) -> Open[T] | None:
        """An open request."""
        return self._open.get(request_id)

    def has_ended(self, request_id: bytes) -> bool:
        """Whether it was answered or lost, as far as that is remembered."""
        return request_id in self._ended

    def due(self, now: float) -> list[Open[T]]:
        """What to send again now, with the same id. Each is counted as sent, see `unsent`; call `expired` first."""
        due = [entry for entry in self._open.values() if entry.resend_at <= now < entry.deadline]
        for entry in due:
            doublings = entry.doublings + (not entry.was_told)  # a server that says busy is not silent
            resend_at = now + self._interval(doublings)
            self._change(entry, resend_at=resend_at, sends=entry.sends + 1, doublings=doublings, was_told=False)
        self._counts["resent"] += len(due)
        return due

    def unsent(self, request_id: bytes) -> None:
        """What `due` gave was not sent after all: it waits on as if it had been, and is not counted."""
        entry = self._open[request_id]
        self._change(entry, sends=entry.sends - 1)
        self._counts["resent"] -= 1

    def answered(self, request_id: bytes, now: float) -> Open[T] | None:
        """End a request by its reply. None: the reply is a duplicate, late, or to nothing we know; and counted so."""
        entry = self._open.pop(request_id, None)
        if entry is None:
            self._counts[self._ended.get(request_id, "unknown")] += 1
            return None
        self._counts["answered"] += 1
        self._remember(request_id, "duplicate")
        if entry.sends == 1:  # else nobody knows which copy was answered: Karn's rule, RFC 6298, section 3
            self._reply_times.append(now - entry.opened_at)
            self._doublings = 0
        else:
            # Its second half, Karn and Partridge 1987, RFC 6298, 5.5 to 5.7: the longer interval stays until one is
            # answered within it, or replies that always take longer would never be measured, and all be asked twice.
            # Silence says nothing of that kind: after an outage requests are sent again as quickly as before.
            self._doublings = max(self._doublings, entry.doublings)
        return entry

    def busy(self, request_id: bytes, retry_after_s: float, now: float) -> bool:
        """A server wants to be asked later: the request stays open. False: not open, counted as `answered` does."""
        entry = self._open.get(request_id)
        if entry is None:
            self._counts[self._ended.get(request_id, "unknown")] += 1
            return False
        self._counts["busy"] += 1
        # Later than told, never earlier, and not all boards in the same moment. Never counted as sent once again:
        # the copy that comes next says nothing about the reply time of the first.
        wait_s = max(retry_after_s, min(MIN_BUSY_S * 2.0**entry.busy, MAX_BUSY_S)) * self._rng.uniform(1, 1.5)
        busy = min(entry.busy + 1, MAX_DOUBLINGS)
        self._change(entry, resend_at=now + wait_s, sends=max(entry.sends, 2), busy=busy, was_told=True)
        return True

    def expired(self, now: float) -> list[Lost[T]]:
        """End what has passed its deadline."""
        late = [entry for entry in self._open.values() if entry.deadline <= now]
        return [self._lose(entry.id, f"no reply to {entry.sends} sent") for entry in late]

    def lose(self, request_id: bytes, reason: str) -> Lost[T] | None:
        """End one request for a reason of the caller's, such as a refusal by the broker. None: it is not open."""
        return self._lose(request_id, reason) if request_id in self._open else None

    def close(self, reason: str = "closed") -> list[Lost[T]]:
        """End all."""
        return [self._lose(request_id, reason) for request_id in list(self._open)]

    def next_at(self) -> float:
        """When `expired` or `due` will next have something; inf when nothing is open."""
        return min((min(entry.resend_at, entry.deadline) for entry in self._open.values()), default=inf)

    @property
    def counts(self) -> Counts:
        names = ("accepted", "answered", "lost", "resent", "busy", "duplicate", "late", "unknown")
        return Counts(open=len(self._open), **{name: self._counts[name] for name in names})

    def _lose(self, request_id: bytes, reason: str) -> Lost[T]:
        entry = self._open.pop(request_id)
        self._counts["lost"] += 1
        self._remember(request_id, "late")
        return Lost(request_id, entry.content, reason)

    def _remember(self, request_id: bytes, meaning: str) -> None:
        self._ended[request_id] = meaning
        self._ended.move_to_end(request_id)
        if len(self._ended) > ENDED:
            self._ended.popitem(last=False)

    def _change(self, entry: Open[T], **changes: Any) -> None:
        self._open[entry.id] = replace(entry, **changes)

    def _interval(self, doublings: int) -> float:
        """Seconds to wait for a reply: four times what nearly all replies take, so often doubled."""
        times = sorted(self._reply_times)
        p95 = times[ceil(0.95 * len(times)) - 1] if times else 0.0
        return max(self._min_resend_s, 4 * p95) * 2.0 ** min(doublings, MAX_DOUBLINGS) * self._rng.uniform(1, 1.5)
