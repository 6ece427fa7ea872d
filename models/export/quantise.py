"""Post-training quantisation of the board's networks into lists of int8 layers, from which both formats are written.

There are two: the head, and the rest of the backbone, which turns a map of the head into labels. This file
knows nothing about ONNX and LiteRT. One pass over the layers computes every output for a batch of calibration photos
twice, in floats and in int8 arithmetic. The floats give the ranges; the difference of the two corrects the biases. In
the second network it includes the error of the first. Scheme: weights symmetric per channel, activations asymmetric per
tensor (Jacob et al., arXiv 1712.05877); bias correction (Nagel et al., arXiv 1906.04721, section 4.2).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import (
    FEATURES,
    FROZEN,
    PIXEL_MEAN,
    PIXEL_SCALE,
    PIXELS,
    Block,
    Conv,
    Lite0,
    normalise,
    same_padding,
)
from models.family import Head

WEIGHT_MAX = 127  # symmetric: -128 is left out
BIAS_MAX = 2**30  # half of int32: the sum it is added to needs the rest
# Share of an activation's calibrated values that are clipped, half at each end. Against min-max it takes 6 % off the
# symbols that differ from the float head's; ten times as much clipping adds 20 %.
TAIL = 1e-4
# Logits are not clipped: the range is this many times the largest one. Photos that show a class clearly reach higher
# logits than calibration photos do, and clipped ones would make the probabilities too low.
LOGITS_HEADROOM = 1.5


@dataclass(frozen=True, slots=True)
class Activation:
    """A tensor of uint8 codes; its real value is scale * (code - zero_point)."""

    shape: tuple[int, int, int]  # height, width, channels
    scale: float  # exactly a float32
    zero_point: int  # 0..255


@dataclass(frozen=True, slots=True, eq=False)
class Int8Conv:
    """A convolution with TensorFlow's SAME padding. A ReLU6 needs no operation: the output's codes saturate at 0."""

    source: int  # index of the activation it reads
    weight: npt.NDArray[np.int8]  # [outputs, inputs / groups, kernel, kernel]
    weight_scales: npt.NDArray[np.float32]  # [outputs]
    bias: npt.NDArray[np.int32]  # [outputs], in units of source scale * weight scale
    stride: int
    groups: int


@dataclass(frozen=True, slots=True)
class Int8Add:
    """The sum of two activations."""

    left: int
    right: int


@dataclass(frozen=True, slots=True)
class Int8Mean:
    """The mean over height and width."""

    source: int


Int8Layer = Int8Conv | Int8Add | Int8Mean


@dataclass(frozen=True, slots=True, eq=False)
class Int8Network:
    """Layer i reads activations 0..i and writes activation i + 1. Activation 0 is the input."""

    activations: tuple[Activation, ...]
    layers: tuple[Int8Layer, ...]
    input_name: str
    outputs: dict[str, int]  # indices of activations; the first one is the last activation

    @property
    def codes_per_symbol(self) -> float:
        """How finely the latent of a head is resolved: codes to one symbol at gain 1.

        From 16 on rounding to codes hardly matters. A trained bottleneck has few but wide channels: measured with a
        range of 31 symbols, 8 codes, it alone changes 1 % of the symbols.
        """
        return 1.0 / self.activations[-1].scale


@dataclass(frozen=True, slots=True)
class _Stream:
    """One activation for all calibration photos, float [B, C, H, W]: exact, and as int8 arithmetic has it."""

    index: int
    exact: Tensor
    rounded: Tensor


def quantise(head: Head, photos: Tensor) -> Int8Network:
    """Quantises a trained head. photos uint8 [B, 224, 224, 3] RGB, on the head's device; 64 need about 2 GB."""
    return _quantise(head, photos)[0]


def quantise_with_labels(head: Head, backbone: Lite0, photos: Tensor) -> tuple[Int8Network, Int8Network]:
    """The head, and the backbone's layers after the frozen blocks: the head's second output to logits. See `quantise`.

    They branch off where training begins to change the head, so that the labels are those of the pretrained backbone.
    """
    int8_head, frozen = _quantise(head, photos)
    walk = _Walk()
    with torch.inference_mode():
        x = walk.start(int8_head.activations[frozen.index], frozen.exact, frozen.rounded)
        x = walk.mean(walk.conv(backbone.features, walk.blocks(backbone.blocks[FROZEN:], x)))
        linear = backbone.classifier
        logits = Conv(FEATURES, linear.out_features, 1, linear=True).to(linear.weight.device)
        logits.load_state_dict({"weight": linear.weight[..., None, None], "bias": linear.bias})
        walk.conv(logits, x, LOGITS_HEADROOM)
    return int8_head, walk.network("backbone_map", logits=len(walk.layers))


