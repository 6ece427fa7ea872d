"""Exports the draft decoder for both runtimes: int8 weights, activations quantised at run time.

The decoder is written once in terms of a few operations, and each file format implements those operations. Weights are
symmetric per output channel. No calibration is needed: the runtime measures the range of each activation when it
occurs, which is fast for such short rows.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, ValueInfoProto, helper
from torch import Tensor

from models.export import litert_graph, onnx_graph
from models.family import DRAFT_EMBEDDING, DRAFT_MEMORY, DRAFT_STATE, LATENT, POSITIONS, DraftDecoder

SAME, RELU = schema.Padding.SAME, schema.ActivationFunctionType.RELU
INT8, FLOAT32 = schema.TensorType.INT8, schema.TensorType.FLOAT32
MEMORY = (1, POSITIONS, DRAFT_MEMORY)
Floats = npt.NDArray[np.float32]
Name = TypeVar("Name")  # a tensor's identifier: str in ONNX, int in LiteRT


@dataclass(frozen=True, slots=True, eq=False)
class Int8Linear:
    """y = (codes * scales) @ x + bias, or without a bias."""

    codes: npt.NDArray[np.int8]  # [outputs, inputs]
    scales: Floats  # [outputs]
    bias: Floats | None = None  # [outputs]


@dataclass(frozen=True, slots=True, eq=False)
class Int8Draft:
    """The draft decoder's weights in 8 bits.

    A layer with two inputs is split in two, since the ranges of its inputs differ by a factor of ten.
    """

    image_conv: Int8Linear  # 3x3 convolution, inputs in the order channel, row, column
    places: Int8Linear  # what is added at each position, [1, 49 * 128]: one scale
    tokens: Int8Linear  # [V, 128], the embedding and the last layer
    query: Int8Linear  # with the attention's 1 / sqrt(width)
    embedding_gates: Int8Linear
    seen_gates: Int8Linear
    state_gates: Int8Linear
    state_out: Int8Linear
    seen_out: Int8Linear


def quantise_draft(draft: DraftDecoder) -> Int8Draft:
    """Quantises a trained draft decoder's weights."""
    scale, gates, out = 1.0 / math.sqrt(DRAFT_MEMORY), draft.input_gates, draft.out
    assert draft.image_conv.bias is not None
    return Int8Draft(
        image_conv=_int8(draft.image_conv.weight.flatten(1)),
        places=_int8((draft.image_positions.flatten(1).T + draft.image_conv.bias).reshape(1, -1)),
        tokens=_int8(draft.tokens.weight, draft.bias + draft.never_emitted),
        query=_int8(draft.query.weight * scale, draft.query.bias * scale),
        embedding_gates=_int8(gates.weight[:, :DRAFT_EMBEDDING], gates.bias),
        seen_gates=_int8(gates.weight[:, DRAFT_EMBEDDING:]),
        state_gates=_int8(draft.state_gates.weight, draft.state_gates.bias),
        state_out=_int8(out.weight[:, :DRAFT_STATE], out.bias),
        seen_out=_int8(out.weight[:, DRAFT_STATE:]),
    )


def _int8(weight: Tensor, bias: Tensor | None = None) -> Int8Linear:
    values = weight.detach().float().numpy(force=True)
    scales = np.maximum(np.abs(values).max(1), 1e-9).astype(np.float32) / np.float32(127)
    codes = np.rint(values / scales[:, None]).astype(np.int8)
    return Int8Linear(codes, scales, None if bias is None else bias.detach().float().numpy(force=True))


def draft_labels(draft: DraftDecoder) -> bytes:
    """What each label adds to the first state: float16 [classes, 256], little-endian. A board adds these up itself."""
    return draft.labels.weight.detach().numpy(force=True).astype("<f2").tobytes()


class _Operations(Protocol[Name]):
    """The operations that a format implements. Rows are [1, width], the memory is [1, 49, 128]."""

    def embed(self, token: Name, table: Int8Linear) -> Name: ...
    def linear(self, x: Name, layer: Int8Linear, output: str) -> Name: ...
    def attend(self, query: Name, memory: Name) -> Name: ...
    def thirds(self, x: Name) -> tuple[Name, Name, Name]: ...
    def apply(self, operation: str, *inputs: Name, output: str = "") -> Name: ...  # of every element; the ONNX name


