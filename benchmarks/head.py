"""The cost of the board's networks: the int8 head against the same head in floats, draft steps, memory.

    python -m benchmarks.head                    networks of the real size with random weights
    python -m benchmarks.head --bundle DIRECTORY

One thread. The ways take turns in one process, so that other work on the machine affects them alike: trust the ratios.
Memory is measured in a separate process that only imports, loads and runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper

from edge_runtime.inference.backends import SUFFIXES, load_model
from edge_runtime.inference.bundle import BOS
from edge_runtime.inference.draft import STATE
from models.backbone import PIXEL_MEAN, PIXEL_SCALE, Conv, same_padding
from models.export import litert_graph, onnx_graph
from models.export.draft_export import quantise_draft, write_draft_litert, write_draft_onnx
from models.export.litert_graph import write_litert
from models.export.onnx_graph import write_onnx
from models.export.quantise import quantise
from models.family import LATENT, DraftDecoder, Head

SHAPE = (1, 224, 224, 3)
VOCABULARY = 3000
MEMORY_SCRIPT = """
import sys, psutil, numpy as np
from pathlib import Path
rss = lambda: psutil.Process().memory_info().rss / 1e6
figures = [rss()]
from edge_runtime.inference.backends import load_model
models = [load_model(Path(path)) for path in sys.argv[1:]]
figures.append(rss())
pixels = np.zeros((1, 224, 224, 3), np.uint8)
for _ in range(500):
    models[0].run(pixels)
