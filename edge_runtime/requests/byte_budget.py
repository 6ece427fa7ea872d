"""What the board may send, and has sent: the byte budget of the last minute, kept exactly.

Whoever lets a request leave takes its bytes first: the frame path for a new one, the answers' thread for one that is
sent or asked again. So the budget holds at every moment, whatever the policy expected. Any thread.
"""

import threading
from collections import deque

MINUTE_S = 60.0
STEP_S = 0.1  # what is sent within it counts as sent at its end: at most 600 entries


class Ledger:
    """Bytes of request payloads, resends and replays included."""

    def __init__(self, bytes_per_minute: int = 0) -> None:
        """bytes_per_minute: in any 60 s; 0: no limit."""
        self.bytes_per_minute = bytes_per_minute
        self._entries: deque[tuple[float, int]] = deque()  # (latest, bytes)
        self._sum = 0
        self._lock = threading.Lock()

    def take(self, size: int, now: float) -> bool:
        """So many bytes are sent now; False, and they must not be, where the budget has no room for them.

        now: seconds of one clock that never steps back.
        """
        with self._lock:
            now = max(now, self._entries[-1][0] if self._entries else now)  # two threads, each a little late
            self._forget(now)
            if self.bytes_per_minute and self._sum + size > self.bytes_per_minute:
                return False
            if self._entries and now // STEP_S == self._entries[-1][0] // STEP_S:
                _, before = self._entries.pop()
                self._entries.append((now, before + size))
            else:
                self._entries.append((now, size))
            self._sum += size
            return True

    def spent(self, now: float, within_s: float = MINUTE_S) -> int:
        """Bytes sent lately; within_s: at most a minute."""
        with self._lock:
            self._forget(now)
            return sum(size for at, size in self._entries if now - at < within_s)

    def _forget(self, now: float) -> None:
        while self._entries and now - self._entries[0][0] >= MINUTE_S:
            self._sum -= self._entries.popleft()[1]
