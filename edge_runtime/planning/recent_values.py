"""Statistics over the latest values of one quantity. None: no value is known."""

import statistics
from collections import deque
from math import inf


class RecentValues:
    """At most `count` values, each for at most max_age_s seconds."""

    # With nine values the median follows a change after five of them, and two outliers do not move it.
    def __init__(self, count: int = 9, max_age_s: float = inf) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=count)  # (when, value)
        self._max_age_s = max_age_s

    def add(self, value: float, now: float) -> None:
        self._values.append((now, value))

    def median(self, now: float) -> float | None:
        values = self._recent(now)
        return statistics.median(values) if values else None

    def mean(self, now: float) -> float | None:
        values = self._recent(now)
        return statistics.fmean(values) if values else None

    def _recent(self, now: float) -> list[float]:
        return [value for at, value in self._values if now - at <= self._max_age_s]