def _step(ops: _Operations[Name], draft: Int8Draft, token: Name, state: Name, memory: Name) -> tuple[Name, Name]:
    """models.family.DraftDecoder.step, to (logits, next state)."""
    seen = ops.attend(ops.linear(state, draft.query, "query"), memory)
    embedded = ops.linear(ops.embed(token, draft.tokens), draft.embedding_gates, "embedding_gates")
    x = ops.thirds(ops.apply("Add", embedded, ops.linear(seen, draft.seen_gates, "seen_gates")))
    h = ops.thirds(ops.linear(state, draft.state_gates, "state_gates"))
    reset, update = (ops.apply("Sigmoid", ops.apply("Add", x[i], h[i])) for i in range(2))
    new = ops.apply("Tanh", ops.apply("Add", x[2], ops.apply("Mul", reset, h[2])))
    step = ops.apply("Mul", update, ops.apply("Sub", state, new))
    state = ops.apply("Add", new, step, output="next_state")
    parts = ops.linear(state, draft.state_out, "state_out"), ops.linear(seen, draft.seen_out, "seen_out")
    return ops.linear(ops.apply("Add", *parts), draft.tokens, "logits"), state


def write_draft_onnx(draft: Int8Draft) -> tuple[bytes, bytes]:
    """The draft decoder as two ONNX files: its image encoder (`draft_look` in a bundle) and its step.

    Encoder: `symbols` float32 [1, 64, 7, 7] to `memory` float32 [1, 49, 128]. Step: `token` int32 [1], `state` float32
    [1, 256] and `memory` to `logits` float32 [1, V] and `next_state`.
    """
    ops = _Onnx()
    ops.encode_image(draft)
    encoder = ops.graph.to_bytes("look", [_onnx_value("symbols", (1, *LATENT))], [_onnx_value("memory", MEMORY)], {})
    ops = _Onnx()
    _step(ops, draft, "token", "state", "memory")
    inputs = [helper.make_tensor_value_info("token", TensorProto.INT32, [1])]
    inputs += [_onnx_value("state", (1, DRAFT_STATE)), _onnx_value("memory", MEMORY)]
    outputs = [_onnx_value("logits", (1, len(draft.tokens.codes))), _onnx_value("next_state", (1, DRAFT_STATE))]
    return encoder, ops.graph.to_bytes("step", inputs, outputs, {})


