"""The number format that decoders are trained in. bfloat16 needs half the memory traffic, but some CPUs multiply it at
half the speed of float32 and others at twice, so both are timed.
"""

import logging
import statistics
import time
from functools import cache

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

ROWS, INPUTS, OUTPUTS = 2048, 256, 1024  # of a typical layer
REPEATS = 15


@cache
def fastest() -> torch.dtype:
    """bfloat16 or float32, whichever multiplies faster on this machine."""
    formats = (torch.float32, torch.bfloat16)
    x, weight = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS)
    times = {each: _median_s(x.to(each), weight.to(each)) for each in formats}
    best = min(formats, key=lambda each: times[each])
    logger.info("number format format=%s times_ms=%s", best, {str(f): round(1e3 * s, 2) for f, s in times.items()})
    return best


def autocast() -> torch.autocast:
    """Computes in the fastest format."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fastest() is torch.bfloat16)


def _median_s(x: torch.Tensor, weight: torch.Tensor) -> float:
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        F.linear(x, weight)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
