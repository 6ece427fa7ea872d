"""What was written before is proposed again, within bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.targets.phrases import LENGTH, START, PhraseMemory, Proposer

tokens = st.lists(st.integers(0, 5), max_size=30)


def memory_of(*texts: tuple[int, ...]) -> PhraseMemory:
    memory = PhraseMemory(1000)
    for text in texts:
        memory.learn(text)
    return memory


def proposer(draft: tuple[int, ...] = (), own: PhraseMemory | None = None, shared: PhraseMemory | None = None):
    return Proposer(draft, own or memory_of(), shared or memory_of())


def test_what_followed_the_longest_known_end_is_found() -> None:
    memory = memory_of((1, 2, 3, 4), (9, 3, 5))
    assert memory.longest((7, 2, 3)) == (2, (4,))
    assert memory.longest((7, 9, 3)) == (2, (5,))
    assert memory.longest((7, 7, 3)) == (1, (5,))  # the latest
    assert memory.longest((7, 7, 3), shortest=2) == (0, ())
    assert memory.longest((7,)) == memory.longest(()) == (0, ())


def test_a_phrase_of_this_text_goes_before_one_of_earlier_texts_that_is_no_longer() -> None:
    assert proposer(own=memory_of((3, 1)), shared=memory_of((3, 2)))((3,), 0) == (1,)
    assert proposer(own=memory_of((3, 1)), shared=memory_of((8, 3, 2)))((8, 3), 0) == (2,)


def test_the_beginning_of_earlier_texts_is_proposed_if_there_is_no_draft() -> None:
    assert proposer(shared=memory_of((START, 4, 5)))((), 0) == (4, 5)


def test_phrases_are_chained_to_fill_a_block() -> None:
    assert proposer(shared=memory_of((3, 4), (4, 5), (5, 6)))((3,), 2) == (4, 5, 6)
    assert proposer()((7, 7), 2) == (7,) * LENGTH


def test_after_one_wrong_word_the_draft_goes_on() -> None:
    assert proposer((1, 2, 3, 4, 5))((1, 9), 0) == (3, 4, 5)


def test_after_words_that_the_target_left_out_the_draft_goes_on_behind_them() -> None:
    again = proposer((1, 2, 3, 4, 5, 6, 7))
    assert again((1, 4), 0) == (5, 6, 7)
    assert again((1, 4, 9), 0) == (6, 7)


def test_after_two_misses_a_known_word_is_enough() -> None:
    again = proposer((1, 2, 3, 4, 5))
    assert again((8, 9, 2), 1) == (4, 5)
    assert again((8, 9, 2), 2) == (3, 4, 5)


@pytest.mark.parametrize(
    ("text", "misses", "found", "asks"),
    [
        ((9,), 0, (6,), False),  # the rest of the draft
        ((9, 1, 2, 3), 0, (4,), False),  # three known words
        ((9, 1, 2, 3), 2, (7,), True),  # twice, something else has followed
        ((9, 9, 2, 3), 0, (7,), True),  # two known words
        ((), 0, (4, 6), False),
    ],
)
def test_an_assistant_is_asked_if_no_draft_and_no_phrase_of_three_words_says_what_follows(
    text: tuple[int, ...], misses: int, found: tuple[int, ...], asks: bool
) -> None:
    asked = list[tuple[int, ...]]()
    known = memory_of((1, 2, 3, 4), (START, 5))
    again = Proposer((4, 6), memory_of(), known, lambda tokens: asked.append(tokens) or (7,))
    assert again(text, misses) == found
    assert asked == [text] * asks


def test_how_texts_begin_is_known_without_an_assistant_and_one_known_word_helps_if_it_has_nothing() -> None:
    known = memory_of((START, 5, 6), (8, 9))
    assert Proposer((), memory_of(), known, lambda _: (7,))((), 0) == (5, 6)
    assert Proposer((), memory_of(), known, lambda _: ())((3, 4, 8), 0) == (9,)


def test_the_oldest_is_forgotten_first() -> None:
    memory = PhraseMemory(3)
    memory.learn((1, 2, 3))
    memory.learn((1, 7))
    assert len(memory) == 3
    assert memory.longest((1,)) == (1, (7,))
    for text in ((4, 5), (5, 6), (6, 7)):
        memory.learn(text)
    assert len(memory) == 3
    assert memory.longest((1,)) == (0, ())


@given(tokens)
def test_every_phrase_has_followed_the_last_token(text: list[int]) -> None:
    _, found = memory_of(tuple(text)).longest(text)
    assert len(found) <= LENGTH
    if found:
        starts = [i + 1 for i, token in enumerate(text) if token == text[-1]]
        assert any(tuple(text[i : i + len(found)]) == found for i in starts)


@given(tokens, st.integers(0, 30))
def test_a_sequence_that_is_learnt_as_it_grows_is_known_as_if_at_once(text: list[int], cut: int) -> None:
    grown = memory_of(tuple(text[:cut]))
    grown.learn(tuple(text), min(cut, len(text)))
    whole = memory_of(tuple(text))
    assert all(grown.longest(text[:i]) == whole.longest(text[:i]) for i in range(len(text)))
