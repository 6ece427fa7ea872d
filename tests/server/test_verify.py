"""Greedy verification: the text never depends on the draft."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.inference.bundle import BOS, EOS
from server.verify import SPECIAL, Text, new_text, next_block, propose_again, realign, verify

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


STOP = 7


@pytest.mark.parametrize("order", [*itertools.permutations((A, STOP, EOS))])
@pytest.mark.parametrize("limit", range(1, 5))
def test_the_first_of_end_stop_token_and_limit_ends_a_text_in_one_block(order: tuple[int, ...], limit: int) -> None:
    ends = frozenset((EOS, STOP))
    written = order[: 1 + next(i for i, token in enumerate(order) if token in ends)][:limit]
    for draft in (order, (A, A, A), ()):
        text = new_text(draft, 10, limit, ends, SPECIAL | ends)
        while not text.is_done:
            text = verify(text, order[len(text.tokens) :][: len(next_block(text, 4))])
        assert text.tokens == written
        assert text.without_end == tuple(token for token in written if token == A)
        assert text.accepted <= text.proposed <= limit - 1 or limit == 1


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


# ---- sampled texts: the target's choice depends on the text before it and on the noise at its position ----

CELLS = 3  # a cell of the noise has probability 1 / CELLS, so all noises can be tried


def sampled_target(table: dict[tuple[int, ...], tuple[int, ...]], noise: Sequence[int]) -> Target:
    """table: from a text to the token of each cell."""
    return lambda prefix: table[prefix][noise[len(prefix)]]


def texts_by_noise(table, draft: tuple[int, ...], width: int, limit: int, target=sampled_target) -> list[tuple]:
    return [
        write(target(table, noise), new_text(draft, VOCABULARY, limit), width).tokens
        for noise in itertools.product(range(CELLS), repeat=limit)
    ]


def random_table(seed: int, limit: int) -> dict[tuple[int, ...], tuple[int, ...]]:
    chosen = random.Random(seed)
    return {prefix: tuple(chosen.choices((A, B, EOS), k=CELLS)) for prefix in drafts(limit)}


@pytest.mark.parametrize("seed", range(6))
def test_under_every_noise_and_draft_a_sampled_text_is_the_targets_own_and_has_its_law(seed: int) -> None:
    limit, table = 4, random_table(seed, 4)
    own = [alone(sampled_target(table, noise), limit) for noise in itertools.product(range(CELLS), repeat=limit)]
    for draft in drafts(limit):
        assert texts_by_noise(table, draft, 3, limit) == own
    for text in set(own):
        law = 1.0
        for n, token in enumerate(text):
            law *= table[text[:n]].count(token) / CELLS
        assert own.count(text) / CELLS**limit == pytest.approx(law, abs=1e-12)


def test_drawing_again_after_a_match_would_be_found() -> None:
    """Noise that depends on what was accepted: the text then depends on the draft."""

    def flawed(table, noise: Sequence[int]) -> Target:
        reads: list[tuple[int, ...]] = []

        def target(prefix: tuple[int, ...]) -> int:
            reads.append(prefix)
            is_in_block = len(reads) > 1 and reads[-2] == prefix[:-1] and reads.count(prefix[:-1]) == 1
            return table[prefix][noise[(len(prefix) + is_in_block) % len(noise)]]

        return target

    own = texts_by_noise(random_table(1, 4), (), 3, 4)
    assert any(texts_by_noise(random_table(1, 4), draft, 3, 4, flawed) != own for draft in drafts(4))


def test_with_one_noise_three_tiers_write_what_the_last_one_writes_alone() -> None:
    """Board, edge and cloud: each text is the draft of the tier above."""
    for seed in range(20):
        tables = [random_table(3 * seed + tier, 4) for tier in range(3)]
        noise = [random.Random(seed).randrange(CELLS) for _ in range(4)]
        draft: tuple[int, ...] = ()
        for table in tables:
            target = sampled_target(table, noise)
            text = write(target, new_text(draft, VOCABULARY, 4), 3)
            assert text.tokens == alone(target, 4)
            draft = text.without_end
