"""The draft decoder of the board: symbols, and labels if there are any, to a draft text, one token after the other.

Each token is the most probable one, unless the text is sampled: then server and board choose with the same noise.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_runtime.inference.backends import BackendError, Model
from edge_runtime.inference.bundle import BOS, EOS
from edge_runtime.inference.sampling import Sampler

STATE = 256  # width of the recurrent state


@dataclass(frozen=True, slots=True)
class Drafted:
    tokens: tuple[int, ...]  # with the end token, if the text ended
    confidence: float  # geometric mean of the tokens' probabilities, 0..1; 0 without tokens


class Draft:
    """A loaded draft decoder. Its encoder runs once per frame, its recurrent step once per token."""

    def __init__(
        self, encoder: Model, step: Model, max_tokens: int, labels: npt.NDArray[np.floating[Any]] | None = None
    ) -> None:
        """labels: what each label adds to the first state, [classes, STATE]; None: the decoder knows no labels."""
        self._encoder, self._step, self._max_tokens, self._labels = encoder, step, max_tokens, labels

    @property
    def reads_labels(self) -> bool:
        """Labels make its texts better."""
        return self._labels is not None

    def write(
        self,
        symbols: npt.NDArray[Any],
        labels: Iterable[tuple[int, float]] = (),
        sampler: Sampler | None = None,
    ) -> Drafted:
        """Symbols [64, 7, 7] to a draft that ends with EOS or after max_tokens. Raises BackendError.

        labels: class and probability of those that the board has seen; a decoder that knows none ignores them. sampler:
        chooses the tokens; None: the most probable ones. EOS takes the place of its other end tokens.
        """
        [memory] = _outputs(self._encoder, 1, symbols[None].astype(np.float32))
        state = np.zeros((1, STATE), np.float32)
        if self._labels is not None:
            for number, probability in labels:
                state += np.float32(probability) * self._labels[number].astype(np.float32)
        tokens: list[int] = []
        log_probability = 0.0
        while len(tokens) < self._max_tokens:
            last = np.array([tokens[-1] if tokens else BOS], np.int32)
            logits, state = _outputs(self._step, 2, last, state, memory)
            token = sampler.choose(logits[0], tokens) if sampler else int(logits[0].argmax())
            relative = logits[0] - logits[0].max()
            log_probability += float(relative[token]) - math.log(float(np.exp(relative).sum()))
            if token == EOS or (sampler and token in sampler.ends):
                tokens.append(EOS)
                break
            tokens.append(token)
        return Drafted(tuple(tokens), math.exp(log_probability / len(tokens)))


def _outputs(model: Model, count: int, *inputs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    outputs = model.run(*inputs)
    if len(outputs) != count:
        raise BackendError(f"a network of the draft has {len(outputs)} outputs, want {count}: install the bundle again")
    return outputs
