"""How long the engine's batches take: the prices that a server publishes, and when the present batch takes too long.

Written by the engine's thread, read by any. Its clock is the caller's.
"""

import statistics
import threading
from collections import deque

RECENT = 64  # batches that the medians are made of
LATE_S = 10.0  # a batch that takes longer than this, and than so many usual batches, hangs:
LATE_BATCHES = 20


class BatchTimes:
    """All times are in milliseconds, except those of the clock, which are in seconds."""

    def __init__(self) -> None:
        self._recent = {name: deque[float]([], RECENT) for name in ("batch", "pass")}
        self._began: float | None = None  # when the present batch began
        self._lock = threading.Lock()

    def begin(self, now: float) -> None:
        self._began = now

    def end(self) -> None:
        """The batch has ended, whatever became of it."""
        self._began = None

    def add(self, batch_ms: float, pass_ms: float) -> None:
        """What a batch took that was served, and each pass of it."""
        with self._lock:
            self._recent["batch"].append(batch_ms)
            self._recent["pass"].append(pass_ms)

    def medians_ms(self) -> dict[str, float]:
        """Of a batch and of a pass; 0: not known."""
        with self._lock:
            return {name: round(statistics.median(recent or [0.0]), 2) for name, recent in self._recent.items()}

    def busy_s(self, now: float) -> float:
        """For how long the engine has been in its present batch; 0: it waits for work."""
        began = self._began
        return 0.0 if began is None else now - began

    def is_late(self, now: float) -> bool:
        """The engine seems to hang: its present batch takes far longer than batches do."""
        busy_s = self.busy_s(now)
        return busy_s > LATE_S and busy_s > LATE_BATCHES * self.medians_ms()["batch"] / 1e3
