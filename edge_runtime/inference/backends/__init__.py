"""Inference on the board: onnxruntime or LiteRT behind one small protocol.

A bundle holds every network once per backend; which one is loaded is a question of what is installed, and of which is
faster here.
"""

import logging
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy.typing as npt

from edge_runtime.errors import AiflowError

logger = logging.getLogger(__name__)

Network = TypeVar("Network")

SUFFIXES = {"onnx": ".onnx", "litert": ".tflite"}  # of a backend's files
MAX_MODEL_BYTES = 64 * 2**20  # the largest network of a board's bundle is 1 MB
TRIALS = 5  # of each network that may serve
_RUNTIMES = {"onnx": ("onnxruntime",), "litert": ("ai_edge_litert", "tflite_runtime")}
_INSTALL = {"onnx": "pip install 'aiflow-edge[board]'", "litert": "pip install 'aiflow-edge[litert]'"}


class BackendError(AiflowError, ValueError):
    """A network cannot be loaded or run: no runtime is installed, or the file or an input does not fit."""


class Model(Protocol):
    """A loaded network."""

    scale: float  # what one code of the first output is worth; 1 if the output is not quantised
    zero_point: int  # the code that stands for zero

    def run(self, *inputs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Inputs and outputs in the file's order, shapes and types as the file has them. Raises BackendError."""


def installed(asked: str = "auto") -> list[str]:
    """The backend that was asked for, "auto" being each that is installed. Raises BackendError."""
    candidates = list(SUFFIXES) if asked == "auto" else [asked]
    if not SUFFIXES.keys() >= set(candidates):
        raise BackendError(f"backend is {asked!r}, want auto, {' or '.join(SUFFIXES)}; leave it out for auto")
    names = [name for name in candidates if any(find_spec(runtime) for runtime in _RUNTIMES[name])]
    if not names:
        raise BackendError(f"no runtime for {' or '.join(candidates)} is installed: {_INSTALL[candidates[0]]}")
    return names


def load_fastest(asked: str, load: Callable[[str], Network], work: Callable[[Network], object]) -> Network:
    """Of a network in each backend that may serve, the one that does its work in the least time, here and now.

    load: from a suffix of SUFFIXES. Which backend is faster is a matter of CPU and network: no table would stay right.
    Raises BackendError where none loads.
    """
    names = installed(asked)
    if len(names) == 1:
        return load(SUFFIXES[names[0]])
    networks = {name: network for name in names if (network := _load_or_warn(name, load)) is not None}
    if not networks:
        return load(SUFFIXES[names[0]])  # and its error
    took: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(1 + TRIALS):  # in turns: what else the machine does falls on all alike
        for name, network in networks.items():
            started = time.perf_counter()
            work(network)
            took[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: statistics.median(times[1:]) for name, times in took.items()}  # the first turn allocates
    best = min(medians, key=lambda name: medians[name])
    logger.info("backend=%s chosen %s", best, " ".join(f"{name}_ms={ms:.2f}" for name, ms in medians.items()))
    return networks[best]


def _load_or_warn(name: str, load: Callable[[str], Network]) -> Network | None:
    """None: another backend has to serve."""
    try:
        return load(SUFFIXES[name])
    except BackendError as error:
        logger.warning("backend=%s does not serve: %s", name, error)
        return None


def load_model(path: Path, threads: int = 1) -> Model:
    """Loads a network, by its suffix for one backend or the other. Raises BackendError."""
    names = [name for name, suffix in SUFFIXES.items() if suffix == path.suffix]
    if not names:
        raise BackendError(f"{path} ends in {path.suffix!r}, want one of {', '.join(SUFFIXES.values())}")
    (name,) = installed(names[0])
    if not path.is_file() or path.stat().st_size > MAX_MODEL_BYTES:
        raise BackendError(f"{path} is no file of at most {MAX_MODEL_BYTES} bytes: install the bundle again")
    try:
        if name == "onnx":
            from edge_runtime.inference.backends.onnx import OnnxModel

            return OnnxModel(path, threads)
        from edge_runtime.inference.backends.litert import LiteRtModel

        return LiteRtModel(path, threads)
    except ImportError as error:
        raise BackendError(f"the runtime for {name} is installed but broken: {error}; {_INSTALL[name]}") from error
