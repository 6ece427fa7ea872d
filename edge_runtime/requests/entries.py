"""The state of a request that has not ended, and the index of the requests in the outbox: which one is tried next, and
which ones are given up. No I/O; time is an argument. The rules are in lifecycle.py.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import Generic, TypeVar

from edge_runtime.config import OutboxConfig
from edge_runtime.requests.actions import Why
from edge_runtime.wire import Reply

T = TypeVar("T")

MAX_STORED = 65_536  # requests in the outbox; the index takes some 300 bytes of memory for each
# Kept requests are given up (too many, too old) at this rate: each has an event, and live requests come first.
DROPS, DROP_EVERY_S = 16, 0.1


class State(enum.Enum):
    STORING = "storing"  # must be on disk before it is sent
    OPEN = "open"  # sent, waits for a reply
    IMPROVABLE = "improvable"  # has a reply that is not final: a higher tier may answer once more
    KEPT = "kept"  # in the outbox, waits for its next try
    READING = "reading"  # the outbox has been asked for its content


@dataclass(slots=True)
class Entry(Generic[T]):
    """One request that has not ended."""

    id: bytes
    content: T | None  # None while only the outbox has it
    handed_over_at: float  # when the content came
    deadline: float
    state: State
    is_stored: bool = False  # in the outbox
    kept_at: float = 0.0  # when it came there
    size: int = 0  # bytes there
    # In STORING, OPEN and IMPROVABLE:
    sent_at: float = inf  # first, in this try
    resend_at: float = inf
    sends: int = 0  # in this try
    # The time of a reply says nothing: a resend could not leave, the broker refused a copy, or an earlier try was sent.
    is_unclear: bool = False
    is_held_back: bool = False  # a resend of this try could not leave
    doublings: int = 0  # of the resend interval
    copies_asked_for: int = 0  # by replies in this try, so that the copy before each has no other reply
    is_asked_for: bool = False  # the next copy is
    why_not_yet: Why | None = None  # what the latest of these replies said
    unknown_bundle: tuple[str, ...] = ()  # the servers of those replies that say that they lack the bundle
    lost_its_reference: bool = False  # a server has said so: once, of the first copy
    latest: tuple[str, bytes] | None = None  # server and tokens of the latest reply that is not final
    not_final: int = 0  # replies that are not final
    # Of those that were KEPT:
    was_kept: bool = False
    vain_tries: int = 0  # out of the outbox
    retry_at: float = -inf
    late_reply: Reply | None = None  # came while the request was kept
    drop_reason: Why | None = None  # why the outbox gives it up


class StoredEntries(Generic[T]):
    """Those in the outbox, oldest first. Some are open, too: they are few, and stay."""

    def __init__(self, limits: OutboxConfig | None) -> None:
        """limits: None: there is no outbox."""
        self._limits = limits
        self._entries: dict[bytes, Entry[T]] = {}
        self._bytes = 0
        self._drop_at = -inf

    def get(self, request_id: bytes) -> Entry[T] | None:
        return self._entries.get(request_id)

    def add(self, entry: Entry[T]) -> None:
        """Does nothing if it is there."""
        if entry.id not in self._entries:
            self._entries[entry.id] = entry
            self._bytes += entry.size

    def remove(self, entry: Entry[T]) -> None:
        """Does nothing if it is not there."""
        if self._entries.pop(entry.id, None):
            self._bytes -= entry.size

    def sort(self) -> None:
        """After adding those of an earlier run."""
        self._entries = dict(sorted(self._entries.items(), key=lambda pair: pair[1].kept_at))

    def next_retry(self, now: float) -> Entry[T] | None:
        """The oldest one that may be asked again."""
        return next((entry for entry in self._kept() if entry.retry_at <= now), None)

    def drops_at(self) -> float:
        """When `take_drops` has the next ones; inf: never."""
        oldest = next(self._kept(), None)
        if oldest is None or self._limits is None:
            return inf
        return max(self._drop_at, -inf if self._is_too_full() else oldest.kept_at + self._limits.max_age_s)

    def take_drops(self, now: float) -> list[tuple[Entry[T], str]]:
        """Removes kept ones, and says why: the oldest while there are too many, and those too old; some at a time."""
        if self._limits is None or now < self._drop_at:
            return []
        drops: list[tuple[Entry[T], str]] = []
        too_old = now - self._limits.max_age_s
        for entry in list(islice(self._kept(), DROPS)):
            if self._is_too_full() or entry.kept_at <= too_old:
                drops.append((entry, "full" if self._is_too_full() else "too old"))
                self.remove(entry)
        if drops:
            self._drop_at = now + DROP_EVERY_S
        return drops

    def _kept(self) -> Iterator[Entry[T]]:
        return (entry for entry in self._entries.values() if entry.state is State.KEPT)

    def _is_too_full(self) -> bool:
        assert self._limits
        return self._bytes > self._limits.max_bytes or len(self._entries) > MAX_STORED
