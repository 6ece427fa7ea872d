"""The choice of a token: the law of the softmax behind the filters, and the same token for the same arguments."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.inference.bundle import EOS
from edge_runtime.inference.noise import gumbel
from edge_runtime.inference.sampling import Sampler, sampler_of
from edge_runtime.wire.envelope import GREEDY, Options, seed_of

LOGITS = np.array([-np.inf, 1.0, 0.5, -2.0, 2.0, 2.0, 0.0, -1.0, 1.5, -np.inf], np.float32)
DRAWS = 4000
GOLDEN = [426, 909, 457, 296, 138, 664, 440, 867]


def choose(logits: object, history: tuple[int, ...] = (), seed: int = 1, **settings: object) -> int:
    return Sampler(Options(**settings), seed).choose(np.array(logits, np.float32), history)


def law(logits: np.ndarray, history: tuple[int, ...], settings: Options) -> dict[int, float]:
    """The probability of each token, step by step as docs/protocol.md says it, without arrays."""
    scores = {token: float(value) for token, value in enumerate(logits)}
    for token in set(history):
        factor = settings.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    if len(history) < settings.min_tokens:
        for token in (EOS, *settings.stop):
            scores.pop(token, None)
    scores = {token: score / settings.temperature for token, score in scores.items() if score > -math.inf}
    order = sorted(scores, key=lambda token: (-scores[token], token))[: settings.top_k]
    weights = {token: math.exp(scores[token] - scores[order[0]]) for token in order}
    total, kept, mass = sum(weights.values()), dict[int, float](), 0.0
    for token in order:
        kept[token] = weights[token]
        mass += weights[token]
        if settings.top_p is not None and mass >= settings.top_p * total:
            break
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@pytest.mark.parametrize(
    ("settings", "history"),
    [
        (Options(temperature=1.0), ()),
        (Options(temperature=0.5), (4, 4, 1)),
        (Options(temperature=2.0, top_k=4), ()),
        (Options(temperature=1.0, top_p=0.7), ()),
        (Options(temperature=1.5, top_k=6, top_p=0.8), ()),
        (Options(temperature=1.0, repetition_penalty=1.8), (4, 7, 4)),
        (Options(temperature=1.0, min_tokens=2, stop=(8,)), (5,)),
        (Options(temperature=0.8, top_k=5, top_p=0.9, repetition_penalty=1.3, min_tokens=9, stop=(1,)), (4, 6)),
    ],
)
def test_tokens_have_the_law_of_the_softmax_behind_the_filters(settings: Options, history: tuple[int, ...]) -> None:
    found = Counter(Sampler(settings, seed).choose(LOGITS, history) for seed in range(DRAWS))
    expected = law(LOGITS, history, settings)
    assert set(found) <= set(expected)
    chi_square = sum((found[token] - DRAWS * p) ** 2 / (DRAWS * p) for token, p in expected.items())
    freedom = len(expected) - 1
    assert (chi_square - freedom) / math.sqrt(2 * freedom) < 4


def test_another_law_would_be_found() -> None:
    found = Counter(choose(LOGITS, seed=seed, temperature=1.3) for seed in range(DRAWS))
    expected = law(LOGITS, (), Options(temperature=1.0))
    assert sum((found[token] - DRAWS * p) ** 2 / (DRAWS * p) for token, p in expected.items()) > 50


def test_chosen_tokens_are_golden() -> None:
    """They are what every board, server and version must choose."""
    logits = (np.arange(1000) ** 2 % 1009).astype(np.float32) / 168
    settings = Options(temperature=0.8, top_k=200, top_p=0.95, repetition_penalty=1.2)
    assert list(Sampler(settings, 0x0123456789ABCDEF).choices([logits] * 8, [5, 9])) == GOLDEN


def test_choices_are_the_single_choices_one_after_the_other_and_only_those_that_are_asked_for() -> None:
    sampler = Sampler(Options(temperature=1.0, repetition_penalty=1.5), 3)
    rows = np.random.default_rng(0).normal(0, 2, (6, 30))
    history = [7, 8]
    for row in rows:
        history.append(sampler.choose(row, history))
    assert list(sampler.choices(rows, [7, 8])) == history[2:]
    unread = iter(rows)
    lazy = sampler.choices(unread, [7, 8])
    assert next(lazy) == history[2]
    assert len(list(unread)) == 5


@pytest.mark.parametrize("top_p", [0.0, 1e-300, 0.3])
def test_a_top_p_that_one_token_reaches_leaves_the_likeliest_one(top_p: float) -> None:
    likeliest = [0.0, 1.0, 2.0, 3.0, 9.0, 5.0]
    assert {choose(likeliest, seed=seed, temperature=1.0, top_p=top_p) for seed in range(200)} == {4}


def test_a_top_p_of_one_leaves_every_token_that_has_a_probability() -> None:
    for seed in range(100):
        assert choose(LOGITS, seed=seed, temperature=9.0, top_p=1.0) == choose(LOGITS, seed=seed, temperature=9.0)


@pytest.mark.parametrize(("top_k", "left"), [(1, {4}), (2, {4, 5}), (3, {4, 5, 8}), (8, None), (1 << 20, None)])
def test_of_equal_logits_the_lower_tokens_are_among_the_likeliest(top_k: int, left: set[int] | None) -> None:
    found = {choose(LOGITS, seed=seed, temperature=5.0, top_k=top_k) for seed in range(300)}
    assert found == (left or {1, 2, 3, 4, 5, 6, 7, 8})


def test_with_one_token_left_the_noise_changes_nothing() -> None:
    only = np.full(20, -np.inf)
    only[EOS] = -50.0
    assert {choose(only, seed=seed, temperature=1.0) for seed in range(50)} == {EOS}


def test_a_text_does_not_end_before_its_least_length_even_if_all_mass_is_on_the_end() -> None:
    ending = np.zeros(20)
    ending[EOS] = 1000.0
    for temperature in (0.0, 1.0):
        settings = {"temperature": temperature, "min_tokens": 3, "stop": (7, 1_000_000)}
        found = [choose(ending, (9,) * length, **settings) for length in range(5)]
        assert {EOS, 7}.isdisjoint(found[:3])
        assert found[3:] == [EOS, EOS]


def test_the_end_is_chosen_if_nothing_else_may_be() -> None:
    assert choose([0.0] * 3, temperature=1.0, min_tokens=1, stop=(0, 1)) == EOS


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("settings", [{"temperature": 1.0, "top_k": 3, "top_p": 0.5}, {"min_tokens": 1}])
def test_logits_that_are_no_numbers_choose_the_end_and_warn_of_nothing(bad: float, settings: dict) -> None:
    assert choose([0.0, 1.0, 2.0, bad, 4.0], **settings) == EOS


def test_without_temperature_the_likeliest_token_is_chosen_after_the_penalty() -> None:
    assert choose([0.0, 3.0, 0.0, 2.0], repetition_penalty=1.1) == 1
    assert choose([0.0, 3.0, 0.0, 2.0], (1,), repetition_penalty=1.6) == 3
    assert choose([-5.0, -1.0, -5.0, -1.5], (1, 1), repetition_penalty=2.0) == 3


@given(st.floats(0, 100), st.floats(1, 10), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**63 - 1))
def test_any_settings_choose_a_token_that_may_be_chosen(temperature, penalty, top_k, top_p, seed) -> None:
    settings = {"temperature": temperature, "repetition_penalty": penalty, "top_k": top_k, "top_p": top_p}
    extreme = np.array([-np.inf, 3e38, -3e38, 1e-38, 0.0, 7.0], np.float32)
    assert choose(extreme, (1, 2), seed=seed, **settings) in {1, 2, 3, 4, 5}


def test_plain_greedy_decoding_needs_no_sampler() -> None:
    for settings in (None, GREEDY, Options(temperature=0.0009, top_k=3, top_p=0.1, seed=4)):
        assert sampler_of(settings, 1) is None
    for settings in (Options(temperature=0.001), Options(min_tokens=1), Options(stop=(4,))):
        assert sampler_of(settings, 1) == Sampler(settings, 1)


def test_the_seed_is_the_requests_own_or_its_id() -> None:
    assert seed_of(Options(seed=0), b"12345678") == 0
    assert seed_of(GREEDY, (5 << 60 | 77).to_bytes(8, "big")) == seed_of(None, bytes(7) + b"\x4d") + (5 << 60)
    assert seed_of(None, b"\xff" * 8) == (1 << 63) - 1


# ---- a draft with the same noise (docs/adr/0028): theory, and why no other rule may verify it ----

P, Q = np.array([0.1, 0.6, 0.3]), np.array([0.5, 0.3, 0.2])  # the target's law and the draft's


def drawn(law: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return (np.log(law) + noise).argmax(1)


def test_a_draft_with_the_same_noise_is_accepted_as_often_as_the_formula_says() -> None:
    """Daliri, Musco & Suresh, arXiv 2408.07978: the sum over i of 1 / sum over j of max(p_j / p_i, q_j / q_i)."""
    noise = gumbel(1, 0, np.arange(3 * 100_000)).reshape(-1, 3)
    for q in (Q, P, np.array([0.2, 0.5, 0.3])):
        expected = sum(1 / sum(max(P[j] / P[i], q[j] / q[i]) for j in range(3)) for i in range(3))
        distance = np.abs(P - q).sum() / 2
        assert (1 - distance) / (1 + distance) - 1e-12 <= expected <= 1 - distance + 1e-12
        assert (drawn(P, noise) == drawn(q, noise)).mean() == pytest.approx(expected, abs=0.006)
    own = gumbel(2, 0, np.arange(3 * 100_000)).reshape(-1, 3)
    assert (drawn(P, noise) == drawn(P, own)).mean() == pytest.approx((P**2).sum(), abs=0.006)  # much rarer


def test_the_rule_of_ratios_would_be_biased_under_the_same_noise() -> None:
    """A negative control: accept with probability p / q, else draw from the rest with the noise that lost."""
    noise = gumbel(1, 0, np.arange(3 * 200_000)).reshape(-1, 3)
    draft = drawn(Q, noise)
    u = np.exp(-np.exp(-gumbel(2, 0, np.arange(len(draft)))))
    rest = np.maximum(P - Q, 1e-12)
    emitted = np.where(u < np.minimum(1, P[draft] / Q[draft]), draft, drawn(rest / rest.sum(), noise))
    shares = np.bincount(emitted, minlength=3) / len(emitted)
    assert abs(shares[1] - P[1]) > 0.01
    same = np.bincount(drawn(P, noise), minlength=3) / len(noise)
    assert np.abs(same - P).max() < 0.005


def test_what_a_sampler_chooses_depends_on_seed_and_position() -> None:
    sampler, flat = Sampler(Options(temperature=1.0), 1), np.zeros(1000)
    assert len({sampler.choose(flat, (4,) * length) for length in range(8)}) > 6
    assert len({replace(sampler, seed=seed).choose(flat, ()) for seed in range(8)}) > 6
