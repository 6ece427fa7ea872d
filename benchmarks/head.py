"""The cost of the board's networks: the int8 head against the same head in floats in onnxruntime, draft steps, memory.

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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper

from edge_runtime.inference.backends import SUFFIXES, load_model
from edge_runtime.inference.bundle import BOS
from edge_runtime.inference.draft import STATE
from models.backbone import PIXEL_MEAN, PIXEL_SCALE, Conv, same_padding
from models.export import onnx_graph
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
    """Measures a bundle's directory with head, draft_look and draft_step in both formats, and the head in floats.

    Returns {backend: figures}; `ratio_to_float` is the median over rounds of int8 time / float time in onnxruntime.
    """
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
    token, state = np.array([BOS], np.int32), np.zeros((1, STATE), np.float32)
    latent = np.zeros((1, *LATENT), np.float32)
    ways: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "float.onnx"
        path.write_bytes(float_onnx(head))
        ways["onnx float"] = partial(load_model(path).run, pixels)
        for backend, suffix in SUFFIXES.items():
            look, step = (load_model(directory / f"draft_{part}{suffix}") for part in ("look", "step"))
            (memory,) = look.run(latent)
            ways[f"{backend} int8"] = partial(load_model(directory / f"head{suffix}").run, pixels)
            ways[f"{backend} look"] = partial(look.run, latent)
            ways[f"{backend} step"] = partial(step.run, token, state, memory)
        times = interleaved(ways, rounds)
    ratios = [int8 / exact for int8, exact in zip(times["onnx int8"], times["onnx float"], strict=True)]
    figures: dict[str, Any] = {"rounds": rounds, "ratio_to_float": statistics.median(ratios)}
    figures["float_ms"] = summary(times["onnx float"])
    for backend, suffix in SUFFIXES.items():
        files = [directory / f"{name}{suffix}" for name in ("head", "draft_look", "draft_step")]
        figures[backend] = {
            **{f"{part}_ms": summary(times[f"{backend} {part}"]) for part in ("int8", "look", "step")},
            "bytes": {path.name: path.stat().st_size for path in files},
            "rss_mb": dict(zip(("numpy", "loaded", "after_500_runs"), memory_mb(files), strict=True)),
        }
    return figures


def summary(times: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times)}


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
    x, size = conv(head.stem, x, SHAPE[1])
    for block in head.blocks:
        y = x
        for layer in block.layers:  # type: ignore[union-attr]
            y, size = conv(layer, y, size)
        x = graph.node("Add", [x, y], f"sum{len(graph.nodes)}") if block.residual else y
    x, _ = conv(head.bottleneck, x, size)
    graph.node("Identity", [x], "latent")
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.UINT8, SHAPE)]
    return graph.to_bytes(
        "float", inputs, [helper.make_tensor_value_info("latent", TensorProto.FLOAT, (1, *LATENT))], {}
    )


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
