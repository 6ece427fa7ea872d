"""The labels of a board and of a server, joined."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.labels import label_words, with_seen


def test_without_labels_of_the_board_the_features_decide():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    assert with_seen(probabilities, {}) is probabilities


def test_what_the_board_has_seen_stands_and_the_rest_is_shared_out_as_the_features_say():
    joined = with_seen(torch.tensor([0.1, 0.6, 0.2, 0.1]), {1: 0.0625, 3: 0.5})
    assert joined.tolist() == pytest.approx([0.4375 / 3, 0.0625, 0.875 / 3, 0.5])


@given(st.integers(0, 1000), st.dictionaries(st.integers(0, 9), st.floats(0.01, 0.2), max_size=5))
def test_the_joined_labels_are_probabilities(seed, seen):
    joined = with_seen(torch.rand(10, generator=torch.Generator().manual_seed(seed)).softmax(-1), seen)
    assert joined.min() >= 0
    assert joined.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_a_decoder_sees_the_words_of_what_the_board_has_seen():
    words = [(10,), (20, 21), (30,)]
    features = torch.tensor([0.9, 0.05, 0.05])
    assert label_words(features, words, 3)[0] == 10
    assert label_words(with_seen(features, {1: 0.9}), words, 3) == [20, 21, 10]


def test_sure_features_do_not_matter_where_the_board_is_sure_of_something_else():
    assert with_seen(torch.tensor([1.0, 0.0]), {1: 1.0}).tolist() == [0.0, 1.0]
