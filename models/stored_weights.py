"""How a bundle stores weights: float16, and large tables as int8 rows with a float32 scale each.

The embeddings and the classifier are a third of a bundle. A row's rounding error is at most 1/254 of its largest
weight, far below the differences that decide between two words.
"""

import torch
from torch import Tensor

SCALES = ".scales"  # after the name of an int8 table
LARGE = 1_000_000  # weights; from this size on, a matrix is stored as int8


def pack(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a network to the tensors of its file."""
    packed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if weight.ndim == 2 and weight.numel() >= LARGE:
            scales = weight.float().abs().amax(1) / 127
            rows = weight.float() / scales.clamp_min(torch.finfo().tiny)[:, None]
            packed[name], packed[name + SCALES] = rows.round().to(torch.int8), scales
        else:
            packed[name] = weight.to(torch.float16).contiguous()
    return packed


def unpack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file to float32 weights. Raises ValueError if an int8 table lacks its scales."""
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            scales = tensors.get(name + SCALES)
            if scales is None or scales.shape != tensor.shape[:1]:
                raise ValueError(f"the int8 table {name[:128]!r} has no scale for each of its rows")
            weights[name] = tensor.float() * scales.float()[:, None]
        elif tensors.get(name.removesuffix(SCALES), tensor).dtype != torch.int8:
            weights[name] = tensor.float()
    return weights
