"""How much of a frame's latent is sent: the finest level that fits into a number of bytes.

The choice is made before anything is coded: the tables give the length of every symbol. The level decides first: at
equal bytes, all groups of a coarser level are better than few of a finer one. Groups are left out only if the coarsest
level is too long.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.head import Latent
from edge_runtime.wire import Tables
from edge_runtime.wire.bitstream import MAX_OVERHEAD
from edge_runtime.wire.tables import cost_bits


@dataclass(frozen=True, slots=True, eq=False)
class RatedSymbols:
    """What is coded."""

    symbols: NDArray[np.int8]  # [64, 7, 7], of the level
    level: int
    groups: int  # that are sent


def features_of(
    latent: Latent, bundle: Bundle, level: int | None = None, groups: int | None = None, max_bytes: int | None = None
) -> RatedSymbols | None:
    """`choose_rate` with the bundle's tables, by default at its default level, at most at its finest one."""
    record = bundle.manifest.latent
    finest = record.default_level if level is None else min(level, len(record.gains) - 1)
    return choose_rate(latent, bundle.tables, finest, groups, max_bytes)


def choose_rate(
    latent: Latent, tables: Tables, level: int, groups: int | None = None, max_bytes: int | None = None
) -> RatedSymbols | None:
    """The symbols of `level` and the first `groups` groups, by default all; or less, to fit into max_bytes.

    max_bytes: of the bitstream, with its header; None: no limit. Returns None if not even one group of the coarsest
    level fits.
    """
    groups = tables.groups if groups is None else groups
    if max_bytes is None:
        return RatedSymbols(latent.symbols(level), level, groups)
    size = tables.channels // tables.groups
    low, fitting = 0, None  # the levels below `low` fit, those above `level` do not
    while low <= level:
        middle = (low + level) // 2
        symbols = latent.symbols(middle)
        if longest_bytes(symbols[: groups * size], tables, middle) <= max_bytes:
            low, fitting = middle + 1, RatedSymbols(symbols, middle, groups)
        else:
            level = middle - 1
    if fitting:
        return fitting
    symbols = latent.symbols(0)
    fewer = (g for g in range(groups - 1, 0, -1) if longest_bytes(symbols[: g * size], tables, 0) <= max_bytes)
    return next((RatedSymbols(symbols, 0, g) for g in fewer), None)


def longest_bytes(symbols: NDArray[np.int8], tables: Tables, level: int) -> int:
    """What the bitstream of symbols int8 [c, H, W] takes at most."""
    return ceil(float(cost_bits(symbols, tables, level)) / 8) + MAX_OVERHEAD
