"""What every stage shares: a working directory, figures as JSON, progress, and checkpoints that resume."""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
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
        """Whether the stage wrote its figures."""
        return (self / f"{stage}.json").is_file()

    def finish(self, stage: str, figures: dict[str, Any]) -> None:
        """Writes a stage's figures, which marks it as done."""
        text = json.dumps(figures, indent=2)
        (self / f"{stage}.json").write_text(text + "\n")
        logger.info("stage done stage=%s figures=%s", stage, json.dumps(figures))

    def figures(self, stage: str) -> dict[str, Any]:
        """The figures of a finished stage."""
        figures: dict[str, Any] = json.loads((self / f"{stage}.json").read_text())
        return figures

    def array(self, name: str) -> np.ndarray:
        """An array that an earlier stage wrote, mapped into memory."""
        array: np.ndarray = np.load(self / f"{name}.npy", mmap_mode="r")
        return array

    @property
    def vocabulary(self) -> int:
        """How many words the vocabulary of the first stage has."""
        return len((self / "vocabulary.txt").read_text().splitlines())

    @property
    def classes(self) -> int:
        """How many classes a classifier tells apart; at least 1, so that it exists where no class photos do."""
        return max(1, len((self / "classes.txt").read_text().split()))

    def new_array(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A new array on disk, to be filled in place."""
        return np.lib.format.open_memmap(self / f"{name}.npy", "w+", dtype, shape)

    def save(self, name: str, step: int, **parts: Any) -> None:
        """A checkpoint: state dicts and plain values; replaced atomically, so that a kill leaves the last one."""
        partial = self / f"{name}.partial"
        torch.save(
            {"step": step, **{k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in parts.items()}}, partial
        )
        partial.replace(self / f"{name}.pt")

    def load(self, name: str, **parts: Any) -> int:
        """Restores a checkpoint into the parts and returns its step, 0 where there is none."""
        path = self / f"{name}.pt"
        if not path.is_file():
            return 0
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(state[key])
        step: int = state["step"]
        return step


S = TypeVar("S")


def shortened(settings: S, share: float) -> S:
    """The same settings with a share of their training steps."""
    values: dict[str, Any] = dataclasses.asdict(settings)  # type: ignore[call-overload]
    counts = {name: max(1, round(value * share)) for name, value in values.items() if name.endswith("steps")}
    return dataclasses.replace(settings, **counts)  # type: ignore[type-var]


def steps(name: str, first: int, total: int) -> Iterator[int]:
    """Counts from `first` to `total` with a progress bar on a terminal, a line a minute elsewhere."""
    console = Console()
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            yield from progress.track(range(first, total), total=total, completed=first, description=name)
        return
    started = reported = time.monotonic()
    for step in range(first, total):
        yield step
        now = time.monotonic()
        if now - reported > 60 or step + 1 == total:
            reported = now
            left = (now - started) / (step + 1 - first) * (total - step - 1)
            logger.info("progress stage=%s step=%d of=%d minutes_left=%.1f", name, step + 1, total, left / 60)


Network = TypeVar("Network", bound=nn.Module)


def channels_last(net: Network) -> Network:
    """The same network with its weights laid out as CPU convolutions like them: several times faster in bfloat16."""
    laid_out: Network = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return laid_out


class Average:
    """Exponential moving average of a network's weights: what is evaluated and shipped."""

    def __init__(self, net: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in net.state_dict().items()}

    def update(self, net: nn.Module, step: int) -> None:
        """Takes a step's weights in; early steps count more, so that the average forgets the start."""
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in net.state_dict().items():
                self.weights[name].lerp_(value, 1 - decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights."""
        return self.weights

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores averaged weights."""
        self.weights = dict(state)
