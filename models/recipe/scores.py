"""CIDEr on token ids, for decisions during training. `aiflow evaluate` reports pycocoevalcap's figures.

Vedantam et al., arXiv 1411.5726, variant CIDEr-D: tf-idf vectors of 1- to 4-grams, cosine similarity with a Gaussian
length penalty, document frequencies over the given references.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from edge_runtime.inference.bundle import EOS, PAD
from models.recipe.workspace import Workspace

MAX_N = 4
SIGMA = 6.0
Grams = Counter[tuple[int, ...]]


def grams(tokens: Sequence[int]) -> Grams:
    """All 1- to 4-grams of a text."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(tokens) - n + 1))


class Cider:
    """Scores texts against the references of a set of photos."""

    def __init__(self, references: Sequence[Sequence[Sequence[int]]], end: bool = False) -> None:
        """end: append the end token to every text, so that its position counts (Rennie et al., section 5)."""
        self.end = [EOS] if end else []
        counted = [[grams([*text, *self.end]) for text in texts] for texts in references]
        self.frequency: Counter[tuple[int, ...]] = Counter(g for texts in counted for g in set().union(*texts))
        self.log_documents = math.log(len(references))
        self.references = [
            [(*self._vector(c), len(t) + len(self.end)) for c, t in zip(cs, ts, strict=True)]
            for cs, ts in zip(counted, references, strict=True)
        ]

    def _vector(self, counts: Grams) -> tuple[list[dict[tuple[int, ...], float]], list[float]]:
        vectors: list[dict[tuple[int, ...], float]] = [{} for _ in range(MAX_N)]
        for gram, count in counts.items():
            vectors[len(gram) - 1][gram] = count * (self.log_documents - math.log(max(1, self.frequency[gram])))
        return vectors, [math.sqrt(sum(v * v for v in vector.values())) for vector in vectors]

    def score(self, photo: int, text: Sequence[int]) -> float:
        """CIDEr-D of one text for one photo, 0 to 10, the scale of published figures."""
        vectors, norms = self._vector(grams([*text, *self.end]))
        total = 0.0
        for others, other_norms, length in self.references[photo]:
            penalty = math.exp(-((len(text) + len(self.end) - length) ** 2) / (2 * SIGMA**2))
            for mine, theirs, a, b in zip(vectors, others, norms, other_norms, strict=True):
                if a > 0 and b > 0:
                    total += (
                        penalty * sum(min(v, theirs[g]) * theirs[g] for g, v in mine.items() if g in theirs) / (a * b)
                    )
        return 10 * total / MAX_N / len(self.references[photo])


def strip(row: list[int]) -> list[int]:
    """The words of a padded row, without start, end and padding."""
    return [t for t in row[1:] if t not in (PAD, EOS)]


def references(captions: np.ndarray) -> list[list[list[int]]]:
    """The texts of each photo from its padded captions, int16 [N, 5, T]."""
    return [[strip(row) for row in texts if row[0] != PAD] for texts in captions.tolist()]


def cider(
    work: Workspace, split: str, write: Callable[[np.ndarray], list[list[int]]], limit: int | None = None
) -> dict[str, float]:
    """Mean CIDEr-D on each collection of a split: of all photos, or of at most `limit` of each.

    write: from the numbers of photos to a text for each.
    """
    collections = np.load(work / f"collections-{split}.npy")
    names = (work / "collections.txt").read_text().split()
    figures = {}
    for number in np.unique(collections):
        photos = np.flatnonzero(collections == number)[:limit]
        figures[f"cider_{names[number]}"] = float(np.mean(ciders(work, split, photos, write(photos))))
    return figures


def ciders(work: Workspace, split: str, photos: np.ndarray, texts: list[list[int]]) -> list[float]:
    """CIDEr-D of one text for each of these photos of one collection."""
    scorer = Cider(references(np.load(work / f"captions-{split}.npy")[photos]))
    return [scorer.score(i, text) for i, text in enumerate(texts)]
