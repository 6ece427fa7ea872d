"""Greedy verification: the text never depends on the draft."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.inference.bundle import BOS, EOS
from server.verify import Text, new_text, next_block, propose_again, realign, verify

A, B = 4, 5  # with the end token a vocabulary of three
VOCABULARY = 6

Target = Callable[[tuple[int, ...]], int]  # what is written after the tokens before
Verify = Callable[[Text, Sequence[int]], Text]


def write(target: Target, text: Text, width: int, verify: Verify = verify) -> Text:
    """Writes a text to its end, as a server does."""
    while not text.is_done:
        block = next_block(text, width)
        assert 1 <= len(block) <= width
        text = verify(text, [target(text.tokens + block[1 : i + 1]) for i in range(len(block))])
    return text


def alone(target: Target, limit: int) -> tuple[int, ...]:
    """The definition: one token after the other."""
    tokens: tuple[int, ...] = ()
    while tokens[-1:] != (EOS,) and len(tokens) < limit:
        tokens += (target(tokens),)
    return tokens


def all_targets() -> Iterator[Target]:
    """Every table from prefixes to A, B or EOS, as far as it is looked at before the next one is asked for."""
    script: list[int] = []
    while True:
        table: dict[tuple[int, ...], int] = {}
        used: list[int] = []

        def target(prefix: tuple[int, ...], table=table, used=used, script=tuple(script)) -> int:
            if prefix not in table:
                used.append(script[len(used)] if len(used) < len(script) else 0)
                table[prefix] = (A, B, EOS)[used[-1]]
            return table[prefix]

        yield target
        while used and used[-1] == 2:
            used.pop()
        if not used:
            return
        script = [*used[:-1], used[-1] + 1]


def random_target(seed: int, vocabulary: int = VOCABULARY) -> Target:
    """A fixed function of the prefix; one token in ten is an end."""

    def target(prefix: tuple[int, ...]) -> int:
        chosen = random.Random(repr((seed, prefix)))
        return EOS if chosen.random() < 0.1 else chosen.randrange(4, vocabulary)

    return target


def drafts(length: int) -> Iterator[tuple[int, ...]]:
    for n in range(length + 1):
        yield from itertools.product((A, B), repeat=n)


def wrong_texts(limit: int, width: int, verify: Verify = verify) -> int:
    """Over all targets and drafts, how many texts differ from the target's own."""
    return sum(
        write(target, new_text(draft, VOCABULARY, limit), width, verify).tokens != alone(target, limit)
        for draft in drafts(limit)
        for target in all_targets()
    )


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_every_target_writes_its_own_text_under_every_draft(width: int) -> None:
    assert wrong_texts(4, width) == 0


def test_accepting_one_token_after_a_mismatch_would_be_found() -> None:
    def careless(text: Text, choices: Sequence[int]) -> Text:
        after = verify(text, choices)
        n = len(after.tokens) - len(text.tokens)
        return after if after.is_done or n == len(choices) else replace(after, tokens=(*after.tokens, choices[n]))

    assert wrong_texts(3, 3, careless) > 0


@given(seed=st.integers(0, 999), limit=st.integers(1, 30), width=st.integers(1, 16), data=st.data())
def test_any_draft_gives_the_text_of_none_in_no_more_passes(seed, limit, width, data) -> None:
    target = random_target(seed, 9)
    own = alone(target, limit)
    near = [data.draw(st.sampled_from((token, token, token, 4))) for token in own]
    draft = data.draw(st.sampled_from((near, near[1:], [7, *near], data.draw(st.lists(st.integers(-2, 10))))))
    text = write(target, new_text(draft, 9, limit), width)
    assert text.tokens == own
    assert text.passes <= len(own)
    assert text.accepted <= text.proposed <= min(len(draft), limit - 1)
    assert len(own) <= text.accepted + text.passes  # what was not proposed was written, one a pass


@given(seed=st.integers(0, 999), width=st.integers(2, 8), data=st.data())
def test_any_alignment_after_a_mismatch_gives_the_same_text(seed, width, data) -> None:
    target = random_target(seed)
    proposals = st.lists(st.sampled_from((A, B, EOS)), max_size=12).map(tuple)

    def verify_then_propose_anything(text: Text, choices: Sequence[int]) -> Text:
        return replace(verify(text, choices), rest=data.draw(proposals))

    text = write(target, new_text((), VOCABULARY, 12), width, verify_then_propose_anything)
    assert text.tokens == alone(target, 12)


