"""Teaches a question: multinomial logistic regression with an L2 penalty on features of a few photos.

The penalty and the temperatures are chosen by cross-validation, which also says which accuracy to expect. The solution
lies in the span of the photos' inputs, so it is searched there: with 200 photos in 200 dimensions instead of 2,560.

What a server knows of the labels counts as if it were features: similar labels have similar rows in the bundle's
classifier, so what is learnt of a tabby cat holds for an Egyptian cat. Tried on ten of Imagenette's training classes
with ten photos each, and on eight groups of ImageNet's classes, accuracy on other photos: features alone 0.936 and
0.609; with the labels' probabilities 0.961 and 0.757, with the roots of these 0.974 and 0.752. A layer for requests
without labels, or one that is taught both ways, is no better for them than this one: 0.958, 0.960, and this one 0.960.
Knows nothing of pictures and files. The same photos give the same layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.questions import Evidence

LABEL_SCALE = 11.0  # then features and labels vary alike over ImageNet's photos
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
    temperature_alone: float  # for photos without labels of a board
    penalty: float
    # [photos, classes]: each photo's probabilities from a layer that was not taught it. NaN if it was never left out,
    # because it is its class's only one.
    held_out: NDArray[np.float64]

    def accuracy(self, labels: NDArray[np.int64]) -> float:
        """That is to be expected: of the photos that were left out once."""
        tried = np.isfinite(self.held_out[:, 0])
        return float((self.held_out[tried].argmax(1) == labels[tried]).mean())


def label_directions(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each label [labels, 1280], from the rows of the bundle's classifier, likewise."""
    centred = rows - rows.mean(0) if len(rows) else rows
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(LABEL_SCALE * centred / np.maximum(norms, 1e-9), np.float32)


def inputs(known: Sequence[Evidence], directions: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a layer is taught with, [photos, 2560]: the features, then the labels' directions, each times the root of
    its probability.
    """
    roots = np.stack([np.sqrt(photo.labels) for photo in known])
    return np.concatenate([np.stack([photo.features for photo in known]), roots @ directions], 1)


def teach(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: int,
    alone: NDArray[np.float32] | None = None,
) -> Taught:
    """Features [photos, D], labels 0..classes - 1 in the order of time, each class at least once, one of them twice.

    alone: the features of the same photos without labels of a board; by default the same. With one thread
    (torch.set_num_threads), the same bits on every machine of a kind. Raises ValueError if no class has two photos:
    nothing would choose the penalty, and no accuracy could be expected.
    """
    folds = torch.from_numpy(folds_of(labels))
    if not (folds >= 0).any():
        raise ValueError("no class has two photos: want a second one of a class at least")
    x, y = torch.from_numpy(features).double(), torch.from_numpy(labels)
    mean = x.mean(0)
    scale = float((x - mean).square().sum(1).mean().sqrt()) or 1.0  # so that the penalties fit features of any size
    basis, triangle = torch.linalg.qr(((x - mean) / scale).T)  # an orthonormal basis of the span [D, R]
    points = triangle.T.contiguous()  # the photos in it [photos, R]
    points_alone = points if alone is None else (torch.from_numpy(alone).double() - mean) / scale @ basis
    logits = {penalty: torch.full((2, len(y), classes), torch.nan, dtype=torch.float64) for penalty in PENALTIES}
    for fold in range(FOLDS):
        is_out = folds == fold
        layer = None
        for penalty in PENALTIES if is_out.any() else ():
            layer = fit(points[~is_out], y[~is_out], classes, penalty, layer)
            logits[penalty][:, is_out] = _logits(torch.stack([points, points_alone])[:, is_out], layer)
    tried = folds >= 0
    losses = {
        (penalty, temperature): _loss(logits[penalty][0, tried] / temperature, y[tried])
        for penalty in PENALTIES
        for temperature in TEMPERATURES
    }
    penalty, temperature = min(losses, key=losses.__getitem__)
    without = logits[penalty][1, tried]
    temperature_alone = min(TEMPERATURES, key=lambda temperature: _loss(without / temperature, y[tried]))
    layer = fit(points, y, classes, penalty)
    weight = layer[:, :-1] @ basis.T / scale
    bias = layer[:, -1] - weight @ mean
    held_out = (logits[penalty][0] / temperature).softmax(1)
    return Taught(
        weight.float().numpy(), bias.float().numpy(), temperature, temperature_alone, penalty, held_out.numpy()
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


def fit(points: Tensor, labels: Tensor, classes: int, penalty: float, start: Tensor | None = None) -> Tensor:
    """The layer [classes, R + 1], the bias last, with the least mean cross entropy + penalty / 2 * |weight|^2."""
    layer = points.new_zeros(classes, points.shape[1] + 1) if start is None else start.clone()
    layer.requires_grad_()
    optimiser = torch.optim.LBFGS([layer], max_iter=MAX_STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(_logits(points, layer), labels) + penalty / 2 * layer[:, :-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return layer.detach()


def _logits(points: Tensor, layer: Tensor) -> Tensor:
    return F.linear(points, layer[:, :-1], layer[:, -1])


def _loss(logits: Tensor, labels: Tensor) -> float:
    """Mean cross entropy of smoothed labels: a few photos that were all right do not prove that none is ever wrong.

    The smoothing is that of Platt, "Probabilistic outputs for support vector machines", 1999, section 2.2.
    """
    count, classes = logits.shape
    wrong = 1 / (count + 2)
    smoothing = wrong * classes / (classes - 1)  # of which the right class gets its part back
    return float(F.cross_entropy(logits, labels, label_smoothing=smoothing))