def _quantise(head: Head, photos: Tensor) -> tuple[Int8Network, _Stream]:
    """Returns the map after the frozen blocks, too."""
    walk = _Walk()
    with torch.inference_mode():
        # The codes of this input are the pixels, their real value is (x - 127) / 128: normalising costs nothing.
        exact = normalise(photos)
        x = walk.start(Activation((PIXELS, PIXELS, 3), 1.0 / PIXEL_SCALE, int(PIXEL_MEAN)), exact, exact)
        frozen = walk.blocks(head.blocks[:FROZEN], walk.conv(head.stem, x))
        walk.conv(head.bottleneck, walk.blocks(head.blocks[FROZEN:], frozen))
    return walk.network("pixels", latent=len(walk.layers), backbone_map=frozen.index), frozen


class _Walk:
    def __init__(self) -> None:
        self.activations: list[Activation] = []
        self.layers: list[Int8Layer] = []

    def network(self, input_name: str, **outputs: int) -> Int8Network:
        return Int8Network(tuple(self.activations), tuple(self.layers), input_name, outputs)

    def start(self, activation: Activation, exact: Tensor, rounded: Tensor) -> _Stream:
        self.activations.append(activation)
        return _Stream(0, exact, rounded)

    def blocks(self, blocks: nn.Module, x: _Stream) -> _Stream:
        for block in blocks.children():
            assert isinstance(block, Block)
            y = x
            for layer in block.layers:
                y = self.conv(layer, y)  # type: ignore[arg-type]
            x = self.add(x, y) if block.residual else y
        return x

    def conv(self, layer: Conv, x: _Stream, headroom: float | None = None) -> _Stream:
        stride, groups = layer.stride[0], layer.groups
        assert layer.bias is not None
        weight, bias = layer.weight.float(), layer.bias.float()
        source_scale = self.activations[x.index].scale
        # The second bound is for channels whose weights are near zero: their bias must fit its integer too.
        scales = (weight.abs().amax((1, 2, 3)) / WEIGHT_MAX).maximum(bias.abs() / (source_scale * BIAS_MAX))
        scales = scales.clamp_min(1e-12)
        codes = (weight / scales[:, None, None, None]).round()
        exact = _same_conv(x.exact, weight, stride, groups)
        rounded = _same_conv(x.rounded, codes * scales[:, None, None, None], stride, groups)
        unit = (source_scale * scales)[:, None, None]
        bias_codes = ((bias[:, None, None] + (exact - rounded).mean((0, 2, 3))[:, None, None]) / unit).round()
        exact += bias[:, None, None]
        rounded += bias_codes * unit
        if not layer.linear:
            exact = F.relu6(exact)
        conv = Int8Conv(
            x.index,
            codes.to(torch.int8).numpy(force=True),
            scales.numpy(force=True),
            bias_codes.flatten().to(torch.int32).numpy(force=True),
            stride,
            groups,
        )
        return self._append(conv, exact, rounded, headroom)

    def add(self, left: _Stream, right: _Stream) -> _Stream:
        layer = Int8Add(left.index, right.index)
        return self._append(layer, left.exact + right.exact, left.rounded + right.rounded)

    def mean(self, x: _Stream) -> _Stream:
        exact, rounded = (values.mean((2, 3), keepdim=True) for values in (x.exact, x.rounded))
        return self._append(Int8Mean(x.index), exact, rounded)

    def _append(self, layer: Int8Layer, exact: Tensor, rounded: Tensor, headroom: float | None = None) -> _Stream:
        low, high = _range(exact) if headroom is None else (float(exact.min()), headroom * float(exact.max()))
        scale = float(np.float32(max(high - low, 1e-6) / 255))
        zero_point = min(max(round(-low / scale), 0), 255)
        channels, height, width = exact.shape[1:]
        self.layers.append(layer)
        self.activations.append(Activation((height, width, channels), scale, zero_point))
        codes = (rounded / scale).round().add(zero_point).clamp(0, 255)
        return _Stream(len(self.layers), exact, (codes - zero_point) * scale)


def _range(x: Tensor) -> tuple[float, float]:
    """Smallest and largest value, 0 included so that padding is exact; less the TAIL."""
    flat, cut = x.flatten(), int(x.numel() * TAIL / 2)
    low, high = (flat.kthvalue(k).values for k in (cut + 1, flat.numel() - cut))
    return min(float(low), 0.0), max(float(high), 0.0)


def _same_conv(x: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor:
    rows, columns = (same_padding(size, weight.shape[-1], stride) for size in x.shape[-2:])
    return F.conv2d(F.pad(x, (*columns, *rows)), weight, None, stride, groups=groups)