@given(seed=st.integers(0, 999), limit=st.integers(1, 12), width=st.integers(2, 8), data=st.data())
def test_any_new_drafts_give_the_same_text_in_no_more_passes(seed, limit, width, data) -> None:
    target = random_target(seed)
    own = alone(target, limit)
    anything = st.lists(st.integers(-2, 10), max_size=12).map(tuple)

    def verify_then_propose_again(text: Text, choices: Sequence[int]) -> Text:
        after = verify(text, choices)
        return propose_again(after, data.draw(anything)) if after.needs_proposals and not after.is_done else after

    text = write(target, new_text(data.draw(anything), VOCABULARY, limit), width, verify_then_propose_again)
    assert text.tokens == own
    assert text.accepted <= text.proposed
    assert len(own) <= text.accepted + text.accepted_again + text.passes
    assert text.passes <= len(own)


def test_a_new_draft_is_wanted_where_the_old_one_ends_or_was_wrong_and_is_counted_apart() -> None:
    text = new_text((A, B, A, A), VOCABULARY, 24)
    assert not text.needs_proposals
    text = verify(text, [A, A])  # A was right, B was not
    assert text.needs_proposals
    text = propose_again(text, (B, B, EOS, A))
    assert (text.rest, text.needs_proposals) == ((B, B), False)
    text = verify(text, [B, B, A])
    assert text.needs_proposals
    assert (text.tokens, text.proposed, text.accepted, text.accepted_again) == ((A, A, B, B, A), 4, 1, 2)


def test_a_new_draft_is_cut_to_what_can_be_written() -> None:
    text = verify(new_text((), VOCABULARY, 4), [A])
    assert propose_again(text, (A,) * 50).rest == (A, A)


def test_realign_follows_a_target_that_left_words_out_or_replaced_one() -> None:
    assert realign((4, 5, 6, 7), 6) == (7,)
    assert realign((4, 5, 6, 7), 9) == (5, 6, 7)
    assert realign((), 9) == ()


def test_passes_and_accepted_are_as_counted_by_hand() -> None:
    own = (4, 5, 6, 7, 8, EOS)

    def target(prefix: tuple[int, ...]) -> int:
        return own[len(prefix)] if prefix == own[: len(prefix)] else 9

    def counts(draft: tuple[int, ...], width: int = 16) -> tuple[int, int, int]:
        text = write(target, new_text(draft, 10, 24), width)
        assert text.tokens == own
        return text.accepted, text.proposed, text.passes

    assert counts(()) == (0, 0, 6)
    assert counts((4, 5, 6, 7, 8)) == (5, 5, 1)  # the whole draft and the end in one pass
    assert counts((4, 5, 9, 7, 8)) == (4, 5, 2)  # replaced: 4 5 6, then 7 8 END
    assert counts((4, 5, 9, 9, 6, 7, 8)) == (4, 7, 2)  # left out: the 6 is written, not accepted
    assert counts((9, 9)) == (0, 2, 6)
    assert counts((4, 5, 6, 7, 8), width=3) == (5, 5, 2)  # 4 5 6, then 7 8 END


@pytest.mark.parametrize("limit", range(1, 8))
@pytest.mark.parametrize("length", range(7))
def test_nothing_follows_an_end_or_the_limit_wherever_they_fall_in_a_block(limit: int, length: int) -> None:
    def target(prefix: tuple[int, ...]) -> int:
        return A if len(prefix) < length else EOS

    for draft in drafts(6):
        text = write(target, new_text(draft, VOCABULARY, limit), 4)
        assert text.tokens == ((A,) * length + (EOS,))[:limit]
        assert text.without_end == ((A,) * length)[:limit]  # at the limit an end token is still an end


def test_a_rejected_end_does_not_finish_a_text() -> None:
    assert new_text((A, EOS, B), VOCABULARY, 8).rest == (A,)
    text = verify(new_text((A,), VOCABULARY, 8), [B, EOS])  # the end follows A, which was not chosen
    assert text.tokens == (B,)
    assert not text.is_done


@pytest.mark.parametrize("bad", [-1, VOCABULARY, 1 << 31, BOS, 0, 3])
def test_a_draft_is_cut_before_an_id_that_no_text_contains(bad: int) -> None:
    assert new_text((A, B, bad, A), VOCABULARY, 8).rest == (A, B)


def test_a_draft_of_a_million_tokens_is_cut_to_what_can_be_written() -> None:
    text = new_text((A,) * 10**6, VOCABULARY, 8)
    assert text.proposed == len(text.rest) == 7
