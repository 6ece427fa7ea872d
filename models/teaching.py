"""Teaches a question: multinomial logistic regression with an L2 penalty on features of a few photos.

The penalty and a temperature are chosen by cross-validation, which also says which accuracy to expect. The solution
lies in the span of the photos' features, so it is searched there: with 200 photos in 200 dimensions instead of 1,280.
Knows nothing of pictures, bundles and files. The same photos give the same layer.
"""

from dataclasses import dataclass
from math import exp

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

FOLDS = 5
PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4)  # the strongest first: each solution is the next one's start
MAX_STEPS = 100  # of LBFGS
TEMPERATURES = tuple(10 ** (i / 20) for i in range(-40, 41))  # 0.01 to 100


@dataclass(frozen=True)
class Taught:
    """A layer and what to expect of it."""

    weight: NDArray[np.float32]  # [classes, D]
    bias: NDArray[np.float32]  # [classes]
    temperature: float
    penalty: float
    # [photos, classes]: each photo's probabilities from a layer that was not taught it. NaN if it was never left out,
    # because it is its class's only one.
    held_out: NDArray[np.float64]

    def accuracy(self, labels: NDArray[np.int64]) -> float:
        """That is to be expected: of the photos that were left out once."""
        tried = np.isfinite(self.held_out[:, 0])
        return float((self.held_out[tried].argmax(1) == labels[tried]).mean())


def teach(features: NDArray[np.float32], labels: NDArray[np.int64], classes: int) -> Taught:
    """Features [photos, D], labels 0..classes - 1 in the order of time, each class at least once, one of them twice."""
    mean = features.mean(0, dtype=np.float64)
    centred = features - mean
    scale = float(np.sqrt((centred**2).sum(1).mean())) or 1.0  # so that the penalties fit features of any size
    basis, points = _in_span(centred / scale)
    folds = folds_of(labels)
    logits = {penalty: np.full((len(labels), classes), np.nan) for penalty in PENALTIES}
    for fold in range(FOLDS):
        if not (is_out := folds == fold).any():
            continue
        layer = None
        for penalty in PENALTIES:
            layer = fit(points[~is_out], labels[~is_out], classes, penalty, layer)
            logits[penalty][is_out] = points[is_out] @ layer[0].T + layer[1]
    tried = folds >= 0
    losses = {
        (penalty, temperature): _loss(logits[penalty][tried] / temperature, labels[tried])
        for penalty in PENALTIES
        for temperature in TEMPERATURES
    }
    penalty, temperature = min(losses, key=losses.__getitem__)
    weight, bias = fit(points, labels, classes, penalty)
    weight = weight @ basis.T / scale
    return Taught(
        weight.astype(np.float32),
        (bias - weight @ mean).astype(np.float32),
        temperature,
        penalty,
        _softmax(logits[penalty] / temperature),
    )


def folds_of(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The fold in which each photo is left out; -1, never: its class has no other.

    Each class is cut into runs. Photos that follow each other are often of the same minute, and a layer that has seen
    one of them knows the others too well.
    """
    folds = np.full(len(labels), -1)
    for label in np.unique(labels):
        (places,) = np.nonzero(labels == label)
        if len(places) > 1:
            folds[places] = np.arange(len(places)) * min(FOLDS, len(places)) // len(places)
    return folds


def fit(
    points: NDArray[np.float64],
    labels: NDArray[np.int64],
    classes: int,
    penalty: float,
    start: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight [classes, D] and bias [classes] with the least mean cross entropy + penalty / 2 * |weight|^2."""
    x, y = torch.from_numpy(points), torch.from_numpy(labels)
    weight, bias = start or (np.zeros((classes, points.shape[1])), np.zeros(classes))
    layer = torch.from_numpy(np.column_stack([weight, bias])).requires_grad_()
    optimiser = torch.optim.LBFGS([layer], max_iter=MAX_STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(x, layer[:, :-1], layer[:, -1]), y)
        value = value + penalty / 2 * layer[:, :-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    found: NDArray[np.float64] = layer.detach().numpy()
    return found[:, :-1], found[:, -1]


def _in_span(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """An orthonormal basis [D, R] of the points' span, and the points [N, D] in it [N, R]."""
    basis, triangle = np.linalg.qr(points.T)
    return basis, np.ascontiguousarray(triangle.T)


def _loss(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean cross entropy of smoothed labels: a few photos that were all right do not prove that none is ever wrong.

    The smoothing is that of Platt, "Probabilistic outputs for support vector machines", 1999, section 2.2.
    """
    count, classes = logits.shape
    probabilities = _softmax(logits).clip(exp(-50))
    wrong = 1 / (count + 2)
    shares = np.full_like(logits, wrong / (classes - 1))
    shares[np.arange(count), labels] = 1 - wrong
    return float(-(shares * np.log(probabilities)).sum(1).mean())


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    odds = np.exp(logits - logits.max(1, keepdims=True))
    shares: NDArray[np.float64] = odds / odds.sum(1, keepdims=True)
    return shares