def _onnx_value(name: str, shape: tuple[int, ...]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


class _Onnx:
    """Operations on 8-bit integers where there are weights (DynamicQuantizeLinear, MatMulInteger), else on floats."""

    def __init__(self) -> None:
        self.graph = onnx_graph.OnnxGraph()
        self.zero = self.graph.constant("zero", np.int8(0))
        self._codes: dict[str, list[str]] = {}  # of an activation: its codes, scale and zero point

    def encode_image(self, draft: Int8Draft) -> None:
        graph, layer = self.graph, draft.image_conv
        kernel = graph.constant("kernel_codes", layer.codes.reshape(-1, LATENT[0], 3, 3))
        scales = graph.constant("kernel_scales", layer.scales)
        kernel = graph.node("DequantizeLinear", [kernel, scales], "kernel", axis=0)
        planes = graph.node("Conv", ["symbols", kernel], "planes", kernel_shape=[3, 3], pads=[1] * 4)
        shape = graph.constant("shape", np.array([1, DRAFT_MEMORY, POSITIONS]))
        rows = graph.node("Transpose", [graph.node("Reshape", [planes, shape], "columns")], "rows", perm=[0, 2, 1])
        codes = graph.constant("place_codes", draft.places.codes.reshape(MEMORY))
        places = graph.node("DequantizeLinear", [codes, graph.constant("scale", draft.places.scales[0])], "places")
        graph.node("Relu", [self.apply("Add", rows, places)], "memory")

    def embed(self, token: str, table: Int8Linear) -> str:
        graph = self.graph  # the table lies as the last layer wants it: one column a token
        column = graph.node("Gather", [self._weights(table, "logits"), token], "token_codes", axis=1)
        row = graph.node("Transpose", [graph.node("Cast", [column], "token_column", to=TensorProto.FLOAT)], "token_row")
        return self.apply("Mul", row, graph.node("Gather", ["logits.scales", token], "token_scale"))

    def linear(self, x: str, layer: Int8Linear, output: str) -> str:
        graph = self.graph
        if x not in self._codes:
            names = [f"{x}.codes", f"{x}.scale", f"{x}.zero"]
            graph.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], names, f"{x}.quantise"))
            self._codes[x] = names
        codes, scale, zero = self._codes[x]
        weights = self._weights(layer, output)
        sums = graph.node("MatMulInteger", [codes, weights, zero, self.zero], f"{output}.sums")
        sums = graph.node("Cast", [sums], f"{output}.float", to=TensorProto.FLOAT)
        unit = graph.node("Mul", [scale, f"{output}.scales"], f"{output}.unit")
        if layer.bias is None:
            return graph.node("Mul", [sums, unit], output)
        y = graph.node("Mul", [sums, unit], f"{output}.unbiased")
        return graph.node("Add", [y, graph.constant(f"{output}.bias", layer.bias)], output)

    def _weights(self, layer: Int8Linear, name: str) -> str:
        if all(constant.name != f"{name}.weights" for constant in self.graph.constants):
            self.graph.constant(f"{name}.weights", layer.codes.T)
            self.graph.constant(f"{name}.scales", layer.scales)
        return f"{name}.weights"

    def attend(self, query: str, memory: str) -> str:
        graph = self.graph
        columns = graph.node("Transpose", [memory], "memory_columns", perm=[0, 2, 1])
        scores = graph.node("MatMul", [query, columns], "scores")  # [1, 1, 49]
        seen = graph.node("MatMul", [graph.node("Softmax", [scores], "attention", axis=-1), memory], "seen_row")
        return graph.node("Reshape", [seen, graph.constant("row", np.array([1, DRAFT_MEMORY]))], "seen")

    def thirds(self, x: str) -> tuple[str, str, str]:
        names = f"{x}.0", f"{x}.1", f"{x}.2"
        sizes = self.graph.constant(f"{x}.sizes", np.array([DRAFT_STATE] * 3))
        self.graph.nodes.append(helper.make_node("Split", [x, sizes], names, f"{x}.split", axis=1))
        return names

    def apply(self, operation: str, *inputs: str, output: str = "") -> str:
        return self.graph.node(operation, list(inputs), output or f"node{len(self.graph.nodes)}")


def write_draft_litert(draft: Int8Draft) -> tuple[bytes, bytes]:
    """The draft decoder as two LiteRT files, encoder and step; inputs and outputs as in write_draft_onnx."""
    ops = _LiteRt()
    symbols = ops.graph.tensor("symbols", (1, *LATENT), np.float32)
    encoder = ops.graph.to_bytes([symbols], [ops.encode_image(draft, symbols)])
    ops = _LiteRt()
    token = ops.graph.tensor("token", (1,), np.int32)
    state = ops.graph.tensor("state", (1, DRAFT_STATE), np.float32)
    memory = ops.graph.tensor("memory", MEMORY, np.float32)
    outputs = _step(ops, draft, token, state, memory)
    return encoder, ops.graph.to_bytes([token, state, memory], list(outputs))


