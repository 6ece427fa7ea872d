"""The byte budget of the last minute, kept exactly, whatever the policy expected. Any thread."""

import threading
from collections import deque

MINUTE_S = 60.0
STEP_S = 0.1  # bytes sent within one step count as sent at its end: at most 600 entries


class ByteBudget:
    """Bytes of request payloads that were sent, resends and retries included."""

    def __init__(self, bytes_per_minute: int = 0) -> None:
        """bytes_per_minute: at most so many in any 60 s; 0: no limit."""
        self.bytes_per_minute = bytes_per_minute
        self._entries: deque[tuple[float, int]] = deque()  # (when, at the latest; bytes)
        self._sum = 0
        self._lock = threading.Lock()

    def take(self, size: int, now: float) -> bool:
        """Spend `size` bytes. False: they do not fit into this minute, and must not be sent.

        now: seconds of one clock that never goes back.
        """
        with self._lock:
            now = max(now, self._entries[-1][0] if self._entries else now)  # two threads, each a little late
            self._forget(now)
            if self.bytes_per_minute and self._sum + size > self.bytes_per_minute:
                return False
            if self._entries and now // STEP_S == self._entries[-1][0] // STEP_S:
                size_before = self._entries.pop()[1]
                self._entries.append((now, size_before + size))
            else:
                self._entries.append((now, size))
            self._sum += size
            return True

    def refund(self, size: int, now: float) -> None:
        """Bytes that were taken a moment ago have not been sent after all."""
        with self._lock:
            self._forget(now)
            latest, taken = self._entries[-1][0] if self._entries else now, 0
            while self._entries and taken < size:  # others may have been taken since
                taken += self._entries.pop()[1]
            self._entries.append((latest, max(0, taken - size)))  # never earlier than it was sent
            self._sum -= min(size, taken)

    def spent(self, now: float, within_s: float = MINUTE_S) -> int:
        """Bytes sent in the last `within_s` seconds, at most a minute."""
        with self._lock:
            self._forget(now)
            return sum(size for at, size in self._entries if now - at < within_s)

    def _forget(self, now: float) -> None:
        while self._entries and now - self._entries[0][0] >= MINUTE_S:
            self._sum -= self._entries.popleft()[1]
