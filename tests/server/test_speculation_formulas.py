"""What a draft saves, by formula (Leviathan et al., arXiv 2211.17192) and by the verification that serves.

The product measures passes and tokens and needs no formula. These say that what it measures is what theory expects.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from operator import mul

import pytest

from server.verify import Text, new_text, next_block, verify

VOCABULARY, RIGHT, WRONG = 10, 5, 6
TEXTS = 20_000


def expected_accepted(agreement: Sequence[float]) -> float:
    """Tokens of a draft that are accepted on average: a token is, if it and all before are right.

    agreement[i]: probability that token i is right if all before are.
    """
    return sum(accumulate(agreement, mul))


def expected_passes(agreement: Sequence[float], length: int) -> float:
    """Of a text of `length` tokens, if nothing is proposed after the first wrong token: one for each other token."""
    return length - expected_accepted(agreement)


def drafted(agreement: Sequence[float], random_: random.Random, length: int) -> Text:
    draft = [RIGHT if random_.random() < a else WRONG for a in agreement]
    return new_text(draft, VOCABULARY, length)


def one_pass(text: Text) -> Text:
    """The target always writes RIGHT."""
    return verify(text, [RIGHT] * len(next_block(text, 64)))


@pytest.mark.parametrize("agreement", [[0.7] * 6, [0.9] * 12, [0.95, 0.9, 0.8, 0.6, 0.4, 0.2], [0.2] * 3, [1.0] * 5])
def test_accepted_tokens_are_as_many_as_the_formula_expects(agreement: list[float]) -> None:
    chosen = random.Random(1)
    accepted = [one_pass(drafted(agreement, chosen, 30)).accepted for _ in range(TEXTS)]
    assert sum(accepted) / TEXTS == pytest.approx(expected_accepted(agreement), rel=0.02)


@pytest.mark.parametrize(("a", "k"), [(0.7, 6), (0.9, 12), (0.5, 3)])
def test_with_one_agreement_for_all_tokens_the_sum_is_the_closed_form(a: float, k: int) -> None:
    assert expected_accepted([a] * k) + 1 == pytest.approx((1 - a ** (k + 1)) / (1 - a))


@pytest.mark.parametrize(("a", "k"), [(0.7, 6), (0.9, 11)])
def test_passes_are_as_few_as_the_formula_expects(a: float, k: int) -> None:
    length, chosen, passes = 12, random.Random(2), 0
    for _ in range(TEXTS // 2):
        text = drafted([a] * k, chosen, length)
        while not text.is_done:
            text = one_pass(text)
            if text.has_diverged:
                text = replace(text, rest=())
        passes += text.passes
    # A token that was written for a wrong one takes no pass of its own.
    assert passes / (TEXTS // 2) == pytest.approx(expected_passes([a] * k, length), rel=0.02)


def saving(a: float, k: int, pass_ms: float, price_ms: float) -> float:
    """Milliseconds that a draft of k tokens saves: each accepted token a pass, each drafted token its price."""
    return expected_accepted([a] * k) * pass_ms - k * price_ms


def test_the_best_length_of_a_draft_is_where_one_more_token_is_not_worth_its_price() -> None:
    chosen = random.Random(3)
    for _ in range(2000):
        a, pass_ms, price_ms = chosen.uniform(0.05, 0.98), chosen.uniform(1, 20), chosen.uniform(0.05, 20)
        best = 0 if a * pass_ms <= price_ms else math.floor(math.log(price_ms / pass_ms) / math.log(a) + 1e-9)
        tried = max(range(120), key=lambda k: saving(a, k, pass_ms, price_ms))
        if best < 119:
            assert saving(a, best, pass_ms, price_ms) == pytest.approx(saving(a, tried, pass_ms, price_ms), abs=1e-9)
