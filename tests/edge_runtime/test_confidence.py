"""The calibration over made and arbitrary drafts."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.confidence import BIN, MAX_POINTS, Calibration, CalibrationError, fit

shares = st.floats(0, 1)


def overconfident(count: int, seed: int = 0) -> tuple[list[float], list[bool]]:
    """Drafts whose true chance is the square of what they claim."""
    rng = random.Random(seed)
    confidences = [rng.random() for _ in range(count)]
    return confidences, [rng.random() < confidence**2 for confidence in confidences]


def test_without_a_table_no_draft_has_a_chance():
    assert Calibration().chance(1.0) == 0.0


def test_between_points_it_is_linear_and_beyond_them_it_invents_nothing():
    calibration = Calibration([(0.5, 0.2), (0.9, 0.8)])
    assert [calibration.chance(c) for c in (0.0, 0.25, 0.5, 0.7, 0.9, 1.0)] == pytest.approx(
        [0.0, 0.1, 0.2, 0.5, 0.8, 0.8]
    )


@pytest.mark.parametrize("confidence", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_has_no_chance(confidence):
    assert Calibration([(0.0, 0.5), (1.0, 1.0)]).chance(confidence) == 0.0


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
def test_a_table_that_is_none_is_refused_by_name(table):
    with pytest.raises(CalibrationError, match="calibration"):
        Calibration(table)


def test_a_fit_corrects_drafts_that_think_too_much_of_themselves():
    calibration = Calibration(fit(*overconfident(8000)))
    for confidence in (0.2, 0.5, 0.8, 0.95):
        assert calibration.chance(confidence) == pytest.approx(confidence**2, abs=0.08)


def test_few_samples_are_no_certainty():
    assert Calibration(fit([0.9] * BIN, [True] * BIN)).chance(0.9) < 0.98


def test_a_confidence_that_says_nothing_becomes_one_chance():
    confidences, _ = overconfident(2000)
    equal = [number % 4 == 0 for number in range(2000)]
    assert all(chance == pytest.approx(0.25, abs=0.15) for _, chance in fit(sorted(confidences, reverse=True), equal))


@given(st.lists(st.tuples(shares, st.booleans()), min_size=1, max_size=300), st.integers(1, 40))
def test_every_fit_is_a_table_that_never_falls(samples, per_bin):
    confidences, equal = zip(*samples, strict=True)
    table = fit(confidences, equal, per_bin)
    calibration = Calibration(table)  # refuses one that falls
    chances = [calibration.chance(number / 50) for number in range(51)]
    assert chances == sorted(chances)
    assert 0 <= chances[0] <= chances[-1] < 1


@pytest.mark.parametrize("confidences", [[], [1.5], [float("nan")]])
def test_samples_that_are_none_are_refused_by_name(confidences):
    with pytest.raises(CalibrationError, match="samples"):
        fit(confidences, [True] * len(confidences))
