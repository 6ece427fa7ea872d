"""Packed weights: in the memory layout that a CPU's matrix products read fastest.

In each pass, PyTorch's ordinary product first rearranges the weights, and for a few rows that takes longer than the
product itself. oneDNN can do it once. The operators are those that PyTorch's compiler uses for frozen networks on a
CPU. They are not a public interface, so `pack` tries them first, and their results must pass the start test.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Conv
from models.family import FeedForward, MatrixConv, Tail, TextDecoder

logger = logging.getLogger(__name__)

ROWS = 8  # of the inputs that oneDNN chooses the layout for: the fastest of 1, 8 and 64


class PackedLinear(nn.Module):
    """A linear layer with packed weights, which cannot be trained or stored."""

    def __init__(self, weight: Tensor, bias: Tensor, has_gelu: bool = False) -> None:
        """weight [outputs, inputs], bias [outputs]; has_gelu: a GELU follows, computed by the same operator."""
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        self._bias = bias.detach()
        self._then: tuple[str, list[float], str] = ("gelu", [], "none") if has_gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., inputs] to float [..., outputs]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, *self._then)
        return y


class PackedConv(nn.Module):
    """A 1 x 1 convolution, as a linear layer over channels."""

    def __init__(self, conv: Conv) -> None:
        super().__init__()
        assert conv.bias is not None
        self.product, self.linear = PackedLinear(conv.weight.flatten(1), conv.bias), conv.linear

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, H, W] to float [B, C', H, W]."""
        y: Tensor = self.product(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        # Unlike the GELU not by the same operator: oneDNN's ReLU6 turns NaN into a number.
        return y if self.linear else F.relu6(y)


def pack(tail: Tail, *decoders: TextDecoder) -> bool:
    """Packs the networks' weights in place; they cannot be trained or saved afterwards.

    Returns False and changes nothing if the device is no CPU, or if PyTorch's operators are missing or wrong here.
    """
    if tail.linear.weight.device.type != "cpu" or not _works():
        return False
    for network in (tail, *decoders):
        _pack_below(network)
    for decoder in decoders:
        decoder.scores = PackedLinear(decoder.tokens.weight, decoder.never_emitted)
    return True


def _pack_below(network: nn.Module) -> None:
    for name, layer in network.named_children():
        if isinstance(layer, FeedForward):
            first = layer[0]
            assert isinstance(first, nn.Linear)
            layer[0], layer[1] = PackedLinear(first.weight, first.bias, has_gelu=True), nn.Identity()
            _pack_below(layer)
        elif isinstance(layer, nn.Linear):
            setattr(network, name, PackedLinear(layer.weight, layer.bias))
        elif isinstance(layer, MatrixConv):
            assert layer.bias is not None
            layer.product = PackedLinear(layer.matrix, layer.bias)
        elif isinstance(layer, Conv) and layer.kernel_size == (1, 1):
            setattr(network, name, PackedConv(layer))
        else:
            _pack_below(layer)


def _works() -> bool:
    x, weight, bias = torch.rand(3, 5, 32), torch.rand(16, 32) - 0.5, torch.rand(16)
    try:
        found = PackedLinear(weight, bias)(x)
    except (AttributeError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        logger.info("weights are not packed reason=%s", str(error).partition("\n")[0])
        return False
    return torch.allclose(found, F.linear(x, weight, bias), atol=1e-4)
