"""Image tokens as vLLM's chat completions take them: the base64 of a file that torch.save writes.

vLLM's documentation, "Multimodal Inputs", section "Image Embedding Inputs": the tensor has the shape (1, tokens, hidden
size of the language model), and vLLM reads it with `torch.load(weights_only=True)`. Here such files are only written.
"""

import base64
import io

import torch
from torch import Tensor

from server.received import Received
from server.targets.features import FeatureReader


class ImageEmbeds:
    """Encodes the image tokens of a tail, on any number of threads."""

    def __init__(self, reader: FeatureReader) -> None:
        self._reader, self.bundle, self.record = reader, reader.bundle, reader.record

    def tokens(self, received: Received) -> str:
        """The image tokens for a request with a latent. Raises BitstreamError and FeaturesError."""
        return encoded(self._reader.tokens(received))

    def mean(self) -> str:
        """The mean image tokens of the photos that the tail was made with."""
        return encoded(self._reader.reader.tower_tail.mean)


def encoded(tokens: Tensor) -> str:
    """Image tokens [N, D] as a file with a tensor bfloat16 [1, N, D], in base64.

    bfloat16 has the range of float32 in half of its bytes, and vLLM converts it to the type that its model computes in.
    """
    file = io.BytesIO()
    torch.save(tokens[None].to("cpu", torch.bfloat16), file)
    return base64.b64encode(file.getvalue()).decode()
