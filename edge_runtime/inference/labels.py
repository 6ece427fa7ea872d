"""Labels on the board: the rest of the pretrained backbone, which reads a map that the head computes anyway.

It takes a fraction of the head's time. The board runs it only for a frame that no server verifies.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_runtime.inference.backends import BackendError, Model
from edge_runtime.inference.head import Codes

MAX_LABELS = 5  # of an answer, the likeliest; as on a server


class Labels:
    def __init__(self, model: Model, names: Sequence[str], temperature: float = 1.0) -> None:
        """names: of the classes, in the order of the logits. temperature: divides the logits (Guo et al., arXiv
        1706.04599), > 0; above 1 the probabilities are less sure. Raises BackendError.
        """
        if not 0 < model.scale < math.inf:  # false for NaN too
            raise BackendError(f"a code of the labels is {model.scale:g} units, want above 0: install the bundle again")
        self._model, self._names, self._scale = model, names, model.scale / temperature

    def scores(self, backbone_map: Codes) -> dict[str, float]:
        """The head's map [14, 14, 80] to the probability of the likeliest labels, best first. Raises BackendError."""
        probabilities = self.probabilities(backbone_map)
        best = np.argsort(-probabilities, kind="stable")[:MAX_LABELS]
        return {self._names[i]: float(probabilities[i]) for i in best}

    def probabilities(self, backbone_map: Codes) -> npt.NDArray[np.float32]:
        """The same of all labels, float32 [classes]."""
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
