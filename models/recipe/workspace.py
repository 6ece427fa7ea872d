"""What all stages share: a working directory, figures as JSON, checkpoints and progress."""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

logger = logging.getLogger(__name__)


class Workspace:
    """The recipe's working directory. A stage is done when its figures are written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def is_done(self, stage: str) -> bool:
        return (self / f"{stage}.json").is_file()

    def finish(self, stage: str, figures: dict[str, Any]) -> None:
        """Writes a stage's figures, atomically: they mark it as done."""
        partial = self / f"{stage}.json.partial"
        partial.write_text(json.dumps(figures, indent=2) + "\n")
        partial.replace(self / f"{stage}.json")
        logger.info("stage done stage=%s figures=%s", stage, json.dumps(figures))

    def figures(self, stage: str) -> dict[str, Any]:
        figures: dict[str, Any] = json.loads((self / f"{stage}.json").read_text())
        return figures

    def array(self, name: str) -> np.ndarray:
        """An array of an earlier stage, mapped into memory."""
        array: np.ndarray = np.load(self / f"{name}.npy", mmap_mode="r")
        return array

    @property
    def vocabulary(self) -> int:
        """Number of words in the vocabulary of the first stage."""
        return len((self / "vocabulary.txt").read_text().splitlines())

    def new_array(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Creates an array on disk, to be filled in place."""
        return np.lib.format.open_memmap(self / f"{name}.npy", "w+", dtype, shape)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Writes a checkpoint. It replaces the last one atomically, so that an interruption keeps either of them."""
        partial = self / f"{name}.partial"
        torch.save(state, partial)
        partial.replace(self / f"{name}.pt")

    def load(self, name: str) -> dict[str, Any]:
        """The checkpoint, or nothing if there is none."""
        path = self / f"{name}.pt"
        return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else {}

    def averaged(self, name: str, prefix: str = "") -> dict[str, torch.Tensor]:
        """The averaged weights of a finished stage whose names begin with the prefix, without the prefix."""
        average = self.load(name)["average"]
        return {key.removeprefix(prefix): value for key, value in average.items() if key.startswith(prefix)}


S = TypeVar("S")


def shortened(settings: S, share: float) -> S:
    """The same settings with this share of the training steps."""
    values: dict[str, Any] = dataclasses.asdict(settings)  # type: ignore[call-overload]
    counts = {name: max(1, round(value * share)) for name, value in values.items() if name.endswith("steps")}
    return dataclasses.replace(settings, **counts)  # type: ignore[type-var]


def steps(name: str, first: int, total: int) -> Iterator[int]:
    """Counts from `first` to `total`, with a line in the log per minute."""
    started = reported = time.monotonic()
    for step in range(first, total):
        yield step
        now = time.monotonic()
        if now - reported > 60 or step + 1 == total:
            reported = now
            left = (now - started) / (step + 1 - first) * (total - step - 1)
            logger.info("progress stage=%s step=%d of=%d minutes_left=%.1f", name, step + 1, total, left / 60)


def blocks(name: str, total: int, size: int) -> Iterator[slice]:
    """Slices of `size` that cover `total` rows, with progress in the log."""
    for step in steps(name, 0, -(-total // size)):
        yield slice(step * size, min((step + 1) * size, total))


Network = TypeVar("Network", bound=nn.Module)


def channels_last(net: Network) -> Network:
    """The network with its weights in the layout that is fastest on CPUs: several times faster in bfloat16."""
    laid_out: Network = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return laid_out
