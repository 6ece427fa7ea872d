"""How sure a draft must be to need no server: from a draft's confidence to what it is worth beside the verified text.

The confidence that a draft decoder states says little by itself: what a draft is worth only rises with it. Worth is a
ratio of scores against people's captions, such as CIDEr: of the drafts of about such a confidence, to the verified
texts of the same photos. How many drafts equal the verified text would tell less, as two good captions seldom share
every word. The ratios are fitted by a function that only rises (isotonic regression by pooling adjacent violators:
Ayer et al., Annals of Mathematical Statistics 26, 1955; for classifiers Zadrozny and Elkan, KDD 2002), which travels
with the bundle as a short table.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from math import isfinite
from typing import NamedTuple

from edge_runtime.errors import AiflowError

MAX_POINTS = 64
BIN = 32  # samples: fewer say little about a ratio
MOST = 0.99  # that any draft is worth: whoever asks for 1 wants each one verified

Table = tuple[tuple[float, float], ...]  # (confidence, worth), both 0..1


class CalibrationError(AiflowError, ValueError):
    """A table that is none, or samples that make none."""


class Calibration:
    """A piecewise linear, never falling function; without a table it is 0 everywhere, and no draft ever stands."""

    def __init__(self, table: Sequence[tuple[float, float]] = ()) -> None:
        """Points (confidence, worth) by rising confidence. Raises CalibrationError."""
        points = tuple((float(x), float(y)) for x, y in table)
        if len(points) > MAX_POINTS or not all(0 <= value <= 1 for point in points for value in point):
            raise CalibrationError(f"calibration of {len(points)} points, want at most {MAX_POINTS} of numbers 0..1")
        for (x, y), (next_x, next_y) in pairwise(points):
            if next_x <= x or next_y < y:
                raise CalibrationError(
                    f"calibration has ({next_x}, {next_y}) after ({x}, {y}): confidence must rise and worth never fall"
                )
        self._points = points

    def worth(self, confidence: float) -> float:
        """Of a draft, as a share of the verified text's, 0..1; 0 for what is no number. Below the first point it falls
        to 0.
        """
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


def fit(
    confidences: Sequence[float],
    drafts: Sequence[float],
    verified: Sequence[float],
    samples_per_bin: int = BIN,
) -> Table:
    """The table of drafts with these confidences, 0..1, from their scores and the verified texts', >= 0.

    A bin's ratio is that of its sums, with two samples more of the mean verified score, one of them with a draft worth
    nothing (Laplace's rule): a few good drafts are no certainty. Empty where no verified text has a score. Raises
    CalibrationError.
    """
    samples = sorted(zip(confidences, drafts, verified, strict=True))
    are_scores = all(isfinite(score) and score >= 0 for sample in samples for score in sample[1:])
    if not samples or not all(0 <= sample[0] <= 1 for sample in samples) or not are_scores:
        raise CalibrationError(f"{len(samples)} samples, want some, each a confidence from 0 to 1 and scores >= 0")
    if not (mean := sum(score for _, _, score in samples) / len(samples)):
        return ()
    count = max(1, min(MAX_POINTS, len(samples) // samples_per_bin))
    edges = [round(number * len(samples) / count) for number in range(count + 1)]
    pools: list[_Pool] = []
    for low, high in pairwise(edges):
        confidence, draft, whole = (sum(values) for values in zip(*samples[low:high], strict=True))
        pool = _Pool(high - low, confidence, draft + mean, whole + 2 * mean)
        while pools and not (pools[-1].point[0] < pool.point[0] and pools[-1].point[1] < pool.point[1]):
            pool = pools.pop().joined(pool)
        pools.append(pool)
    return tuple(pool.point for pool in pools)


class _Pool(NamedTuple):
    """Neighbouring bins that share one ratio. Sums over the samples."""

    samples: int
    confidence: float
    draft: float
    verified: float

    @property
    def point(self) -> tuple[float, float]:
        return min(1.0, self.confidence / self.samples), min(MOST, self.draft / self.verified)

    def joined(self, other: "_Pool") -> "_Pool":
        return _Pool(
            self.samples + other.samples,
            self.confidence + other.confidence,
            self.draft + other.draft,
            self.verified + other.verified,
        )
