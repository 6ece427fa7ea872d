"""Labels on the board: the rest of the pretrained backbone, which reads a map that the head computes anyway.

It takes a fraction of the head's time. It sees the whole photo and not only the bits that are sent, so its labels are
better than a server's, and they take ten bytes of a request.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_runtime.inference.backends import BackendError, Model
from edge_runtime.inference.head import Codes, Latent
from edge_runtime.wire.labels import MAX_LABELS

MIN_SENT = 0.02  # probability of a label that is worth its bytes


class Labels:
    def __init__(self, model: Model, names: Sequence[str], temperature: float = 1.0) -> None:
        """names: of the classes, in the order of the logits. temperature: divides the logits (Guo et al., arXiv
        1706.04599), > 0; above 1 the probabilities are less sure. Raises BackendError.
        """
        if not 0 < model.scale < math.inf:  # false for NaN too
            raise BackendError(f"a code of the labels is {model.scale:g} units, want above 0: install the bundle again")
        self._model, self._names, self._scale = model, names, model.scale / temperature

    def likeliest(self, backbone_map: Codes) -> list[tuple[int, float]]:
        """The head's map [14, 14, 80] to (class, probability) of the likeliest, best first. Raises BackendError."""
        probabilities = self.probabilities(backbone_map)
        best = np.argsort(-probabilities, kind="stable")[:MAX_LABELS]
        return [(int(i), float(probabilities[i])) for i in best]

    def scores(self, likeliest: Sequence[tuple[int, float]]) -> dict[str, float]:
        """The same with the labels' names."""
        return {self._names[i]: probability for i, probability in likeliest}

    def probabilities(self, backbone_map: Codes) -> npt.NDArray[np.float32]:
        """The probabilities of all labels, float32 [classes]."""
        codes = self._model.run(backbone_map[None])[0].ravel()
        if len(codes) != len(self._names):
            raise BackendError(
                f"the network of the labels has {len(codes)} classes, the manifest {len(self._names)}: "
                "install the bundle again"
            )
        # The largest is 0, so that nothing overflows. The zero point cancels.
        powers = np.exp((codes.astype(np.float32) - codes.max()) * self._scale)
        probabilities: npt.NDArray[np.float32] = powers / powers.sum()
        return probabilities


def labels_seen(labels: Labels | None, latent: Latent) -> list[tuple[int, float]]:
    """Those of a frame that are worth sending. Without a network for them, or its input, none. Raises BackendError."""
    if labels is None or latent.backbone_map is None:
        return []
    return worth_sending(labels.likeliest(latent.backbone_map))


def worth_sending(likeliest: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Those that tell a server something."""
    return [(number, probability) for number, probability in likeliest if probability >= MIN_SENT]