class _LiteRt:
    """Layers with int8 weights and float activations, which LiteRT quantises inside: its "hybrid" operators."""

    def __init__(self) -> None:
        self.graph = litert_graph.LitertGraph()
        self._tables: dict[str, tuple[int, int]] = {}  # weights and scales by name

    def encode_image(self, draft: Int8Draft, symbols: int) -> int:
        graph, layer = self.graph, draft.image_conv
        channels, height, width = LATENT
        order = graph.constant("order", np.array([0, 2, 3, 1], np.int32))
        image = self._operation("TRANSPOSE", [symbols, order], (1, height, width, channels), options="Transpose")
        codes = layer.codes.reshape(-1, channels, 3, 3).transpose(0, 2, 3, 1)
        # Dequantised first: as a hybrid operator the convolution would quantise the symbols, which are exact.
        kernel = graph.constant("kernel_codes", codes, layer.scales)
        kernel = self._operation("DEQUANTIZE", [kernel], codes.shape, version=5, options="Dequantize")
        bias = graph.constant("bias", np.zeros(DRAFT_MEMORY, np.float32))
        shape = (1, height, width, DRAFT_MEMORY)
        planes = self._operation(
            "CONV_2D", [image, kernel, bias], shape, options="Conv2D", padding=SAME, strideH=1, strideW=1
        )
        rows = self._reshape(planes, MEMORY)
        places = graph.constant("place_codes", draft.places.codes.reshape(MEMORY), draft.places.scales)
        places = self._operation("DEQUANTIZE", [places], MEMORY, version=2, options="Dequantize")
        return self._operation("ADD", [rows, places], MEMORY, "memory", options="Add", fusedActivationFunction=RELU)

    def embed(self, token: int, table: Int8Linear) -> int:
        weights, scales = self._table(table, "logits")
        row = (1, DRAFT_EMBEDDING)
        found = self._operation("GATHER", [weights, token], row, dtype=np.int8, version=2, options="Gather")
        found = self._operation("CAST", [found], row, options="Cast", inDataType=INT8, outDataType=FLOAT32)
        scale = self._operation("GATHER", [scales, token], (1,), options="Gather")
        return self.apply("Mul", found, scale)

    def linear(self, x: int, layer: Int8Linear, output: str) -> int:
        weights, scales = self._table(layer, output)
        y = self._operation(
            "FULLY_CONNECTED",
            [x, weights, -1],  # no bias
            (1, len(layer.codes)),
            version=9,
            options="FullyConnected",
            asymmetricQuantizeInputs=True,
        )
        y = self.apply("Mul", y, scales)
        if layer.bias is None:
            return y
        return self.apply("Add", y, self.graph.constant(f"{output}.bias", layer.bias), output=output)

    def _table(self, layer: Int8Linear, name: str) -> tuple[int, int]:
        """Weights of unit scale and their scales apart: tflite-runtime 2.14 silently reads the first of many scales."""
        if name not in self._tables:
            weights = self.graph.constant(f"{name}.weights", layer.codes, np.ones(1, np.float32))
            self._tables[name] = weights, self.graph.constant(f"{name}.scales", layer.scales)
        return self._tables[name]

    def attend(self, query: int, memory: int) -> int:
        row = self._reshape(query, (1, 1, DRAFT_MEMORY))
        scores = self._operation("BATCH_MATMUL", [row, memory], (1, 1, POSITIONS), options="BatchMatMul", adjY=True)
        attention = self._operation("SOFTMAX", [scores], (1, 1, POSITIONS), options="Softmax", beta=1.0)
        seen = self._operation("BATCH_MATMUL", [attention, memory], (1, 1, DRAFT_MEMORY), options="BatchMatMul")
        return self._reshape(seen, (1, DRAFT_MEMORY))

    def thirds(self, x: int) -> tuple[int, int, int]:
        graph = self.graph
        axis = graph.constant("axis", np.array(1, np.int32))
        parts = tuple(graph.tensor(f"part{i}", (1, DRAFT_STATE), np.float32) for i in range(3))
        graph.operator("SPLIT", [axis, x], list(parts), options="Split", numSplits=3)
        return parts[0], parts[1], parts[2]

    def apply(self, operation: str, *inputs: int, output: str = "") -> int:
        name = {"Sigmoid": "LOGISTIC"}.get(operation, operation.upper())
        shape = tuple(int(size) for size in self.graph.tensors[inputs[0]].shape)
        options = operation if operation in ("Add", "Sub", "Mul") else ""
        return self._operation(name, list(inputs), shape, output, options=options)

    def _reshape(self, x: int, shape: tuple[int, ...]) -> int:
        to = self.graph.constant("shape", np.array(shape, np.int32))
        return self._operation("RESHAPE", [x, to], shape)

    def _operation(
        self,
        operator: str,
        inputs: list[int],
        shape: tuple[int, ...],
        output: str = "",
        dtype: npt.DTypeLike = np.float32,
        version: int = 1,
        options: str = "",
        **fields: Any,
    ) -> int:
        y = self.graph.tensor(output or f"tensor{len(self.graph.tensors)}", shape, dtype)
        self.graph.operator(operator, inputs, [y], version, options, **fields)
        return y
