"""How long the engine's batches take: the prices that a server publishes, and when the present batch takes too long.

Written by the threads that call the target, read by any. Its clock is the caller's.
"""

import statistics
import threading
from collections import deque

RECENT = 64  # batches that the medians are made of
LATE_S = 10.0  # a batch that takes longer than this, and than so many usual batches, hangs:
LATE_BATCHES = 20


class BatchTimes:
    """All times are in milliseconds, except those of the clock, which are in seconds."""

    def __init__(self, call_s: float = 0.0) -> None:
        """call_s: a batch that takes no longer than this does not hang, whatever batches usually take."""
        self._call_s = call_s
        self._recent = {name: deque[float]([], RECENT) for name in ("batch", "pass")}
        self._count, self._total_s = 0, 0.0  # of all batches that were served
        self._present: dict[int, tuple[float, float]] = {}  # by thread: when its batch began, and made its last step
        self._lock = threading.Lock()

    def begin(self, now: float) -> None:
        with self._lock:
            self._present[threading.get_ident()] = now, now

    def step(self, now: float) -> None:
        """This thread's batch has made a step."""
        with self._lock:
            if present := self._present.get(threading.get_ident()):
                self._present[threading.get_ident()] = present[0], now

    def end(self) -> None:
        """This thread's batch has ended, whatever became of it."""
        with self._lock:
            self._present.pop(threading.get_ident(), None)

    def add(self, batch_ms: float, pass_ms: float) -> None:
        """What a batch took that was served, and each pass of it."""
        with self._lock:
            self._recent["batch"].append(batch_ms)
            self._recent["pass"].append(pass_ms)
            self._count, self._total_s = self._count + 1, self._total_s + batch_ms / 1e3

    def totals(self) -> tuple[int, float]:
        """Batches that were served, and the seconds that they took."""
        with self._lock:
            return self._count, self._total_s

    def medians_ms(self) -> dict[str, float]:
        """Of a batch and of a pass; 0: not known."""
        with self._lock:
            return {name: round(statistics.median(recent or [0.0]), 2) for name, recent in self._recent.items()}

    def busy_s(self, now: float) -> float:
        """For how long the oldest present batch has been running; 0: there is none."""
        with self._lock:
            return now - min((began for began, _ in self._present.values()), default=now)

    def silent_s(self, now: float) -> float:
        """The longest time since a present batch made a step; 0: there is none."""
        with self._lock:
            return now - min((stepped for _, stepped in self._present.values()), default=now)

    def is_late(self, now: float) -> bool:
        """The engine seems to hang: its present batch takes far longer than batches do."""
        busy_s = self.busy_s(now)
        return busy_s > max(LATE_S, self._call_s) and busy_s > LATE_BATCHES * self.medians_ms()["batch"] / 1e3