print(*figures, rss())
"""


def run(directory: Path, head: Head, rounds: int = 100) -> dict[str, Any]:
    """Measures a bundle's directory with head, draft_look and draft_step in both formats, against its head in floats.

    Returns {backend: figures}; `ratio` is the median over rounds of int8 time / float time.
    """
    floats = {".onnx": float_onnx(head), ".tflite": float_litert(head)}
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
    token, state = np.array([BOS], np.int32), np.zeros((1, STATE), np.float32)
    ways: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for backend, suffix in SUFFIXES.items():
            path = Path(scratch) / f"float{suffix}"
            path.write_bytes(floats[suffix])
            exact, int8 = load_model(path), load_model(directory / f"head{suffix}")
            look, step = (load_model(directory / f"draft_{part}{suffix}") for part in ("look", "step"))
            latent = np.zeros((1, *LATENT), np.float32)
            (memory,) = look.run(latent)
            ways[f"{backend} float"] = lambda model=exact: model.run(pixels)  # type: ignore[misc]
            ways[f"{backend} int8"] = lambda model=int8: model.run(pixels)  # type: ignore[misc]
            ways[f"{backend} look"] = lambda model=look, latent=latent: model.run(latent)  # type: ignore[misc]
            ways[f"{backend} step"] = lambda model=step, memory=memory: model.run(token, state, memory)  # type: ignore[misc]
        times = interleaved(ways, rounds)
    figures: dict[str, Any] = {"rounds": rounds}
    for backend, suffix in SUFFIXES.items():
        ms = {part: times[f"{backend} {part}"] for part in ("float", "int8", "look", "step")}
        ratios = [int8 / exact for int8, exact in zip(ms["int8"], ms["float"], strict=True)]
        files = [directory / f"{name}{suffix}" for name in ("head", "draft_look", "draft_step")]
        figures[backend] = {
            **{f"{part}_ms": {"median": statistics.median(t), "min": min(t)} for part, t in ms.items()},
            "ratio": statistics.median(ratios),
            "bytes": {path.name: path.stat().st_size for path in files},
            "rss_mb": dict(zip(("numpy", "loaded", "after_500_runs"), memory_mb(files), strict=True)),
        }
    return figures


def interleaved(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way in each round, after three warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 3):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: values[3:] for name, values in times.items()}


def memory_mb(files: Sequence[Path]) -> list[float]:
    """Resident MB of a new process: with numpy, with all files loaded, after 500 runs of the first file."""
    command = [sys.executable, "-c", MEMORY_SCRIPT, *map(str, files)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    return [float(figure) for figure in output.split()]


def float_onnx(head: Head) -> bytes:
    """The head in floats, in the form that onnxruntime runs fastest: no Pad nodes, ReLU6 as Clip."""
    graph = onnx_graph.OnnxGraph()
    low, high = graph.constant("low", np.float32(0)), graph.constant("high", np.float32(6))

    def conv(layer: Conv, x: str, size: int) -> tuple[str, int]:
        name, (kernel, _), (stride, _) = f"layer{len(graph.nodes)}", layer.kernel_size, layer.stride
        assert layer.bias is not None
        weight = graph.constant(f"{name}.weight", layer.weight.detach().numpy())
        bias = graph.constant(f"{name}.bias", layer.bias.detach().numpy())
        before, after = same_padding(size, kernel, stride)
        fields = {"pads": [before, before, after, after], "strides": [stride] * 2, "group": layer.groups}
        y = graph.node("Conv", [x, weight, bias], name, kernel_shape=[kernel, kernel], **fields)
        return y if layer.linear else graph.node("Clip", [y, low, high], f"{name}.relu6"), -(-size // stride)

    x = graph.node("Transpose", ["pixels"], "planes", perm=[0, 3, 1, 2])
    x = graph.node("Cast", [x], "real", to=TensorProto.FLOAT)
    x = graph.node("Sub", [x, graph.constant("mean", np.float32(PIXEL_MEAN))], "centred")
    x = graph.node("Div", [x, graph.constant("scale", np.float32(PIXEL_SCALE))], "normalised")
    x = _walk(head, conv, lambda x, y: graph.node("Add", [x, y], f"sum{len(graph.nodes)}"), x)
    graph.node("Identity", [x], "latent")
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.UINT8, SHAPE)]
    return graph.to_bytes(
        "float", inputs, [helper.make_tensor_value_info("latent", TensorProto.FLOAT, (1, *LATENT))], {}
    )


def float_litert(head: Head) -> bytes:
    """The head in floats for LiteRT."""
    graph = litert_graph.LitertGraph()
    shapes: dict[int, tuple[int, ...]] = {}

    def output(name: str, shape: tuple[int, ...]) -> int:
        index = graph.tensor(name, shape, np.float32)
        shapes[index] = shape
        return index

    def conv(layer: Conv, x: int, size: int) -> tuple[int, int]:
        name, (stride, _), depthwise = f"layer{len(graph.tensors)}", layer.stride, layer.groups > 1
        assert layer.bias is not None
        values = layer.weight.detach().numpy().transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1))
        weight, bias = graph.constant(f"{name}.weight", values), graph.constant("bias", layer.bias.detach().numpy())
        y = output(name, (1, -(-size // stride), -(-size // stride), layer.out_channels))
        relu6 = schema.ActivationFunctionType.NONE if layer.linear else schema.ActivationFunctionType.RELU6
        fields = {
            "padding": schema.Padding.SAME,
            "strideH": stride,
            "strideW": stride,
            "fusedActivationFunction": relu6,
        }
        if depthwise:
            fields["depthMultiplier"] = 1
        kind, options = ("DEPTHWISE_CONV_2D", "DepthwiseConv2D") if depthwise else ("CONV_2D", "Conv2D")
        graph.operator(kind, [x, weight, bias], [y], 1, options, **fields)
        return y, -(-size // stride)

    def binary(kind: str, options: str, x: int, y: int) -> int:
        total = output(f"{kind}{len(graph.tensors)}", shapes[x])
        graph.operator(kind, [x, y], [total], 1, options)
        return total

    pixels, real = graph.tensor("pixels", SHAPE, np.uint8), output("real", SHAPE)
    types = {"inDataType": schema.TensorType.UINT8, "outDataType": schema.TensorType.FLOAT32}
    graph.operator("CAST", [pixels], [real], 1, "Cast", **types)
    x = binary("SUB", "Sub", real, graph.constant("mean", np.array([PIXEL_MEAN], np.float32)))
    x = binary("MUL", "Mul", x, graph.constant("scale", np.array([1 / PIXEL_SCALE], np.float32)))
    x = _walk(head, conv, lambda x, y: binary("ADD", "Add", x, y), x)
    latent, order = output("latent", (1, *LATENT)), graph.constant("order", np.array([0, 3, 1, 2], np.int32))
    graph.operator("TRANSPOSE", [x, order], [latent], 1, "Transpose")
    return graph.to_bytes([pixels], [latent])


def _walk(head: Head, conv: Callable[..., Any], add: Callable[[Any, Any], Any], x: Any) -> Any:
    """Walks the head's layers in order. `conv` takes a layer, its input and the input's height, and returns both."""
    x, size = conv(head.stem, x, SHAPE[1])
    for block in head.blocks:
        y = x
        for layer in block.layers:  # type: ignore[union-attr]
            y, size = conv(layer, y, size)
        x = add(x, y) if block.residual else y
    return conv(head.bottleneck, x, size)[0]


def export_random(directory: Path) -> Head:
    """Writes a bundle's networks in their real size with random weights, and returns the head."""
    torch.manual_seed(0)
    head, draft = Head().eval(), quantise_draft(DraftDecoder(VOCABULARY))
    int8 = quantise(head, torch.randint(0, 256, (4, *SHAPE[1:]), dtype=torch.uint8))
    (directory / "head.onnx").write_bytes(write_onnx(int8))
    (directory / "head.tflite").write_bytes(write_litert(int8))
    for suffix, (look, step) in ((".onnx", write_draft_onnx(draft)), (".tflite", write_draft_litert(draft))):
        (directory / f"draft_look{suffix}").write_bytes(look)
        (directory / f"draft_step{suffix}").write_bytes(step)
    return head


def load_float(path: Path) -> Head:
    """The float head of a bundle, from its safetensors file."""
    from safetensors.torch import load_file

    head = Head()
    head.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return head.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="directory with the networks; none: random ones")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.bundle or Path(scratch)
        head = load_float(directory / "head.safetensors") if arguments.bundle else export_random(directory)
        text = json.dumps(run(directory, head, arguments.rounds), indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
