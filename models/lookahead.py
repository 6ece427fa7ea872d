"""Predicts a target's next words from the hidden state with which it chose its last word.

That hidden state predicts the following words well, and verification has computed it anyway. A small recurrent network,
one per target, starts from it and predicts word by word, each from the words before: Hydra (Ankner et al., arXiv
2402.05109) with one recurrent head for all distances, related to Medusa (Cai et al., arXiv 2401.10774) and EAGLE (Li et
al., arXiv 2401.15077).

It is trained in PyTorch and runs in numpy: a step takes a hundredth of a pass of the target, and the overhead of eight
PyTorch calls would be larger than the step.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_runtime.inference.bundle import UNKNOWN
from models.family import gru_step

STATE = 128  # width of the recurrent state; 256 was not better


def lookahead_file(tier: str) -> str:
    """The file's name in a bundle. It is optional there."""
    return f"lookahead-{tier}.safetensors"


class LookaheadNet(nn.Module):
    """The network in training: a gated recurrent unit (Cho et al., arXiv 1406.1078) over its own predictions.

    Its words are numbered 0..W - 1: those that the target writes in the training texts.
    """

    def __init__(self, width: int, words: int) -> None:
        """width: of the target's hidden state."""
        super().__init__()
        self.start = nn.Linear(width, STATE)
        self.input_gates = nn.Embedding(words, 3 * STATE)  # of each word
        self.state_gates = nn.Linear(STATE, 3 * STATE)
        self.out = nn.Linear(STATE, words)
        nn.init.normal_(self.input_gates.weight, std=0.1)

    def forward(self, hidden: Tensor, words: Tensor, dropout: float = 0.0) -> Tensor:
        """Teacher forcing: hidden float [..., D] and words int64 [..., K], to logits [..., K, W] of the next words.

        The first word is the one that the target chose from this hidden state.
        """
        state, logits = torch.tanh(self.start(F.dropout(hidden, dropout))), []
        for k in range(words.shape[-1]):
            state = gru_step(self.input_gates(words[..., k]), self.state_gates(state), state)
            logits.append(self.out(F.dropout(state, dropout)))
        return torch.stack(logits, -2)


class Lookahead:
    """The network in service, in numpy."""

    def __init__(self, tokens: Sequence[int], net: LookaheadNet) -> None:
        """tokens: the token of each of the network's words."""
        self.tokens = list(tokens)
        self.width = net.start.in_features
        self._words = {token: word for word, token in enumerate(self.tokens)}
        weights = {name: weight.detach().float().numpy() for name, weight in net.state_dict().items()}
        self._start, self._start_bias = weights["start.weight"], weights["start.bias"]
        self._input_gates = weights["input_gates.weight"]
        self._state_gates, self._state_bias = weights["state_gates.weight"], weights["state_gates.bias"]
        self._out, self._out_bias = weights["out.weight"], weights["out.bias"]

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], width: int, vocabulary: int) -> "Lookahead":
        """From the tensors of `tensors_of`, for a target of this width. Raises ValueError for anything else."""
        tokens = tensors.get("tokens")
        if tokens is None or tokens.ndim != 1 or tokens.is_floating_point():
            raise ValueError("want its words as whole numbers in a tensor `tokens`")
        if not len(tokens) or not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise ValueError(f"its words are tokens outside of 0..{vocabulary - 1}, or none")
        net = LookaheadNet(width, len(tokens))
        try:
            net.load_state_dict({name: weight.float() for name, weight in tensors.items() if name != "tokens"})
        except RuntimeError as error:
            raise ValueError(f"not for a target of width {width}: {error}") from error
        return cls(tokens.tolist(), net)

    def propose(self, hidden: NDArray[np.float32], token: int, count: int) -> tuple[int, ...]:
        """Up to `count` tokens that are likely to follow the token that the target chose from this hidden state [D].

        Before the first word, pass BOS and zeros. Returns fewer if the text seems to end, none after an unknown token.
        """
        word, proposed = self._words.get(token), list[int]()
        # Row by row: for several rows at once BLAS would use threads, which takes longer.
        state = np.tanh(self._start @ hidden + self._start_bias)
        while word is not None and len(proposed) < count:
            x, h = self._input_gates[word], self._state_gates @ state + self._state_bias
            reset, update = np.split(1.0 / (1.0 + np.exp(-(x + h)[: 2 * STATE])), 2)
            new = np.tanh(x[2 * STATE :] + reset * h[2 * STATE :])
            state = new + update * (state - new)
            word = int((self._out @ state + self._out_bias).argmax())
            if self.tokens[word] <= UNKNOWN:
                break
            proposed.append(self.tokens[word])
        return tuple(proposed)


def tensors_of(tokens: Sequence[int], net: LookaheadNet) -> dict[str, Tensor]:
    """The tensors of its file in a bundle: tokens int32 [W], weights float16."""
    weights = {name: weight.detach().to(torch.float16).contiguous() for name, weight in net.state_dict().items()}
    return {"tokens": torch.tensor(tokens, dtype=torch.int32), **weights}
