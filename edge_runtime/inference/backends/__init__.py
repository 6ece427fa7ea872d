"""Inference on the board: onnxruntime or LiteRT behind one small protocol.

A bundle holds every network once per backend. Which one is loaded depends on what is installed, and on which is faster
on this machine.
"""

import logging
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy.typing as npt

from edge_runtime.errors import ConfigError
from edge_runtime.packages import how_to_install

logger = logging.getLogger(__name__)

Network = TypeVar("Network")

SUFFIXES = {"onnx": ".onnx", "litert": ".tflite"}  # of the files of a backend
MAX_MODEL_BYTES = 64 * 2**20  # the largest network of a board's bundle has 4 MB
TRIALS = 5  # of each network that may be chosen
_RUNTIMES = {"onnx": ("onnxruntime",), "litert": ("ai_edge_litert", "tflite_runtime")}


class BackendError(ConfigError):
    """A network cannot be loaded or run: no runtime is installed, or the file or an input does not fit."""


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
    names = [name for name in candidates if any(find_spec(runtime) for runtime in _RUNTIMES[name])]
    if not names:
        raise BackendError(f"no runtime for {' or '.join(candidates)} is installed: {_hint(candidates[0])}")
    return names


def _hint(name: str) -> str:
    return how_to_install("onnxruntime" if name == "onnx" else "ai_edge_litert")


def load_fastest(asked: str, load: Callable[[str], Network], work: Callable[[Network], object]) -> Network:
    """Loads a network in each backend that is installed, and returns the one that does `work` in the least time.

    load: takes a suffix of SUFFIXES. Which backend is faster depends on CPU and network, so no table would stay right.
    Raises BackendError if none loads.
    """
    names = installed(asked)
    if len(names) == 1:
        return load(SUFFIXES[names[0]])
    networks = {name: network for name in names if (network := _load_or_warn(name, load)) is not None}
    if not networks:
        return load(SUFFIXES[names[0]])  # raises its error
    took: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(1 + TRIALS):  # in turns, so that other load on the machine slows all alike
        for name, network in networks.items():
            started = time.perf_counter()
            work(network)
            took[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: statistics.median(times[1:]) for name, times in took.items()}  # the first run allocates
    best = min(medians, key=lambda name: medians[name])
    logger.info("backend=%s chosen %s", best, " ".join(f"{name}_ms={ms:.2f}" for name, ms in medians.items()))
    return networks[best]


def _load_or_warn(name: str, load: Callable[[str], Network]) -> Network | None:
    """None if this backend cannot be used."""
    try:
        return load(SUFFIXES[name])
    except BackendError as error:
        logger.warning("backend=%s does not serve: %s", name, error)
        return None


def load_model(path: Path, threads: int = 1) -> Model:
    """Loads a network; the suffix of its file decides the backend. Raises BackendError.

    A backend gets the content of the file, never its path: a network must not read other files.
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

            return OnnxModel(data, threads)
        from edge_runtime.inference.backends.litert import LiteRtModel

        return LiteRtModel(data, threads)
    except ImportError as error:
        raise BackendError(f"the runtime for {name} is installed but broken: {error}; {_hint(name)}") from error
    except BackendError as error:
        raise BackendError(f"{path} does not load: {error}; install the bundle again") from error
