"""Inference on the board: onnxruntime or LiteRT behind one small protocol.

A bundle holds every network once per backend. `choice.py`, one folder up, chooses between those that are installed.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from edge_runtime.errors import ConfigError
from edge_runtime.packages import how_to_install

SUFFIXES = {"onnx": ".onnx", "litert": ".tflite"}  # of the files of a backend
MAX_MODEL_BYTES = 64 * 2**20  # the largest network of a board's bundle has 4 MB
RUNTIMES = {"onnx": ("onnxruntime",), "litert": ("ai_edge_litert", "tflite_runtime")}


class BackendError(ConfigError):
    """A network cannot be loaded or run: no runtime is installed, or the file or an input does not fit."""


class ProviderError(BackendError):
    """An execution provider of onnxruntime is missing or does not load; the network may be in order."""


class Model(Protocol):
    """A loaded network."""

    scale: float  # of one code of the first output; 1 if the output is not quantised
    zero_point: int  # the code that means zero, -128..255

    def run(self, *inputs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Inputs and outputs have the order, shapes and types of the file. Raises BackendError."""


def installed(asked: str = "auto") -> list[str]:
    """The given backend if it is installed, or with "auto" all that are. Raises BackendError."""
    candidates = list(SUFFIXES) if asked == "auto" else [asked]
    if not SUFFIXES.keys() >= set(candidates):
        raise BackendError(f"backend = {asked!r}, want auto, {' or '.join(SUFFIXES)}; leave it out for auto")
    names = [name for name in candidates if any(find_spec(runtime) for runtime in RUNTIMES[name])]
    if not names:
        raise BackendError(f"no runtime for {' or '.join(candidates)} is installed: {hint(candidates[0])}")
    return names


def hint(name: str) -> str:
    """The command that installs a backend's runtime."""
    return how_to_install("onnxruntime" if name == "onnx" else "ai_edge_litert")


def cache_folder() -> Path:
    """As the XDG Base Directory Specification has it; for a service, systemd sets HOME to its user's folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "aiflow"


def load_model(path: Path, threads: int = 1, providers: Sequence[str] = ()) -> Model:
    """Loads a network; the suffix of its file decides the backend. Raises BackendError.

    providers: of onnxruntime, before the CPU, see PROVIDERS in onnx.py; one that does not load is an error.
    A runtime gets the content of the file, not its path. So a network reads no other files, and its own may be
    overwritten while it is used: if a runtime had mapped the file, SIGBUS would end the board.
    """
    names = [name for name, suffix in SUFFIXES.items() if suffix == path.suffix]
    if not names:
        raise BackendError(f"{path} ends in {path.suffix!r}, want one of {', '.join(SUFFIXES.values())}")
    (name,) = installed(names[0])
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MODEL_BYTES + 1)
    except OSError as error:
        raise BackendError(f"{path} cannot be read: {error.strerror}: install the bundle again") from error
    if len(data) > MAX_MODEL_BYTES:
        raise BackendError(f"{path} has more than {MAX_MODEL_BYTES} bytes: install the bundle again")
    try:
        if name == "onnx":
            from edge_runtime.inference.backends.onnx import OnnxModel

            return OnnxModel(data, threads, providers)
        from edge_runtime.inference.backends.litert import LiteRtModel

        return LiteRtModel(data, threads)
    except ProviderError:
        raise
    except ImportError as error:
        raise BackendError(f"the runtime for {name} is installed but broken: {error}; {hint(name)}") from error
    except BackendError as error:
        raise BackendError(f"{path} does not load: {error}; install the bundle again") from error
