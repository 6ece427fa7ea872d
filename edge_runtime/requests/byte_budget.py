"""The byte budget: how many bytes of requests the board may send per minute, and how many it has sent.

Whoever sends a request takes its bytes from the budget first, also for a request that is sent again. So the budget
holds at every moment, whatever the policy expected. Any thread may call it.
"""

import threading
from collections import deque

MINUTE_S = 60.0
STEP_S = 0.1  # sends within one step share an entry with the latest time: at most 600 entries


class ByteBudget:
    """Counts whole request payloads."""

    def __init__(self, bytes_per_minute: int = 0) -> None:
        """bytes_per_minute: the limit for any 60 s; 0: no limit."""
        self.bytes_per_minute = bytes_per_minute
        self._entries: deque[tuple[float, int]] = deque()  # (when, bytes)
        self._sum = 0
        self._lock = threading.Lock()

    def take(self, size: int, now: float) -> bool:
        """Takes `size` bytes. False: they do not fit into this minute's budget and must not be sent.

        now: seconds of one clock that never steps back.
        """
        with self._lock:
            now = max(now, self._entries[-1][0] if self._entries else now)  # another thread read the clock later
            self._forget(now)
            if self.bytes_per_minute and self._sum + size > self.bytes_per_minute:
                return False
            self._sum += size
            if self._entries and now // STEP_S == self._entries[-1][0] // STEP_S:
                size += self._entries.pop()[1]
            self._entries.append((now, size))
            return True

    def spent(self, now: float, within_s: float = MINUTE_S) -> int:
        """Bytes taken in the last within_s seconds, at most 60."""
        with self._lock:
            self._forget(now)
            return sum(size for at, size in self._entries if now - at < within_s)

    def _forget(self, now: float) -> None:
        while self._entries and now - self._entries[0][0] >= MINUTE_S:
            self._sum -= self._entries.popleft()[1]
