"""The predicted quality of a draft: from the confidence of the draft decoder to a fraction of the server's quality.

The confidence of a draft decoder is no probability that its draft is good: quality only rises with it. The quality here
is a ratio of scores against captions that people wrote, such as CIDEr: of the drafts with about this confidence, to the
verified texts of the same photos. (How many drafts equal the verified text would say less, since two good captions
seldom share every word.) The ratios are fitted by a function that only rises, by pooling adjacent violators (isotonic
regression: Ayer et al., Annals of Mathematical Statistics 26, 1955; for classifiers Zadrozny and Elkan, KDD 2002). The
bundle holds it as a short table.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite
from typing import NamedTuple

import numpy as np

from edge_runtime.errors import ConfigError

MAX_POINTS = 64
BIN = 32  # samples; fewer say little about a ratio
MOST = 0.99  # the largest predicted quality: with quality_floor = 1 each draft is verified

Table = tuple[tuple[float, float], ...]  # (confidence, quality), both 0..1


class Calibration:
    """A piecewise linear function that never falls. Without a table it is 0, and no draft is accepted unverified."""

    def __init__(self, table: Sequence[tuple[float, float]] = ()) -> None:
        """Points (confidence, quality) by rising confidence. Raises ConfigError."""
        points = [(float(x), float(y)) for x, y in table]
        if len(points) > MAX_POINTS or not all(0 <= value <= 1 for point in points for value in point):
            raise ConfigError(f"draft_calibration has {len(points)} points, want at most {MAX_POINTS} of numbers 0..1")
        for (x, y), (next_x, next_y) in pairwise(points):
            if next_x <= x or next_y < y:
                raise ConfigError(
                    f"draft_calibration has ({next_x}, {next_y}) after ({x}, {y}): confidence must rise and quality "
                    "must not fall"
                )
        if not points or points[0][0] > 0:  # below the first point it falls to 0
            points.insert(0, (0.0, 0.0))
        self._confidences, self._qualities = zip(*points, strict=True)

    def worth(self, confidence: float) -> float:
        """The predicted quality of a draft as a fraction of the verified text's, 0..1; 0 if confidence is no number."""
        return float(np.interp(confidence, self._confidences, self._qualities)) if isfinite(confidence) else 0.0


def fit(
    confidences: Sequence[float],
    drafts: Sequence[float],
    verified: Sequence[float],
    samples_per_bin: int = BIN,
) -> Table:
    """The table for drafts with these confidences, 0..1, from their scores and those of the verified texts, >= 0.

    The ratio of a bin is that of its sums, plus two samples with the mean verified score, one of which has a draft of
    quality 0 (Laplace's rule of succession): a few good drafts are no proof. Empty if no verified text has a score.
    Raises ConfigError.
    """
    samples = sorted(zip(confidences, drafts, verified, strict=True))
    are_scores = all(isfinite(score) and score >= 0 for sample in samples for score in sample[1:])
    if not samples or not all(0 <= sample[0] <= 1 for sample in samples) or not are_scores:
        raise ConfigError(f"{len(samples)} samples, want at least one, each a confidence from 0 to 1 and scores >= 0")
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
