"""The model of the link, over links that are known exactly."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.link_model import LinkEstimate, LinkModel

LATENT, PICTURE = 430, 12_600


def on_link(size: float, kbit: float, trip_ms: float) -> float:
    return trip_ms + size * 8 / kbit


NB_IOT, WIFI = (20.0, 800.0), (50_000.0, 5.0)


def answer(model: LinkModel, number: int, size: float, ms: float) -> None:
    """One a second, answered at once."""
    model.answered(size, ms, float(number), float(number))


def filled(kbit: float, trip_ms: float, sizes: list[int], start: int = 0) -> LinkModel:
    model = LinkModel()
    for number, size in enumerate(sizes):
        answer(model, start + number, size, on_link(size, kbit, trip_ms))
    return model


def test_nothing_is_known_before_the_first_answer():
    assert LinkModel().estimate(0.0) is None


@pytest.mark.parametrize("link", [NB_IOT, (200.0, 150.0), (1000.0, 90.0), (10_000.0, 45.0), WIFI])
def test_latents_alone_give_bounds_for_a_picture(link):
    seen = filled(*link, [LATENT] * 4).estimate(3.0)
    assert seen is not None
    assert seen.likely_ms(LATENT) == pytest.approx(on_link(LATENT, *link))
    assert seen.best_ms(PICTURE) < on_link(PICTURE, *link) < seen.worst_ms(PICTURE)


@pytest.mark.parametrize("link", [NB_IOT, (200.0, 150.0), (1000.0, 90.0), (10_000.0, 45.0)])
def test_one_picture_determines_the_time_of_every_size(link):
    seen = filled(*link, [LATENT, LATENT, PICTURE, LATENT]).estimate(3.0)
    assert seen is not None
    for size in (100, LATENT, 5000, PICTURE):
        assert seen.likely_ms(size) == pytest.approx(on_link(size, *link), rel=0.02)


def test_more_pictures_make_the_bounds_narrower():
    noisy, rng, spans = LinkModel(), random.Random(0), []
    for number in range(80):
        size = PICTURE if number % 8 == 5 else LATENT
        answer(noisy, number, size, on_link(size, 1000.0, 90.0) * rng.lognormvariate(0, 0.1))
        link = noisy.estimate(float(number))
        spans.append(link.worst_ms(PICTURE) / link.best_ms(PICTURE))
    assert spans[4] - 1 > 2 * (spans[6] - 1) > 4 * (spans[79] - 1)
    assert link.likely_ms(PICTURE) == pytest.approx(on_link(PICTURE, 1000.0, 90.0), rel=0.1)


def test_another_link_is_detected_with_the_second_reply():
    model = filled(*WIFI, [LATENT] * 9)
    answer(model, 9, LATENT, on_link(LATENT, *NB_IOT))
    assert model.estimate(9.0).likely_ms(LATENT) < 10  # one may be late for any reason
    answer(model, 10, LATENT, on_link(LATENT, *NB_IOT))
    assert model.estimate(10.0).likely_ms(LATENT) == pytest.approx(on_link(LATENT, *NB_IOT))
    assert model.changes == 1


def test_one_late_reply_and_jitter_are_not_another_link():
    rng, model = random.Random(0), LinkModel()
    for number in range(300):
        late = 8.0 if number % 7 == 3 else 1.0
        answer(model, number, LATENT, 100 * rng.lognormvariate(0, 0.1) * late)
    assert model.changes == 0
    assert model.estimate(300.0).likely_ms(LATENT) == pytest.approx(100, rel=0.2)


def test_a_known_link_needs_no_second_picture_until_it_is_too_old():
    model = filled(*WIFI, [LATENT, LATENT, PICTURE])
    for number in range(3, 23):
        answer(model, number, LATENT, on_link(LATENT, *(NB_IOT if number < 13 else WIFI)))
    seen = model.estimate(23.0)
    assert seen.likely_ms(PICTURE) == pytest.approx(on_link(PICTURE, *WIFI), rel=0.02)
    assert model.estimate(2000.0).window == LinkEstimate(1.0, 1.0).window  # not known any more


def test_an_overdue_reply_counts_until_a_later_request_is_answered():
    model = filled(*WIFI, [LATENT] * 5)
    model.overdue(LATENT, 5.0, 20.0, 5.02)
    assert model.estimate(5.02).likely_ms(LATENT) < 10
    model.overdue(LATENT, 5.0, 900.0, 5.9)
    assert model.estimate(5.9).likely_ms(LATENT) == 900.0
    model.answered(LATENT, 5.0, 4.0, 6.0)  # one that was sent before
    assert model.estimate(6.0).likely_ms(LATENT) == 900.0
    model.answered(LATENT, 950.0, 5.0, 6.1)
    assert model.estimate(6.1).likely_ms(LATENT) < 900.0


def test_the_slowest_link_is_remembered():
    model = filled(*NB_IOT, [LATENT] * 4)
    for number in range(4, 20):
        answer(model, number, LATENT, on_link(LATENT, *WIFI))
    assert model.slowest(20.0).likely_ms(LATENT) == pytest.approx(on_link(LATENT, *NB_IOT))


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e9), st.floats(0, 1e4)), max_size=40))
def test_predictions_are_finite_and_ordered_for_any_replies(answers):
    model = LinkModel()
    for size, ms, at in answers:
        model.answered(size, ms, at, at)
        model.overdue(size, at, ms, at)
        link = model.estimate(at)
        assert isinstance(link, LinkEstimate)
        best, likely, worst = link.best_ms(PICTURE), link.likely_ms(PICTURE), link.worst_ms(PICTURE)
        assert 0 <= best <= likely * (1 + 1e-9)
        assert likely <= worst * (1 + 1e-9)
        assert math.isfinite(worst)
    assert model.changes <= len(answers) / 2


@given(st.floats(1, 1e4), st.floats(1, 1e5), st.sampled_from([LATENT, PICTURE]), st.integers(1, 1 << 20))
def test_a_larger_request_never_takes_less_time(ms, window, at_bytes, size):
    link = LinkEstimate(ms, at_bytes, window, window, window)
    assert link.best_ms(size) <= link.best_ms(size + 1)
    assert link.worst_ms(size) <= link.worst_ms(size + 1)
