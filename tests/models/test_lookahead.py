"""Lookahead: served it guesses what was trained, a bundle's file gives the same guesses, and nothing else is taken."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.inference.bundle import BOS, EOS, PAD, UNKNOWN
from models.lookahead import STATE, Lookahead, LookaheadNet, tensors_of
from models.recipe.stage10_lookahead import DISTANCE, Texts, evaluate, loss_of, unrolled
from tests.bundles import lively

WIDTH, VOCABULARY = 16, 30
TOKENS = [BOS, EOS, *range(UNKNOWN + 1, VOCABULARY)]


def some_net(seed: int) -> LookaheadNet:
    torch.manual_seed(seed)
    return lively(LookaheadNet(WIDTH, len(TOKENS)))


def thoughts(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32)


@given(seed=st.integers(0, 50), token=st.sampled_from([t for t in TOKENS if t != EOS]), count=st.integers(0, 12))
def test_what_is_proposed_is_what_the_trained_network_finds_likeliest_word_by_word(seed, token, count) -> None:
    net, hidden = some_net(seed), thoughts(seed)
    proposed = Lookahead(TOKENS, net).propose(hidden, token, count)
    words = [TOKENS.index(t) for t in (token, *proposed)]
    with torch.inference_mode():
        guesses = net(torch.from_numpy(hidden), torch.tensor(words)).argmax(-1).tolist()
    follows = [TOKENS[guess] for guess in guesses]
    assert follows[: len(proposed)] == list(proposed)
    assert len(proposed) == count or follows[len(proposed)] <= UNKNOWN


def test_it_says_nothing_after_a_word_that_it_does_not_know() -> None:
    lookahead = Lookahead(TOKENS, some_net(3))
    assert lookahead.propose(thoughts(3), VOCABULARY + 5, 5) == () != lookahead.propose(thoughts(3), BOS, 5)


@given(seed=st.integers(0, 50))
def test_a_bundles_file_proposes_the_same_words_as_its_halved_weights(seed: int) -> None:
    net = some_net(seed)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(weight.half().float())
    again = Lookahead.of_tensors(tensors_of(TOKENS, net), WIDTH, VOCABULARY)
    assert again.propose(thoughts(seed), BOS, 9) == Lookahead(TOKENS, net).propose(thoughts(seed), BOS, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "want its words as whole numbers"),
        ({"tokens": torch.zeros(len(TOKENS))}, "want its words as whole numbers"),
        ({"tokens": torch.tensor([], dtype=torch.int32)}, r"tokens outside of 0..29, or none"),
        ({"tokens": torch.full((len(TOKENS),), VOCABULARY)}, r"tokens outside of 0..29"),
        ({"tokens": torch.full((len(TOKENS),), -1)}, r"tokens outside of 0..29"),
        ({"out.bias": None}, r'not for a target of width 16: .*\n.*"out.bias"'),
        ({"start.weight": torch.zeros(STATE, WIDTH + 1)}, r"not for a target of width 16: (.|\n)*size mismatch"),
    ],
)
def test_tensors_that_are_no_lookahead_are_refused_by_name(change, message: str) -> None:
    changed = {
        name: tensor for name, tensor in (tensors_of(TOKENS, some_net(0)) | change).items() if tensor is not None
    }
    with pytest.raises(ValueError, match=message):
        Lookahead.of_tensors(changed, WIDTH, VOCABULARY)


A, DOG, RUNS = 4, 5, 6


def two_texts() -> Texts:
    tokens = np.array([[BOS, A, DOG, RUNS, EOS], [BOS, A, DOG, EOS, PAD]], np.int16)
    hidden = np.random.default_rng(0).normal(size=(*tokens.shape, WIDTH)).astype(np.float16)
    return Texts(tokens, hidden)


def test_every_place_of_a_text_is_an_example_of_the_words_that_follow_it() -> None:
    texts = two_texts()
    hidden, words, wanted = unrolled(texts, np.arange(VOCABULARY))
    assert words.shape == wanted.shape == (4 + 3, DISTANCE)
    assert [row[row >= 0].tolist() for row in wanted[:4]] == [[A, DOG, RUNS, EOS], [DOG, RUNS, EOS], [RUNS, EOS], [EOS]]
    assert words[1, :3].tolist() == [A, DOG, RUNS]  # what it is told, one place behind what is wanted
    assert torch.equal(hidden[1], torch.from_numpy(texts.hidden[0, 1].astype(np.float32)))


def test_training_makes_it_look_farther_ahead() -> None:
    torch.manual_seed(0)
    net, numbers = LookaheadNet(WIDTH, VOCABULARY), np.arange(VOCABULARY)
    before = evaluate(net.state_dict(), two_texts(), numbers)["words_ahead"]
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        loss_of(net, two_texts(), numbers, 0.0).backward()
        optimiser.step()
    # All of them: 4 + 3 + 2 + 1 words of the first text, 3 + 2 + 1 of the second, at seven places.
    assert before < evaluate(net.state_dict(), two_texts(), numbers)["words_ahead"] == pytest.approx(16 / 7, abs=0.001)
