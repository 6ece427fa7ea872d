"""Chooses the next token of a text, for a board's draft and for a server's text alike.

A token is a function of the logits, of the text before it, and of the noise at its position (noise.py): the token with
the largest sum of logit / temperature and Gumbel noise has the probabilities of the softmax (Maddison et al., "A*
Sampling", 2014). So a draft is verified as a greedy one is, by comparing tokens, and no draft changes a text. A
draft that was sampled with the same noise is accepted nearly as often as any rule allows (Daliri, Musco & Suresh,
arXiv 2408.07978).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.inference.bundle import EOS
from edge_runtime.inference.noise import exp, gumbel
from edge_runtime.wire.envelope import Options


@dataclass(frozen=True, slots=True)
class Sampler:
    """Chooses the tokens of one text. It has no state: what it chooses depends on its arguments only."""

    settings: Options
    seed: int  # 0..2^64 - 1, of the noise

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end the text."""
        return frozenset((EOS, *self.settings.stop))

    def choices(self, logits: Iterable[NDArray[Any]], written: Sequence[int]) -> Iterator[int]:
        """The tokens after `written`, as long as logits [V] of the next one follow; each counts as history of the next.

        Nothing is computed for a token that is not asked for.
        """
        history = list(written)
        for row in logits:
            history.append(self.choose(row, history))
            yield history[-1]

    def choose(self, logits: NDArray[Any], history: Sequence[int]) -> int:
        """The token after `history`, all tokens of the text so far, by logits float [V]; -inf forbids a token.

        EOS, if a logit is not a number or no token is left: the caller must look at the logits to know which.
        """
        settings, scores = self.settings, logits.astype(np.float64)
        if settings.repetition_penalty != 1.0:
            seen = list(set(history))
            scores[seen] = np.where(
                scores[seen] > 0, scores[seen] / settings.repetition_penalty, scores[seen] * settings.repetition_penalty
            )
        if len(history) < settings.min_tokens:
            scores[[token for token in self.ends if token < len(scores)]] = -np.inf
        if not np.isfinite(scores.max()):
            return EOS
        if not settings.is_sampled:
            return int(scores.argmax())
        scores /= settings.temperature
        kept = self._kept(scores)
        return int(kept[(scores[kept] + gumbel(self.seed, len(history), kept)).argmax()])

    def _kept(self, scores: NDArray[np.float64]) -> NDArray[np.int64]:
        """The tokens that top_k, and then top_p, leave, in ascending order. Of equal scores, lower tokens are kept."""
        top_k, top_p = self.settings.top_k, self.settings.top_p
        possible: NDArray[np.int64] = np.flatnonzero(scores > -np.inf)
        if top_k is None and top_p is None:
            return possible
        likeliest = possible[np.argsort(-scores[possible], kind="stable")][:top_k]
        if top_p is not None:
            mass = exp(scores[likeliest] - scores[likeliest[0]]).cumsum()  # in this order, so its bits are the same
            likeliest = likeliest[: np.searchsorted(mass, top_p * mass[-1]) + 1]
        return np.sort(likeliest)


def sampler_of(settings: Options | None, seed: int) -> Sampler | None:
    """None, if the settings are those of plain greedy decoding."""
    return Sampler(settings, seed) if settings and not settings.is_greedy else None
