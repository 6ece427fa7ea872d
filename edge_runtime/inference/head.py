"""The part of the network that runs on the board: the pixels of a frame to the symbols that are coded.

The int8 head ends in integer codes. The step from codes to symbols is integer arithmetic, so that a code means the same
symbol on every CPU and in every backend.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_runtime.inference.backends import BackendError, Model

SHIFT = 20  # fractional bits of a factor
Codes = npt.NDArray[np.integer]  # uint8 or int8


@dataclass(frozen=True, slots=True, eq=False)
class Latent:
    """The head's output for one frame, from which the symbols of every level are computed."""

    codes: Codes  # [64, 7, 7]
    zero_point: int
    factors: tuple[npt.NDArray[np.int32], ...]  # by level: of each channel, [64, 1, 1] or [1, 1, 1]
    backbone_map: Codes | None = None  # [14, 14, 80], which the labels read; heads of older bundles have none

    def symbols(self, level: int = -1, shrinkage: int = 0) -> npt.NDArray[np.int8]:
        """int8 [64, 7, 7] at a level, by default the finest. shrinkage: see `codes_to_symbols`."""
        return codes_to_symbols(self.codes, self.zero_point, self.factors[level], shrinkage)


class Head:
    def __init__(self, model: Model, gains: Sequence[float] = (1.0,), scales: Sequence[float] = (1.0,)) -> None:
        """`gains`: symbols per unit of the latent, one per level, coarsest first. `scales`: units of the latent per
        unit of the head's output, one per channel or one for all. Raises BackendError.
        """
        self._model = model
        self._factors = tuple(
            np.array([symbol_factor(model.scale * scale, gain) for scale in scales], np.int32)[:, None, None]
            for gain in gains
        )

    def latent(self, pixels: npt.NDArray[np.uint8]) -> Latent:
        """uint8 RGB [224, 224, 3] to the latent. Raises BackendError."""
        codes, *others = (output[0] for output in self._model.run(pixels[None]))
        if codes.dtype not in (np.uint8, np.int8):
            raise BackendError(f"the head's output is {codes.dtype}, want 8-bit codes: install the bundle again")
        return Latent(codes, self._model.zero_point, self._factors, others[0] if others else None)

    def symbols(self, pixels: npt.NDArray[np.uint8], level: int = -1) -> npt.NDArray[np.int8]:
        """uint8 RGB [224, 224, 3] to symbols int8 [64, 7, 7] at a level, by default the finest. Raises BackendError."""
        return self.latent(pixels).symbols(level)


def symbol_factor(scale: float, gain: float) -> int:
    """Symbols per code, in units of 2**-SHIFT. Raises BackendError if a code is more than half a symbol."""
    symbols_per_code = scale * gain
    if not 2**-SHIFT <= symbols_per_code <= 0.5:  # false for NaN too
        found = f"a code of the head is {symbols_per_code:g} symbols"
        raise BackendError(f"{found}, want above 0 and at most 0.5: install the bundle again")
    return round(symbols_per_code * (1 << SHIFT))


def codes_to_symbols(
    codes: npt.NDArray[np.integer], zero_point: int, factor: int | npt.NDArray[np.int32], shrinkage: int = 0
) -> npt.NDArray[np.int8]:
    """Codes uint8 or int8, any shape, to symbols int8, -127..127, with a factor for all or one for each channel.

    symbol = (a * factor + 2**(SHIFT - 1)) >> SHIFT with a = code - zero_point. This is the definition, not an
    approximation of float rounding: a tie goes up, never to the even neighbour.

    shrinkage: moves values towards zero before they are rounded, by so many units of 2**-SHIFT symbols at most.
    """
    scaled = (codes.astype(np.int32) - zero_point) * factor
    if shrinkage:
        scaled -= scaled.clip(-shrinkage, shrinkage)
    return ((scaled + (1 << (SHIFT - 1))) >> SHIFT).clip(-127, 127).astype(np.int8)
