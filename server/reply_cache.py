"""Replies by (board, request id), so that a request that comes again is answered again and not computed again.

A board repeats a request when no reply came: the request may have been lost, or still be in work here, or the reply may
have been lost. `begin` says which. Knows nothing of MQTT and of what the bytes mean. May be used by several threads.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

Key = tuple[str, bytes]  # board, request id


@dataclass(frozen=True, slots=True)
class New:
    """Never seen, or forgotten: compute it, then `put` the reply or `forget` the request."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """In work since an earlier copy came: its reply will serve both."""


@dataclass(frozen=True, slots=True)
class Cached:
    reply: bytes


class ReplyCache:
    """Bounds: replies, their bytes, and their age in seconds; what came first goes first.

    The defaults keep 300 replies a second, of up to 512 bytes, for 50 s: longer than boards go on asking.
    max_flight_s: what has been in work for longer is taken for dead, so that a crash of the engine cannot make
    a request unanswerable.
    """

    def __init__(
        self,
        max_replies: int = 16384,
        max_bytes: int = 8 << 20,
        max_age_s: float = 600.0,
        max_flight_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_replies, self._max_bytes = max_replies, max_bytes
        self._max_age_s, self._max_flight_s, self._clock = max_age_s, max_flight_s, clock
        self._lock = threading.Lock()
        self._replies: OrderedDict[Key, tuple[bytes, float]] = OrderedDict()  # reply, when; the oldest first
        self._bytes = 0
        self._in_flight: OrderedDict[Key, float] = OrderedDict()  # since when; the oldest first

    def begin(self, board: str, request_id: bytes) -> New | InFlight | Cached:
        """Ask before computing. New: the request is in flight from now on."""
        key = (board, request_id)
        with self._lock:
            self._drop_old()
            if key in self._replies:
                return Cached(self._replies[key][0])
            if key in self._in_flight:
                return InFlight()
            self._in_flight[key] = self._clock()
            return New()

    def get(self, board: str, request_id: bytes) -> bytes | None:
        """The reply, where there is one; starts nothing."""
        with self._lock:
            self._drop_old()
            reply, _ = self._replies.get((board, request_id), (None, 0.0))
            return reply

    def put(self, board: str, request_id: bytes, reply: bytes) -> None:
        """Keep a reply; the request is in flight no longer. A second reply takes the place of the first."""
        key = (board, request_id)
        with self._lock:
            self._in_flight.pop(key, None)
            self._remove(key)
            self._replies[key] = (reply, self._clock())
            self._bytes += len(reply)
            self._drop_old()

    def forget(self, board: str, request_id: bytes) -> None:
        """It ended in something that must not be repeated, such as "busy": the next copy is new."""
        with self._lock:
            self._in_flight.pop((board, request_id), None)

    def __len__(self) -> int:
        """Replies kept."""
        return len(self._replies)

    def _remove(self, key: Key) -> None:
        reply, _ = self._replies.pop(key, (b"", 0.0))
        self._bytes -= len(reply)

    def _drop_old(self) -> None:
        now = self._clock()
        while self._replies:
            key, (_, at) = next(iter(self._replies.items()))
            is_within = len(self._replies) <= self._max_replies and self._bytes <= self._max_bytes
            if is_within and now - at <= self._max_age_s:
                break
            self._remove(key)
        while self._in_flight:
            key, since = next(iter(self._in_flight.items()))
            # Each in flight holds a place in the server's own bounded queue; the count is a second bound on that.
            if now - since <= self._max_flight_s and len(self._in_flight) <= self._max_replies:
                break
            del self._in_flight[key]
