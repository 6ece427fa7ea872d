"""The training loop of stages 3, 6, 7, 9 and 10. It continues from its last checkpoint after any interruption."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from models.recipe.workspace import Workspace, steps

logger = logging.getLogger(__name__)

LIMIT = 300  # photos of an evaluation between checkpoints
Tensors = tuple[Tensor, ...] | list[Tensor]
Evaluate = Callable[[dict[str, Tensor], int | None], dict[str, float]]  # weights, number of photos (None: all)


def cosine(step: int, total: int, warm_up: int = 100) -> float:
    """Linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / total))


class Training:
    """A network, its optimiser and the moving average of its weights, which is evaluated and shipped."""

    def __init__(
        self,
        work: Workspace,
        name: str,
        net: nn.Module,
        optimiser: torch.optim.Optimizer,
        total: int,
        every: int,
        decay: float = 0.998,
        rate: Callable[[float, int], float] | None = None,
        clip: float = 1.0,
        clipped: Iterable[nn.Parameter] | None = None,
        evaluate: Evaluate = lambda weights, photos: {},
    ) -> None:
        """total: steps. every: steps between checkpoints. decay: of the moving average. clip: largest gradient norm.

        rate: the learning rate from a group's peak rate and the step; default: peak * cosine. clipped: the parameters
        whose gradients are clipped, default: all.
        """
        self.work, self.name, self.net, self.total = work, name, net, total
        self.values: dict[str, float] = {}  # kept in checkpoints, and part of the figures
        self._optimiser, self._every, self._evaluate, self._clip = optimiser, every, evaluate, clip
        self._clipped = list(net.parameters() if clipped is None else clipped)
        self._rate = rate or (lambda peak, step: peak * cosine(step, total))
        self._peaks = [group["lr"] for group in optimiser.param_groups]
        self._average = AveragedModel(net, multi_avg_fn=_moving_average(decay))
        self._recent: deque[dict[str, float]] = deque(maxlen=every)
        self._started = time.monotonic()
        self._first = self._restore()

    @property
    def average(self) -> Any:
        """The network with the averaged weights."""
        return self._average.module

    @property
    def weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = self.average.state_dict()
        return weights

    def steps(self) -> Iterator[int]:
        """The numbers of the remaining steps. The caller calls `update` once per step."""
        for step in steps(self.name, self._first, self.total):
            for group, peak in zip(self._optimiser.param_groups, self._peaks, strict=True):
                group["lr"] = self._rate(peak, step)
            yield step
            if (step + 1) % self._every == 0 or step + 1 == self.total:
                self._save(step + 1)
                quality = self._evaluate(self.weights, LIMIT) if step + 1 < self.total else {}
                logger.info("checkpoint stage=%s step=%d figures=%s", self.name, step + 1, self.values | quality)

    def update(self, loss: Tensor, **seen: float) -> None:
        """One step of the optimiser. seen: further values whose recent means are part of the figures."""
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._clipped, self._clip)
        self._optimiser.step()
        self._average.update_parameters(self.net)
        self._recent.append({"loss": loss.item(), **seen})

    def finish(self) -> None:
        """Evaluates on all photos and writes the figures. An interruption here only repeats the evaluation."""
        figures = self.values | self._evaluate(self.weights, None)
        self.work.finish(self.name, figures | {"steps": self.total})

    def _save(self, step: int) -> None:
        means = {name: float(np.mean([seen[name] for seen in self._recent])) for name in self._recent[-1]}
        minutes = self.values.get("minutes", 0.0) + (time.monotonic() - self._started) / 60
        self._started = time.monotonic()
        self.values |= {name: round(mean, 4) for name, mean in means.items()} | {"minutes": round(minutes, 2)}
        parts = {"net": self.net, "optimiser": self._optimiser, "average": self.average}
        states = {part: owner.state_dict() for part, owner in parts.items()}
        self.work.save(self.name, {"step": step, "values": self.values, **states})

    def _restore(self) -> int:
        state = self.work.load(self.name)
        step: int = state.get("step", 0)
        if state:
            for part, owner in (("net", self.net), ("optimiser", self._optimiser), ("average", self.average)):
                owner.load_state_dict(state[part])
            self.values = state.get("values", {})
        # AveragedModel takes the first weights as they are; counting from one makes them an average from the start.
        self._average.n_averaged.fill_(step + 1)
        return step


def _moving_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    @torch.no_grad()
    def update(averages: Tensors, weights: Tensors, count: Tensor | int) -> None:
        present = min(decay, int(count) / (int(count) + 9))  # early steps weigh more, so that the start is forgotten
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, 1 - present)

    return update
