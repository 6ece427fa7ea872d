"""Inference on the board: onnxruntime or LiteRT behind one small protocol.

A bundle holds every network once per backend; which one is loaded is a question of what is installed.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

SUFFIXES = {"onnx": ".onnx", "litert": ".tflite"}  # of a backend's files; the first that is installed is preferred
MAX_MODEL_BYTES = 64 * 2**20  # the largest network of a board's bundle is 1 MB
_RUNTIMES = {"onnx": ("onnxruntime",), "litert": ("ai_edge_litert", "tflite_runtime")}
_INSTALL = {"onnx": "pip install 'aiflow-edge[board]'", "litert": "pip install 'aiflow-edge[litert]'"}


class BackendError(ValueError):
    """A network cannot be loaded or run: no runtime is installed, or the file or an input does not fit."""


class Model(Protocol):
    """A loaded network."""

    scale: float  # what one code of the first output is worth; 1 if the output is not quantised
    zero_point: int  # the code that stands for zero

    def run(self, *inputs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Inputs and outputs in the file's order, shapes and types as the file has them. Raises BackendError."""


def choose(asked: str = "auto") -> str:
    """The backend that was asked for, "auto" being the first that is installed. Raises BackendError."""
    candidates = list(SUFFIXES) if asked == "auto" else [asked]
    if not SUFFIXES.keys() >= set(candidates):
        raise BackendError(f"backend is {asked!r}, want auto, {' or '.join(SUFFIXES)}; leave it out for auto")
    for name in candidates:
        if any(find_spec(runtime) for runtime in _RUNTIMES[name]):
            return name
    raise BackendError(f"no runtime for {' or '.join(candidates)} is installed: {_INSTALL[candidates[0]]}")


def load_model(path: Path, threads: int = 1) -> Model:
    """Loads a network, by its suffix for one backend or the other. Raises BackendError."""
    names = [name for name, suffix in SUFFIXES.items() if suffix == path.suffix]
    if not names:
        raise BackendError(f"{path} ends in {path.suffix!r}, want one of {', '.join(SUFFIXES.values())}")
    name = choose(names[0])
    if not path.is_file() or path.stat().st_size > MAX_MODEL_BYTES:
        raise BackendError(f"{path} is no file of at most {MAX_MODEL_BYTES} bytes: install the bundle again")
    if name == "onnx":
        from edge_runtime.backends.onnx import OnnxModel

        return OnnxModel(path, threads)
    from edge_runtime.backends.litert import LiteRtModel

    return LiteRtModel(path, threads)
