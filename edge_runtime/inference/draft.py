"""The board's own writer: symbols to a draft, one token after the other, always the likeliest."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_runtime.inference.backends import Model
from edge_runtime.inference.bundle import BOS, EOS

STATE = 256  # width of the recurrent state


@dataclass(frozen=True, slots=True)
class Drafted:
    """What the board would say."""

    tokens: tuple[int, ...]  # the end token included if the text ended
    confidence: float  # geometric mean of the tokens' probabilities, 0..1; 0 for no tokens


class Draft:
    """A loaded draft decoder: `look` once a frame, `step` once a token."""

    def __init__(self, look: Model, step: Model, max_tokens: int) -> None:
        self._look, self._step, self._max_tokens = look, step, max_tokens

    def write(self, symbols: npt.NDArray[Any]) -> Drafted:
        """Symbols [64, 7, 7] to a draft that ends with EOS or after max_tokens. Raises BackendError."""
        (memory,) = self._look.run(symbols[None].astype(np.float32))
        state = np.zeros((1, STATE), np.float32)
        tokens: list[int] = []
        log_probability = 0.0
        while len(tokens) < self._max_tokens:
            logits, state = self._step.run(np.array([tokens[-1] if tokens else BOS], np.int32), state, memory)
            token = int(logits[0].argmax())
            log_probability -= math.log(float(np.exp(logits[0] - logits[0, token]).sum()))
            tokens.append(token)
            if token == EOS:
                break
        return Drafted(tuple(tokens), math.exp(log_probability / len(tokens)))
