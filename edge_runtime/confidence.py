"""How sure a draft must be to need no server: from a draft's confidence to the chance that it is the verified text.

The confidence that a draft decoder states is not a chance: it rises with it, but too high or too low. So the share of
drafts that equalled the verified text, counted on photos by confidence, is fitted by a function that only rises
(isotonic regression by pooling adjacent violators: Ayer et al., Annals of Mathematical Statistics 26, 1955; for
classifiers Zadrozny and Elkan, KDD 2002) and travels with the bundle as a short table.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from math import isfinite
from typing import NamedTuple

MAX_POINTS = 64
BIN = 32  # samples: fewer say little about a share near 1, which is what a quality floor asks for

Table = tuple[tuple[float, float], ...]  # (confidence, chance), both 0..1


class CalibrationError(ValueError):
    """A table that is none, or samples that make none."""


class Calibration:
    """A piecewise linear, never falling function; without a table it is 0 everywhere, and no draft ever stands."""

    def __init__(self, table: Sequence[tuple[float, float]] = ()) -> None:
        """Points (confidence, chance) by rising confidence. Raises CalibrationError."""
        points = tuple((float(x), float(y)) for x, y in table)
        if len(points) > MAX_POINTS or not all(0 <= value <= 1 for point in points for value in point):
            raise CalibrationError(f"calibration of {len(points)} points, want at most {MAX_POINTS} of numbers 0..1")
        for (x, y), (next_x, next_y) in pairwise(points):
            if next_x <= x or next_y < y:
                raise CalibrationError(
                    f"calibration has ({next_x}, {next_y}) after ({x}, {y}): confidence must rise and chance never fall"
                )
        self._points = points

    def chance(self, confidence: float) -> float:
        """Of the draft being the verified text, 0..1; 0 for what is no number. Below the first point it falls to 0."""
        if not self._points or not isfinite(confidence):
            return 0.0
        at = bisect_right(self._points, confidence, key=lambda point: point[0])
        if at == len(self._points):
            return self._points[-1][1]
        low, low_y = self._points[at - 1] if at else (0.0, 0.0)
        high, high_y = self._points[at]
        if confidence <= low:
            return low_y
        return low_y + (high_y - low_y) * (confidence - low) / (high - low)


def fit(confidences: Sequence[float], equal: Sequence[bool], samples_per_bin: int = BIN) -> Table:
    """The table of drafts with these confidences, 0..1, and whether each equalled the verified text.

    Each bin's share is (equal + 1) / (samples + 2), Laplace's rule: 32 of 32 are no certainty. Raises CalibrationError.
    """
    samples = sorted(zip(confidences, equal, strict=True))
    if not samples or not all(0 <= confidence <= 1 for confidence, _ in samples):
        raise CalibrationError(f"{len(samples)} samples, want some, each with a confidence from 0 to 1")
    count = max(1, min(MAX_POINTS, len(samples) // samples_per_bin))
    edges = [round(number * len(samples) / count) for number in range(count + 1)]
    bins = [samples[low:high] for low, high in pairwise(edges)]
    pools: list[_Pool] = []
    for some in bins:
        share = (sum(is_equal for _, is_equal in some) + 1) / (len(some) + 2)
        pool = _Pool(len(some), sum(confidence for confidence, _ in some), len(some) * share)
        while pools and not (pools[-1].point[0] < pool.point[0] and pools[-1].point[1] < pool.point[1]):
            pool = pools.pop().joined(pool)
        pools.append(pool)
    return tuple(pool.point for pool in pools)


class _Pool(NamedTuple):
    """Neighbouring bins that share one chance."""

    samples: int
    confidence: float  # summed over the samples, as the next
    chance: float

    @property
    def point(self) -> tuple[float, float]:
        return min(1.0, self.confidence / self.samples), min(1.0, self.chance / self.samples)

    def joined(self, other: "_Pool") -> "_Pool":
        return _Pool(self.samples + other.samples, self.confidence + other.confidence, self.chance + other.chance)
