"""Writes an int8 network as an ONNX graph of the QDQ form, which onnxruntime fuses to integer operators.

Activations are uint8 and weights int8, the pair for which onnxruntime has its fastest kernels (its documentation,
"Quantize ONNX models", data type selection). The same network gives the same bytes.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.backbone import same_padding
from models.export.quantise import Activation, Int8Add, Int8Conv, Int8Mean, Int8Network

OPSET, IR_VERSION = 17, 8  # old enough for every onnxruntime that the board's extra admits
PRODUCER = "aiflow-edge"


class OnnxGraph:
    """A graph under construction: nodes and constants by name, in order."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Adds an operation with one output and returns its name."""
        self.nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    def constant(self, name: str, value: npt.NDArray[np.generic] | np.generic) -> str:
        """Adds a constant and returns its name."""
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def to_bytes(
        self, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto], notes: dict[str, str]
    ) -> bytes:
        """The whole file; `notes` are kept as its metadata. Raises onnx.checker.ValidationError for a faulty graph."""
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name=PRODUCER
        )
        helper.set_model_props(model, notes)
        onnx.checker.check_model(model, full_check=True)
        data: bytes = model.SerializeToString(deterministic=True)
        return data


def write_onnx(network: Int8Network) -> bytes:
    """An int8 network as an ONNX file. Its input and its outputs are uint8 codes.

    A head reads `pixels` [1, 224, 224, 3] RGB and writes `latent` [1, 64, 7, 7] and `backbone_map` [1, 14, 14, 80]. The
    labels read `backbone_map` and write `logits` [1, 1000, 1, 1]. The first output has its channels first, all else has
    them last. Scale and zero point of the first output are in the file's metadata, as the board's backend wants them.
    """
    graph, activations, entry, outputs = OnnxGraph(), network.activations, network.input_name, network.outputs
    first, *others = outputs
    names = [entry, *(f"layer{i}" for i in range(len(network.layers) - 1)), first]
    units = [_units(graph, activation, name) for activation, name in zip(activations, names, strict=True)]
    planes = graph.node("Transpose", [entry], "planes", perm=[0, 3, 1, 2])
    real = [graph.node("DequantizeLinear", [planes, *units[0]], f"{entry}.real")]
    for layer, unit, name in zip(network.layers, units[1:], names[1:], strict=True):
        if isinstance(layer, Int8Add):
            y = graph.node("Add", [real[layer.left], real[layer.right]], f"{name}.sum")
        elif isinstance(layer, Int8Mean):
            y = graph.node("GlobalAveragePool", [real[layer.source]], f"{name}.mean")
        else:
            y = _conv(graph, layer, real[layer.source], activations[layer.source], name)
        graph.node("QuantizeLinear", [y, *unit], name)
        if name != first:
            real.append(graph.node("DequantizeLinear", [name, *unit], f"{name}.real"))
    height, width, channels = activations[-1].shape
    shapes = {first: (channels, height, width)}
    for name in others:
        graph.node("Transpose", [names[outputs[name]]], name, perm=[0, 2, 3, 1])
        shapes[name] = activations[outputs[name]].shape
    return graph.to_bytes(
        "network",
        [helper.make_tensor_value_info(entry, TensorProto.UINT8, [1, *activations[0].shape])],
        [helper.make_tensor_value_info(name, TensorProto.UINT8, [1, *shape]) for name, shape in shapes.items()],
        {"scale": repr(activations[-1].scale), "zero_point": str(activations[-1].zero_point)},
    )


def _conv(graph: OnnxGraph, layer: Int8Conv, x: str, source: Activation, name: str) -> str:
    unit = np.float32(source.scale) * layer.weight_scales
    scales, units = graph.constant(f"{name}.weight_scales", layer.weight_scales), graph.constant(f"{name}.units", unit)
    weight_codes = graph.constant(f"{name}.weight_codes", layer.weight)
    bias_codes = graph.constant(f"{name}.bias_codes", layer.bias)
    weight_zero = graph.constant(f"{name}.weight_zero", np.zeros(len(unit), np.int8))
    bias_zero = graph.constant(f"{name}.bias_zero", np.zeros(len(unit), np.int32))
    weight = graph.node("DequantizeLinear", [weight_codes, scales, weight_zero], f"{name}.weight", axis=0)
    bias = graph.node("DequantizeLinear", [bias_codes, units, bias_zero], f"{name}.bias", axis=0)
    kernel = layer.weight.shape[-1]
    (top, bottom), (left, right) = (same_padding(size, kernel, layer.stride) for size in source.shape[:2])
    return graph.node(
        "Conv",
        [x, weight, bias],
        f"{name}.conv",
        kernel_shape=[kernel, kernel],
        strides=[layer.stride] * 2,
        pads=[top, left, bottom, right],
        group=layer.groups,
    )


def _units(graph: OnnxGraph, activation: Activation, name: str) -> list[str]:
    return [
        graph.constant(f"{name}.scale", np.float32(activation.scale)),
        graph.constant(f"{name}.zero", np.uint8(activation.zero_point)),
    ]
