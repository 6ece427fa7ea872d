"""Greedy verification of drafts, as functions of values: no network, no clock, no arrays.

A text is written in passes. A pass computes the target's choice after every token of a block: the last token written,
then proposals. Choices count as long as the proposals before them are what the target chose; the first that differs is
the target's correction, and what was computed after it saw another history and is dropped (Leviathan et al., arXiv
2211.17192, in its greedy case). A proposal thus decides only which positions are computed early, never a token: the
text is the same for every draft, and for none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from edge_runtime.inference.bundle import BOS, EOS, UNKNOWN


@dataclass(frozen=True, slots=True)
class Text:
    """A text in the making."""

    limit: int  # tokens at most, end token included
    rest: tuple[int, ...] = ()  # proposed after the last token: what is left of the draft, or of a later one
    tokens: tuple[int, ...] = ()  # written so far, end token included
    proposed: int = 0  # tokens of the draft that were usable
    accepted: int = 0  # of those, how many the target chose as well
    redrafted: int = 0  # tokens of later drafts that the target chose as well
    passes: int = 0
    is_adrift: bool = False  # the target wrote something else: what is left was meant to follow another history
    is_redraft: bool = False  # the draft has been replaced

    @property
    def is_done(self) -> bool:
        """Nothing may be written any more."""
        return self.tokens[-1:] == (EOS,) or len(self.tokens) >= self.limit

    @property
    def wants_redraft(self) -> bool:
        """A better proposal would be welcome."""
        return self.is_adrift or not self.rest

    @property
    def without_end(self) -> tuple[int, ...]:
        """The tokens, end token left out."""
        return self.tokens[:-1] if self.tokens[-1:] == (EOS,) else self.tokens


def new_text(draft: Sequence[int], vocabulary: int, limit: int) -> Text:
    """A text of at most `limit` tokens before its first pass.

    The draft is cut to what can be written, and before the first special token (proposing an end makes nothing early,
    no text contains the others) or id outside the vocabulary: a hostile draft or one of another tokenizer costs passes
    and never reaches an embedding.
    """
    usable = tuple(takewhile(lambda token: UNKNOWN < token < vocabulary, draft[: limit - 1]))
    return Text(limit, rest=usable, proposed=len(usable))


def redraft(text: Text, proposals: Sequence[int]) -> Text:
    """The text with what is left of its draft replaced, by words alone."""
    usable = tuple(takewhile(lambda token: token > UNKNOWN, proposals[: text.limit - len(text.tokens) - 1]))
    return replace(text, rest=usable, is_adrift=False, is_redraft=True)


def next_block(text: Text, width: int) -> tuple[int, ...]:
    """What the next pass reads: the last token, then up to width - 1 proposals."""
    return (text.tokens[-1:] or (BOS,)) + text.rest[: width - 1]


def verify(text: Text, choices: Sequence[int]) -> Text:
    """One pass: choices[i] is what the target writes after the i-th token of `next_block`; at least one."""
    tokens, rest, chosen, is_adrift = list(text.tokens), text.rest, 0, text.is_adrift
    for token in choices:
        tokens.append(token)
        if token == EOS or len(tokens) == text.limit:  # in this order: an end token at the limit is an end
            rest = ()
            break
        if rest[:1] != (token,):
            rest, is_adrift = realign(rest, token), True
            break
        rest, chosen = rest[1:], chosen + 1
    return replace(
        text,
        tokens=tuple(tokens),
        rest=rest,
        accepted=text.accepted + chosen * (not text.is_redraft),
        redrafted=text.redrafted + chosen * text.is_redraft,
        passes=text.passes + 1,
        is_adrift=is_adrift,
    )


def realign(rest: tuple[int, ...], token: int) -> tuple[int, ...]:
    """What to propose after the target wrote `token` where the draft has rest[0].

    If the draft has the token later, the target left words out and goes on from there; else it replaced one. A wrong
    guess costs nothing, as the block has its width anyway. Kin: LLMA (Yang et al., arXiv 2304.04487).
    """
    return rest[rest.index(token) + 1 :] if token in rest else rest[1:]
