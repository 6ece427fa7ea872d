"""How much of a frame's latent is sent: the finest level that fits into a number of bytes.

The choice is made before anything is coded: the tables give the length of every symbol. The level decides first: at
equal bytes, all groups of a coarser level are better than few of a finer one. Groups are left out only if the coarsest
level is too long.

Levels are 1.2 to 1.35 times apart in bytes. The rest of the budget is filled from the next finer level, shrunk: its
values move towards zero before they are rounded, so that fewer symbols are rare and long. This changes nothing for
decoders. It is the dead zone of video encoders (Sullivan, "Efficient scalar quantization of exponential and Laplacian
random variables", IEEE Transactions on Information Theory 42, 1996). Shrinking by a twentieth of a symbol saves 12 % of
level 4's bytes, and the features then tell about as much of the label as a level of that length would; shrunk by a
tenth, they tell less than the next coarser level.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.head import SHIFT, Latent
from edge_runtime.wire.bitstream import MAX_OVERHEAD
from edge_runtime.wire.tables import Tables, cost_bits

MAX_SHRINKAGE = (1 << SHIFT) // 16  # of a symbol


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
    low, fitting, too_long = 0, None, None  # the levels below `low` fit, those above `level` do not
    while low <= level:
        middle = (low + level) // 2
        features = RatedSymbols(latent.symbols(middle), middle, groups)
        if (length := _longest(features, tables)) <= max_bytes:
            low, fitting = middle + 1, features
        else:
            level, too_long = middle - 1, length  # of level `low` in the end
    if too_long and (shrunk := _shrunk(latent, tables, low, groups, too_long, max_bytes)):
        return shrunk
    if fitting:
        return fitting
    symbols = latent.symbols(0)
    for fewer in range(groups - 1, 0, -1):
        features = RatedSymbols(symbols, 0, fewer)
        if (length := _longest(features, tables)) <= max_bytes:
            return features
        if shrunk := _shrunk(latent, tables, 0, fewer, length, max_bytes):
            return shrunk
    return None


def _shrunk(
    latent: Latent, tables: Tables, level: int, groups: int, length: int, max_bytes: int
) -> RatedSymbols | None:
    """A level of this length, which is too long, with values so much nearer to zero that it fits; None if that would
    cost more than the coarser level loses.
    """
    most = RatedSymbols(latent.symbols(level, MAX_SHRINKAGE), level, groups)
    if (shortest := _longest(most, tables)) > max_bytes:
        return None
    # The length falls the less the more is shrunk, so it is hardly ever above its chord. If it is, more is shrunk.
    shrinkage = ceil(MAX_SHRINKAGE * (length - max_bytes) / (length - shortest))
    for quarter in range(4):
        more = quarter * (MAX_SHRINKAGE - shrinkage) // 4
        features = RatedSymbols(latent.symbols(level, shrinkage + more), level, groups)
        if _longest(features, tables) <= max_bytes:
            return features
    return most


def _longest(features: RatedSymbols, tables: Tables) -> int:
    channels = tables.channels // tables.groups * features.groups
    return longest_bytes(features.symbols[:channels], tables, features.level)


def longest_bytes(symbols: NDArray[np.int8], tables: Tables, level: int) -> int:
    """What the bitstream of symbols int8 [c, H, W] takes at most."""
    return ceil(float(cost_bits(symbols, tables, level)) / 8) + MAX_OVERHEAD
