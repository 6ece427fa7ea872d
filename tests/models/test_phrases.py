"""Phrases: what follows is what followed most often, and a bundle's table gives the same proposals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bundle import BOS, EOS, PAD, UNKNOWN
from models.phrases import CHOICES, ORDER, Phrases

A, DOG, RUNS, SITS, ON, GRASS, SAND, CAT = range(4, 12)
TEXTS = [
    *[[BOS, A, DOG, RUNS, ON, GRASS, EOS, PAD, PAD]] * 3,
    *[[BOS, A, DOG, SITS, ON, SAND, EOS, PAD, PAD]] * 2,
    [BOS, A, CAT, SITS, ON, GRASS, EOS],
]
PHRASES = Phrases.of_texts(TEXTS)


def test_a_text_goes_on_as_most_texts_did_and_stops_where_they_end() -> None:
    assert PHRASES.propose((), 9) == (A, DOG, RUNS, ON, GRASS)
    assert PHRASES.propose((A, DOG), 2) == (RUNS, ON)
    assert PHRASES.propose((A, DOG, RUNS, ON, GRASS), 4) == ()


def test_the_longest_context_that_was_seen_decides() -> None:
    assert PHRASES.propose((A, DOG, SITS, ON), 1) == (SAND,)  # "on" alone is followed by grass
    # "a cat sits" was seen once, which says nothing; "cat" alone is always looked up.
    assert PHRASES.propose((A, CAT), 2) == (SITS, ON)
    assert PHRASES.propose((GRASS, GRASS, ON), 1) == (GRASS,)


def test_words_of_the_draft_count_more() -> None:
    assert PHRASES.propose((A, DOG), 3, draft={SITS}) == (SITS, ON, SAND)


def test_what_was_never_seen_is_followed_by_nothing() -> None:
    assert PHRASES.propose((99,), 5) == ()
    assert Phrases({}).propose((), 5) == ()


tokens = st.integers(UNKNOWN + 1, 9)


@given(
    texts=st.lists(st.lists(tokens, max_size=6), max_size=8),
    start=st.lists(tokens, max_size=4),
    count=st.integers(0, 6),
)
def test_a_table_from_a_bundle_proposes_the_same_words_and_only_words(texts, start, count) -> None:
    phrases = Phrases.of_texts([[BOS, *text, EOS] for text in texts])
    again = Phrases.of_tensors(phrases.tensors(), vocabulary=10)
    proposed = phrases.propose(start, count, draft=start)
    assert again.propose(start, count, draft=start) == proposed
    assert len(proposed) <= count
    assert all(token > UNKNOWN for token in proposed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": None}, "no tensor 'contexts'"),
        ({"tokens": torch.zeros(3, CHOICES, dtype=torch.int32)}, "want whole numbers"),
        ({"contexts": torch.zeros(0, ORDER)}, "want whole numbers"),
        ({"tokens": torch.full((1, CHOICES), 50, dtype=torch.int32)}, "tokens outside of 0..49"),
        ({"contexts": torch.full((1, ORDER), -1, dtype=torch.int32)}, "tokens outside of 0..49"),
    ],
)
def test_tensors_that_are_no_table_are_refused_by_name(change, message: str) -> None:
    one = Phrases({(A,): [(DOG, 1)]}).tensors()
    changed = {name: tensor for name, tensor in (one | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        Phrases.of_tensors(changed, vocabulary=50)
