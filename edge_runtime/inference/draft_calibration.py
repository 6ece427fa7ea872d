"""Predicts the quality of a draft from its confidence, to decide whether it needs verification.

The confidence that a draft decoder states is not a quality. It only rises with it. Here, quality is a ratio of scores
against captions written by people, such as CIDEr: the scores of drafts of about this confidence, divided by the scores
of the server's texts for the same photos. (Counting the drafts that equal the server's text would say less: two good
captions seldom have every word in common.)

The ratios are fitted by isotonic regression, by pooling adjacent violators (Ayer et al., Annals of Mathematical
Statistics 26, 1955; for classifiers Zadrozny and Elkan, KDD 2002). The result is a short table in the bundle.
"""

import struct
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from math import inf, isfinite
from operator import add
from typing import NamedTuple

import numpy as np

from edge_runtime.errors import ConfigError

MAX_POINTS = 64
SAMPLES_PER_BIN = 32  # fewer say little about a ratio
MAX_QUALITY = 0.99  # of any draft, so that a quality floor of 1 verifies each one

Table = tuple[tuple[float, float], ...]  # (confidence, quality), both 0..1


class Calibration:
    """A piecewise linear function that never falls. Without a table, the predicted quality is 0 everywhere."""

    def __init__(self, table: Sequence[tuple[float, float]] = ()) -> None:
        """Points (confidence, quality) by rising confidence. Raises ConfigError."""
        points = tuple((float(x), float(y)) for x, y in table)
        if len(points) > MAX_POINTS or not all(0 <= value <= 1 for point in points for value in point):
            raise ConfigError(f"calibration of {len(points)} points, want at most {MAX_POINTS} of numbers 0..1")
        for (x, y), (next_x, next_y) in pairwise(points):
            if next_x <= x or next_y < y:
                raise ConfigError(
                    f"calibration: ({next_x}, {next_y}) after ({x}, {y}): both must rise, quality may stay"
                )
        self._confidences, self._qualities = np.array([(0.0, 0.0), *points]).T

    def predicted_quality(self, confidence: float) -> float:
        """Of a draft, as a fraction of the quality of the server's text, 0..1. 0 for NaN and infinity.

        Below the first point it falls to 0 at confidence 0.
        """
        if not isfinite(confidence):
            return 0.0
        quality = float(np.interp(confidence, self._confidences, self._qualities))
        # A slope between the smallest of floats may be infinite, so the next point bounds it.
        following = min(int(np.searchsorted(self._confidences, confidence, "right")), len(self._qualities) - 1)
        return min(quality, float(self._qualities[following]))

    def min_confidence(self, quality_floor: float) -> float:
        """The least confidence whose predicted quality is above 0 and at least quality_floor; inf if there is none.

        Exact: a bisection over all floats from 0 to 1, which sort like their bits.
        """

        def is_enough(bits: int) -> bool:
            quality = self.predicted_quality(_float(bits))
            return quality > 0 and quality >= quality_floor

        (one,) = struct.unpack("<q", struct.pack("<d", 1.0))
        bits = bisect_left(range(one + 1), True, key=is_enough)
        return _float(bits) if bits <= one else inf


def _float(bits: int) -> float:
    (value,) = struct.unpack("<d", struct.pack("<q", bits))
    return float(value)


def fit(
    confidences: Sequence[float],
    drafts: Sequence[float],
    verified: Sequence[float],
    samples_per_bin: int = SAMPLES_PER_BIN,
) -> Table:
    """The table for drafts with these confidences, 0..1, from their scores and the scores of the verified texts, >= 0.

    The ratio of a bin is the ratio of its sums. Two samples with the mean verified score are added to each bin, one of
    them with a draft of score 0 (Laplace's rule), so that a few good drafts do not look like a certainty. Empty if no
    verified text has a score above 0. Raises ConfigError.
    """
    samples = sorted(zip(confidences, drafts, verified, strict=True))
    are_scores = all(isfinite(score) and score >= 0 for sample in samples for score in sample[1:])
    if not samples or not all(0 <= sample[0] <= 1 for sample in samples) or not are_scores:
        raise ConfigError(f"{len(samples)} samples, want some, each a confidence from 0 to 1 and scores >= 0")
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
    """Neighbouring bins with one ratio: sums over their samples."""

    samples: float
    confidence: float
    draft: float
    verified: float

    @property
    def point(self) -> tuple[float, float]:
        return min(1.0, self.confidence / self.samples), min(MAX_QUALITY, self.draft / self.verified)

    def joined(self, other: "_Pool") -> "_Pool":
        return _Pool(*map(add, self, other))
