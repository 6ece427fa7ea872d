"""The calibration, over synthetic and arbitrary drafts."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from edge_runtime.inference.draft_calibration import (
    MAX_POINTS,
    MAX_QUALITY,
    SAMPLES_PER_BIN,
    Calibration,
    fit,
)

shares, scores = st.floats(0, 1), st.floats(0, 10)


def overconfident(count: int, seed: int = 0) -> tuple[list[float], list[float], list[float]]:
    """Drafts whose quality is the square of their confidence, on photos that are more or less easy."""
    rng = random.Random(seed)
    confidences, easy = [rng.random() for _ in range(count)], [rng.random() for _ in range(count)]
    return confidences, [2 * c**2 * e * rng.random() for c, e in zip(confidences, easy, strict=True)], easy


def test_without_a_table_the_predicted_quality_is_0():
    assert Calibration().predicted_quality(1.0) == 0.0


def test_it_is_linear_between_points_and_constant_beyond_the_last():
    calibration = Calibration([(0.5, 0.2), (0.9, 0.8)])
    assert [calibration.predicted_quality(c) for c in (0.0, 0.25, 0.5, 0.7, 0.9, 1.0)] == pytest.approx(
        [0.0, 0.1, 0.2, 0.5, 0.8, 0.8]
    )


@pytest.mark.parametrize("confidence", [float("nan"), float("inf"), -float("inf")])
def test_the_predicted_quality_of_a_confidence_that_is_not_a_number_is_0(confidence):
    assert Calibration([(0.0, 0.5), (1.0, 1.0)]).predicted_quality(confidence) == 0.0


@pytest.mark.parametrize(
    "table",
    [
        [(0.5, 0.5), (0.5, 0.6)],
        [(0.5, 0.5), (0.6, 0.4)],
        [(0.5, 1.5)],
        [(float("nan"), 0.5)],
        [(-0.1, 0.5)],
        [(i / 100, 0.5) for i in range(MAX_POINTS + 1)],
    ],
)
def test_a_table_that_is_not_a_calibration_is_refused(table):
    with pytest.raises(ConfigError, match="calibration"):
        Calibration(table)


def test_a_fit_corrects_overconfident_drafts():
    calibration = Calibration(fit(*overconfident(8000)))
    for confidence in (0.2, 0.5, 0.8, 0.95):
        assert calibration.predicted_quality(confidence) == pytest.approx(confidence**2, abs=0.08)


def test_a_few_good_drafts_are_not_a_certainty():
    assert (
        Calibration(fit([0.9] * SAMPLES_PER_BIN, [1.0] * SAMPLES_PER_BIN, [1.0] * SAMPLES_PER_BIN)).predicted_quality(
            0.9
        )
        < 0.98
    )


def test_the_quality_of_drafts_that_are_better_than_the_verified_text_is_limited():
    confidences = [number / 1000 for number in range(1000)]
    assert {quality for _, quality in fit(confidences, [3.0] * 1000, [1.0] * 1000)} == {MAX_QUALITY}


def test_a_confidence_that_says_nothing_about_quality_becomes_a_constant():
    confidences, _, verified = overconfident(2000)
    drafts = [score / 4 for score in verified]
    assert all(quality == pytest.approx(0.27, abs=0.05) for _, quality in fit(confidences, drafts, verified))


def test_verified_texts_without_a_score_give_an_empty_table():
    assert fit([0.5, 0.9], [0.0, 1.0], [0.0, 0.0]) == ()


@given(st.lists(st.tuples(shares, scores, scores), min_size=1, max_size=300), st.integers(1, 40))
def test_every_fit_is_a_table_that_never_falls(samples, per_bin):
    table = fit(*zip(*samples, strict=True), per_bin)
    calibration = Calibration(table)  # refuses a table that falls
    qualities = [calibration.predicted_quality(number / 50) for number in range(51)]
    assert qualities == sorted(qualities)
    assert 0 <= qualities[0] <= qualities[-1] < 1


@pytest.mark.parametrize(
    "samples", [([], [], []), ([1.5], [0], [0]), ([float("nan")], [0], [0]), ([0.5], [-1], [0]), ([0.5], [0], [1e999])]
)
def test_bad_samples_are_refused(samples):
    with pytest.raises(ConfigError, match="samples"):
        fit(*samples)


tables = st.lists(st.tuples(shares, shares), max_size=8, unique_by=lambda point: point[0]).map(
    lambda points: list(zip(sorted(x for x, _ in points), sorted(y for _, y in points), strict=True))
)


def is_enough(calibration: Calibration, confidence: float, floor: float) -> bool:
    """The condition that min_confidence inverts."""
    quality = calibration.predicted_quality(confidence)
    return quality > 0 and quality >= floor


@given(tables, shares, shares)
def test_exactly_the_drafts_from_the_least_confidence_on_are_good_enough(table, floor, confidence):
    calibration = Calibration(table)
    least = calibration.min_confidence(floor)
    assert (confidence >= least) == is_enough(calibration, confidence, floor)
    if least <= 1:
        assert is_enough(calibration, least, floor)
        assert not is_enough(calibration, math.nextafter(least, -1), floor)


@pytest.mark.parametrize("table", [[(1e-310, 0.1), (1, 1)], [(5e-324, 0.1), (1e-310, 0.2), (1, 0.9)]])
def test_between_the_smallest_of_floats_a_quality_never_falls_either(table):
    qualities = [Calibration(table).predicted_quality(x) for x in (0, 5e-324, 1e-323, 5e-311, 1e-310, 1e-309, 0.5, 1)]
    assert qualities == sorted(qualities)


@given(tables, st.floats(allow_nan=False), st.data())
def test_a_quality_that_is_in_the_table_is_reached_at_its_point(table, confidence, data):
    points = [*table[:7], (1.0, 1.0)] if not table or table[-1][0] < 1 else table
    calibration = Calibration(points)
    x, y = data.draw(st.sampled_from(points))
    least = calibration.min_confidence(y)
    assert least <= x or y == 0
    assert (least <= confidence < math.inf) == is_enough(calibration, confidence, y)


@pytest.mark.parametrize(
    ("floor", "confidence", "accepted"), [(0.9, 0.97, True), (0.9, 0.8, False), (0.0, 0.0, False), (1.0, 1.0, False)]
)
def test_a_draft_is_good_enough_from_the_quality_floor_on(floor, confidence, accepted):
    calibration = Calibration([(0.0, 0.0), (0.95, 0.9), (1.0, 0.99)])
    assert (confidence >= calibration.min_confidence(floor)) is accepted


@pytest.mark.parametrize("floor", [0.0, 0.9, 1.0])
def test_without_a_table_no_draft_is_good_enough(floor):
    assert Calibration().min_confidence(floor) == math.inf
