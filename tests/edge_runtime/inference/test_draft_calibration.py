"""The calibration over made and arbitrary drafts."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from edge_runtime.inference.draft_calibration import BIN, MAX_POINTS, MOST, Calibration, fit

shares, scores = st.floats(0, 1), st.floats(0, 10)


def overconfident(count: int, seed: int = 0) -> tuple[list[float], list[float], list[float]]:
    """Drafts that are worth the square of what they claim, on photos that are more or less easy."""
    rng = random.Random(seed)
    confidences, easy = [rng.random() for _ in range(count)], [rng.random() for _ in range(count)]
    return confidences, [2 * c**2 * e * rng.random() for c, e in zip(confidences, easy, strict=True)], easy


def test_without_a_table_no_draft_is_worth_anything():
    assert Calibration().worth(1.0) == 0.0


def test_between_points_it_is_linear_and_beyond_them_it_invents_nothing():
    calibration = Calibration([(0.5, 0.2), (0.9, 0.8)])
    assert [calibration.worth(c) for c in (0.0, 0.25, 0.5, 0.7, 0.9, 1.0)] == pytest.approx(
        [0.0, 0.1, 0.2, 0.5, 0.8, 0.8]
    )


@pytest.mark.parametrize("confidence", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_worth_nothing(confidence):
    assert Calibration([(0.0, 0.5), (1.0, 1.0)]).worth(confidence) == 0.0


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
    with pytest.raises(ConfigError, match="calibration"):
        Calibration(table)


def test_a_fit_corrects_drafts_that_think_too_much_of_themselves():
    calibration = Calibration(fit(*overconfident(8000)))
    for confidence in (0.2, 0.5, 0.8, 0.95):
        assert calibration.worth(confidence) == pytest.approx(confidence**2, abs=0.08)


def test_a_few_good_drafts_are_no_certainty():
    assert Calibration(fit([0.9] * BIN, [1.0] * BIN, [1.0] * BIN)).worth(0.9) < 0.98


def test_drafts_that_are_better_than_the_verified_text_are_not_worth_more():
    confidences = [number / 1000 for number in range(1000)]
    assert {worth for _, worth in fit(confidences, [3.0] * 1000, [1.0] * 1000)} == {MOST}


def test_a_confidence_that_says_nothing_becomes_one_worth():
    confidences, _, verified = overconfident(2000)
    drafts = [score / 4 for score in verified]
    assert all(worth == pytest.approx(0.27, abs=0.05) for _, worth in fit(confidences, drafts, verified))


def test_where_no_verified_text_has_a_score_no_draft_is_worth_anything():
    assert fit([0.5, 0.9], [0.0, 1.0], [0.0, 0.0]) == ()


@given(st.lists(st.tuples(shares, scores, scores), min_size=1, max_size=300), st.integers(1, 40))
def test_every_fit_is_a_table_that_never_falls(samples, per_bin):
    table = fit(*zip(*samples, strict=True), per_bin)
    calibration = Calibration(table)  # refuses one that falls
    worths = [calibration.worth(number / 50) for number in range(51)]
    assert worths == sorted(worths)
    assert 0 <= worths[0] <= worths[-1] < 1


@pytest.mark.parametrize(
    "samples", [([], [], []), ([1.5], [0], [0]), ([float("nan")], [0], [0]), ([0.5], [-1], [0]), ([0.5], [0], [1e999])]
)
def test_samples_that_are_none_are_refused_by_name(samples):
    with pytest.raises(ConfigError, match="samples"):
        fit(*samples)
