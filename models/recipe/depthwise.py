"""Depthwise convolutions of small maps as batched matrix products, for training on CPUs.

The backward pass of depthwise convolutions takes 70 % of a training step of the tail in PyTorch's CPU build. A 7 x 7
map is small enough to write each channel's convolution as one matrix, and matrix products are fast on CPUs. Function,
weights and gradients are the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Conv, same_padding


class MatrixDepthwise(nn.Module):
    """Replaces a depthwise `Conv` on maps of one size. It shares the convolution's parameters."""

    taps: Tensor

    def __init__(self, conv: Conv, size: int) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        before, _ = same_padding(size, kernel, stride)
        self.out_size = -(-size // stride)
        # Output (y, x) sees input (v, u) through tap (v - stride * y + before, u - stride * x + before).
        at_in, at_out = torch.arange(size), torch.arange(self.out_size)
        tap = at_in[:, None] - stride * at_out[None] + before  # [in, out]
        tap = torch.where((tap >= 0) & (tap < kernel), tap, -1)
        rows, columns = tap[:, None, :, None], tap[None, :, None, :]
        index = torch.where((rows >= 0) & (columns >= 0), rows * kernel + columns, kernel * kernel).reshape(-1)
        # One-hot columns: a matrix product with them is several times faster than an index, above all backwards.
        taps = F.one_hot(index, kernel * kernel + 1)[:, :-1].T.to(torch.bfloat16).contiguous()
        self.register_buffer("taps", taps, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, H, H] to float [B, C, H', H'], ReLU6 applied."""
        B, C, H, W = x.shape
        out = self.out_size * self.out_size
        matrices = (self.weight.reshape(C, -1).to(torch.bfloat16) @ self.taps).view(C, H * W, out)
        columns = x.flatten(2).transpose(0, 1).to(torch.bfloat16).contiguous()  # [C, B, H * H]
        y = torch.bmm(columns, matrices).transpose(0, 1).reshape(B, C, self.out_size, self.out_size)
        assert self.bias is not None
        return F.relu6(y.to(x.dtype) + self.bias[:, None, None].to(x.dtype))


def use_matrices(blocks: nn.Sequential, size: int) -> None:
    """Replaces the depthwise convolutions of a chain of blocks whose input is size x size, in place."""
    for block in blocks:
        layers = block.layers
        assert isinstance(layers, nn.Sequential)
        for i, layer in enumerate(layers):
            if isinstance(layer, Conv) and layer.groups > 1:
                layers[i] = MatrixDepthwise(layer, size)
                size = -(-size // layer.stride[0])
