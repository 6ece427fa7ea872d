"""Replies by (board, request id), so that a request that comes again is answered again and not computed again.

A board sends a request again if no reply came: the request was lost, or it is still being answered here, or the reply
was lost. `begin` says which. Knows nothing of MQTT and of what the bytes mean. Any number of threads may use it.

Not cachetools.TTLCache: it bounds the number of replies or their bytes, not both, and drops the least recently used.
"""

import threading
import time
from collections.abc import Callable
from enum import Enum

Key = tuple[str, bytes]  # board, request id

MAX_REPLIES = 16_384
MAX_AGE_S = 600.0  # of a reply


class Seen(Enum):
    """What is known of a request without a reply."""

    NEW = 1  # never seen, or forgotten: compute it, then `put` the reply or `forget` the request
    IN_FLIGHT = 2  # it is being answered since an earlier copy came: the reply will do for both


class ReplyCache:
    """Bounds: the number of replies, their bytes, and their age in seconds. The oldest are dropped first.

    The defaults keep 300 replies per second, of up to 512 bytes, for 50 s: longer than boards go on asking.
    max_flight_s: a request that has been in flight for longer counts as new again, so that an engine that breaks cannot
    make it unanswerable.
    """

    def __init__(
        self,
        max_replies: int = MAX_REPLIES,
        max_bytes: int = 8 << 20,
        max_age_s: float = MAX_AGE_S,
        max_flight_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_replies, self._max_bytes = max_replies, max_bytes
        self._max_age_s, self._max_flight_s, self._clock = max_age_s, max_flight_s, clock
        self._lock = threading.Lock()
        self._replies: dict[Key, tuple[bytes, float]] = {}  # reply, when; the oldest first
        self._bytes = 0
        self._in_flight: dict[Key, float] = {}  # since when; the oldest first

    def begin(self, key: Key) -> bytes | Seen:
        """Ask before computing. bytes: the reply. NEW: the request is in flight from now on."""
        with self._lock:
            self._drop_old()
            if key in self._replies:
                return self._replies[key][0]
            if key in self._in_flight:
                return Seen.IN_FLIGHT
            self._in_flight[key] = self._clock()
            return Seen.NEW

    def put(self, key: Key, reply: bytes) -> None:
        """Keeps a reply, and the request is no longer in flight. A second reply replaces the first."""
        with self._lock:
            self._in_flight.pop(key, None)
            self._remove(key)
            self._replies[key] = (reply, self._clock())
            self._bytes += len(reply)
            self._drop_old()

    def forget(self, key: Key) -> None:
        """It ended in something that must not be repeated, such as "busy". The next copy is new."""
        with self._lock:
            self._in_flight.pop(key, None)

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
            # Each request in flight also has a place in the server's bounded queues. This is a second bound.
            if now - since <= self._max_flight_s and len(self._in_flight) <= self._max_replies:
                break
            del self._in_flight[key]
