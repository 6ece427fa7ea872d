"""Writes an int8 network as a LiteRT (TensorFlow Lite) file, operator by operator.

The flatbuffer is built with the schema's object classes, which are part of ai-edge-litert. No converter is needed, and
the same network gives the same bytes. Quantisation as in TensorFlow Lite's "8-bit quantization specification": int8
activations, hence zero points 128 lower than in the ONNX file, and the same scales.
"""

from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from models.export.quantise import Activation, Int8Add, Int8Conv, Int8Mean, Int8Network

SCHEMA_VERSION = 3
ZERO_SHIFT = 128  # from uint8 codes to int8 codes
_TYPES = {
    np.dtype(np.int8): schema.TensorType.INT8,
    np.dtype(np.uint8): schema.TensorType.UINT8,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.float32): schema.TensorType.FLOAT32,
}


class LitertGraph:
    """A graph under construction. Tensors are known by their index."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: list[tuple[int, int]] = []  # builtin operator and its version
        self.buffers: list[Any] = [schema.BufferT()]  # buffer 0 is the empty one, by the schema

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        scales: npt.NDArray[np.float32] | None = None,
        zero_point: int = 0,
        axis: int = 0,
        buffer: int = 0,
    ) -> int:
        """Adds a tensor; with `scales` quantised, per tensor or along `axis`."""
        quantisation = None
        if scales is not None:
            quantisation = schema.QuantizationParametersT()
            quantisation.scale = scales.astype(np.float32)
            quantisation.zeroPoint = np.full(len(scales), zero_point, np.int64)
            quantisation.quantizedDimension = axis
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type = name, np.array(shape, np.int32), _TYPES[np.dtype(dtype)]
        tensor.quantization, tensor.buffer = quantisation, buffer
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(
        self, name: str, value: npt.NDArray[Any], scales: npt.NDArray[np.float32] | None = None, axis: int = 0
    ) -> int:
        """Adds a tensor with a value."""
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
        self.buffers.append(buffer)
        return self.tensor(name, value.shape, value.dtype, scales, axis=axis, buffer=len(self.buffers) - 1)

    def operator(
        self, name: str, inputs: list[int], outputs: list[int], version: int = 1, options: str = "", **fields: object
    ) -> None:
        """Adds an operation by its builtin name; `options` is its options table without the ending `Options`."""
        code = getattr(schema.BuiltinOperator, name), version
        if code not in self.codes:
            self.codes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = self.codes.index(code), inputs, outputs
        if options:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, f"{options}Options")
            operator.builtinOptions = getattr(schema, f"{options}OptionsT")()
            for field, value in fields.items():
                assert hasattr(operator.builtinOptions, field), field
                setattr(operator.builtinOptions, field, value)
        self.operators.append(operator)

    def to_bytes(self, inputs: list[int], outputs: list[int]) -> bytes:
        subgraph = schema.SubGraphT()
        subgraph.tensors, subgraph.operators = self.tensors, self.operators
        subgraph.inputs, subgraph.outputs, subgraph.name = inputs, outputs, "main"
        model = schema.ModelT()
        model.version, model.description = SCHEMA_VERSION, "aiflow-edge"
        model.subgraphs, model.buffers, model.operatorCodes = [subgraph], self.buffers, []
        for builtin, version in self.codes:
            code = schema.OperatorCodeT()
            # Old readers know only the 8-bit field, which saturates (schema.fbs, OperatorCode).
            code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), version
            model.operatorCodes.append(code)
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def write_litert(network: Int8Network) -> bytes:
    """An int8 network as a LiteRT file. Inputs and outputs are those of `write_onnx`, the first output as int8 codes.

    Its scale and zero point are the tensor's own.
    """
    graph, activations = LitertGraph(), network.activations
    tensors = [_activation(graph, activation, f"layer{i}") for i, activation in enumerate(activations)]
    entry = _activation(graph, activations[0], network.input_name, dtype=np.uint8)
    graph.operator("QUANTIZE", [entry], [tensors[0]], options="Quantize")
    for i, layer in enumerate(network.layers):
        if isinstance(layer, Int8Add):
            graph.operator("ADD", [tensors[layer.left], tensors[layer.right]], [tensors[i + 1]], 2, "Add")
        elif isinstance(layer, Int8Mean):
            axes = graph.constant(f"layer{i + 1}.axes", np.array([1, 2], np.int32))
            graph.operator("MEAN", [tensors[layer.source], axes], [tensors[i + 1]], 2, "Reducer", keepDims=True)
        else:
            source_scale = activations[layer.source].scale
            _conv(graph, layer, tensors[layer.source], source_scale, tensors[i + 1], f"layer{i + 1}")
    first, *others = network.outputs
    height, width, channels = activations[-1].shape
    exits = {first: _activation(graph, activations[-1], first, (1, channels, height, width))}
    order = graph.constant("order", np.array([0, 3, 1, 2], np.int32))
    graph.operator("TRANSPOSE", [tensors[-1], order], [exits[first]], 2, "Transpose")
    for name in others:
        index = network.outputs[name]
        exits[name] = _activation(graph, activations[index], name, dtype=np.uint8)
        graph.operator("QUANTIZE", [tensors[index]], [exits[name]], options="Quantize")
    return graph.to_bytes([entry], list(exits.values()))


def _activation(
    graph: LitertGraph,
    activation: Activation,
    name: str,
    shape: tuple[int, ...] | None = None,
    dtype: npt.DTypeLike = np.int8,
) -> int:
    zero_point = activation.zero_point - (ZERO_SHIFT if dtype is np.int8 else 0)
    return graph.tensor(
        name, shape or (1, *activation.shape), dtype, np.array([activation.scale], np.float32), zero_point
    )


def _conv(graph: LitertGraph, layer: Int8Conv, x: int, source_scale: float, y: int, name: str) -> None:
    depthwise = layer.groups > 1
    # LiteRT's layouts: convolution [outputs, k, k, inputs], depthwise [1, k, k, channels].
    weight = layer.weight.transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1))
    weights = graph.constant(f"{name}.weight", weight, layer.weight_scales, axis=3 if depthwise else 0)
    bias = graph.constant(f"{name}.bias", layer.bias, np.float32(source_scale) * layer.weight_scales)
    fields = {"padding": schema.Padding.SAME, "strideH": layer.stride, "strideW": layer.stride}
    if depthwise:
        fields["depthMultiplier"] = 1
    kind, options = ("DEPTHWISE_CONV_2D", "DepthwiseConv2D") if depthwise else ("CONV_2D", "Conv2D")
    graph.operator(kind, [x, weights, bias], [y], 3, options, **fields)
