"""Verification of drafts, as functions of values: no network, no clock, no arrays.

A text is written in passes. A pass reads a block, the last token written and then proposals, and computes the target's
choice after every token of it. Choices count as long as the proposals before them are what the target chose. The first
proposal that differs is replaced by the target's choice, and what was computed after it is dropped, since it followed
another history (Leviathan et al., arXiv 2211.17192, in its greedy case). So a proposal only decides which positions are
computed early, never a token: the text is the same for every draft, and for none.

A sampled text is verified in the same way, since its noise is a function of the position: see
edge_runtime/inference/sampling.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from edge_runtime.inference.bundle import BOS, EOS, UNKNOWN

# Of a bundle's vocabulary. The tokenizer of another target has others.
ENDS = frozenset((EOS,))
SPECIAL = frozenset(range(UNKNOWN + 1))


@dataclass(frozen=True, slots=True)
class Text:
    """A text that is being written."""

    limit: int  # tokens at most, end token included
    rest: tuple[int, ...] = ()  # proposals after the last token: what is left of the draft, or of later proposals
    tokens: tuple[int, ...] = ()  # written so far, end token included
    proposed: int = 0  # tokens of the draft that were usable
    accepted: int = 0  # of those, how many the target chose as well
    accepted_again: int = 0  # of the proposals that replaced the draft, how many the target chose as well
    passes: int = 0
    has_diverged: bool = False  # the target chose another token, so the rest was meant to follow another history
    is_proposed_again: bool = False  # other proposals have replaced the draft
    ends: frozenset[int] = ENDS  # tokens that end the text
    special: frozenset[int] = SPECIAL  # tokens that are never proposed, ends included

    @property
    def is_done(self) -> bool:
        """The text has ended, or is as long as it may be."""
        return self.is_cut or not self.ends.isdisjoint(self.tokens[-1:])

    @property
    def needs_proposals(self) -> bool:
        """There are no proposals left, or they have become unlikely."""
        return self.has_diverged or not self.rest

    @property
    def is_cut(self) -> bool:
        """It is as long as it may be, and has not ended."""
        return self.ends.isdisjoint(self.tokens[-1:]) and len(self.tokens) >= self.limit

    @property
    def without_end(self) -> tuple[int, ...]:
        """The tokens without the end token."""
        return self.tokens if self.ends.isdisjoint(self.tokens[-1:]) else self.tokens[:-1]


def new_text(
    draft: Sequence[int],
    vocabulary: int,
    limit: int,
    ends: frozenset[int] = ENDS,
    special: frozenset[int] = SPECIAL,
) -> Text:
    """A text of at most `limit` tokens before its first pass.

    The draft is cut to that length, and before the first special token or id outside the vocabulary. Proposing an end
    saves no pass, and no text contains the other special tokens. So a hostile draft, or one of another tokenizer, costs
    passes but never reaches an embedding.
    """
    usable = tuple(takewhile(lambda token: 0 <= token < vocabulary and token not in special, draft[: limit - 1]))
    return Text(limit, rest=usable, proposed=len(usable), ends=ends, special=special)


def propose_again(text: Text, proposals: Sequence[int]) -> Text:
    """The text with other proposals, up to their first special token."""
    left = text.limit - len(text.tokens) - 1
    usable = tuple(takewhile(lambda token: token >= 0 and token not in text.special, proposals[:left]))
    return replace(text, rest=usable, has_diverged=False, is_proposed_again=True)


def next_block(text: Text, width: int) -> tuple[int, ...]:
    """What the next pass reads: the last token, and then up to width - 1 proposals."""
    return (text.tokens[-1:] or (BOS,)) + text.rest[: width - 1]


def verify(text: Text, choices: Iterable[int]) -> Text:
    """The text after a pass: the i-th choice, of at least one, is the target's token after the i-th of `next_block`.

    Choices behind a proposal that was wrong are not asked for.
    """
    tokens, rest, chosen, has_diverged = list(text.tokens), text.rest, 0, text.has_diverged
    for token in choices:
        tokens.append(token)
        if token in text.ends or len(tokens) == text.limit:  # in this order: an end token at the limit is an end
            rest = ()
            break
        if rest[:1] != (token,):
            rest, has_diverged = realign(rest, token), True
            break
        rest, chosen = rest[1:], chosen + 1
    return replace(
        text,
        tokens=tuple(tokens),
        rest=rest,
        accepted=text.accepted + chosen * (not text.is_proposed_again),
        accepted_again=text.accepted_again + chosen * text.is_proposed_again,
        passes=text.passes + 1,
        has_diverged=has_diverged,
    )


def realign(rest: tuple[int, ...], token: int) -> tuple[int, ...]:
    """What to propose after the target chose `token` and not rest[0].

    If the token comes later in the draft, the target left words out, and the proposals go on after it. Otherwise it
    replaced one word. A wrong guess costs nothing, as the block has its width anyway. Similar: LLMA (Yang et al., arXiv
    2304.04487).
    """
    return rest[rest.index(token) + 1 :] if token in rest else rest[1:]
