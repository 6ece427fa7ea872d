"""Labels as words: what a decoder sees of a classifier's guesses."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from edge_runtime.inference.bundle import PAD
from models.captions import words_of

LIKELIEST = 5  # labels at most
MIN_PROBABILITY = 0.04  # of a label whose words are seen


def words_of_labels(names: Sequence[str], vocabulary: Sequence[str]) -> list[tuple[int, ...]]:
    """The token ids of each label's name. Words that the vocabulary lacks are left out."""
    ids = {word: i for i, word in enumerate(vocabulary)}
    return [tuple(ids[word] for word in words_of(name) if word in ids) for name in names]


def label_words(probabilities: Tensor, words: Sequence[tuple[int, ...]], count: int) -> list[int]:
    """The words of the likeliest labels, the likeliest first: `count` token ids, PAD at the end.

    probabilities: float [classes]; words: of each class.
    """
    best = probabilities.topk(min(LIKELIEST, len(words)))
    likely = [i for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True) if p >= MIN_PROBABILITY]
    found = list(dict.fromkeys(token for i in likely for token in words[i]))[:count]
    return found + [PAD] * (count - len(found))


def with_seen(probabilities: Tensor, seen: Mapping[int, float]) -> Tensor:
    """What the features say of the labels, float [classes], corrected by those that the board has seen: class to
    probability. The features share out what these leave among the other classes.
    """
    if not seen:
        return probabilities
    corrected, classes = probabilities.clone(), list(seen)
    corrected[classes] = 0.0
    corrected *= max(0.0, 1.0 - sum(seen.values())) / corrected.sum().clamp_min(1e-9)
    corrected[classes] = torch.tensor(list(seen.values()), dtype=corrected.dtype, device=corrected.device)
    return corrected


def some_words(rows: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Each row's first k words, k random, so that a decoder learns to do with few or none: int64, the same shape."""
    kept = rng.integers(0, (rows != PAD).sum(1) + 1)
    return torch.from_numpy(np.where(np.arange(rows.shape[1]) < kept[:, None], rows, PAD).astype(np.int64))
