"""The part of the network that runs on the board: the pixels of a frame to the symbols that are coded.

The int8 head ends in integer codes. The step from codes to symbols is integer arithmetic, so that a code means the same
symbol on every CPU and in every backend.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_runtime.inference.backends import BackendError, Model

SHIFT = 20  # fractional bits of a factor


class Head:
    def __init__(self, model: Model, gains: Sequence[float] = (1.0,)) -> None:
        """`gains` are symbols per unit of the latent, one per level, coarsest first. Raises BackendError."""
        self._model = model
        self._factors = [symbol_factor(model.scale, gain) for gain in gains]

    def symbols(self, pixels: npt.NDArray[np.uint8], level: int = -1) -> npt.NDArray[np.int8]:
        """uint8 RGB [224, 224, 3] to symbols int8 [64, 7, 7] at a level, by default the finest. Raises BackendError."""
        codes = self._model.run(pixels[None])[0][0]
        if codes.dtype not in (np.uint8, np.int8):
            raise BackendError(f"the head's output is {codes.dtype}, want 8-bit codes: install the bundle again")
        return codes_to_symbols(codes, self._model.zero_point, self._factors[level])


def symbol_factor(scale: float, gain: float) -> int:
    """Symbols per code, in units of 2**-SHIFT. Raises BackendError if a code is more than half a symbol."""
    symbols_per_code = scale * gain
    if not 2**-SHIFT <= symbols_per_code <= 0.5:  # false for NaN too
        found = f"a code of the head is {symbols_per_code:g} symbols"
        raise BackendError(f"{found}, want above 0 and at most 0.5: install the bundle again")
    return round(symbols_per_code * (1 << SHIFT))


def codes_to_symbols(codes: npt.NDArray[np.integer], zero_point: int, factor: int) -> npt.NDArray[np.int8]:
    """Codes uint8 or int8, any shape, to symbols int8, -127..127.

    symbol = (a * factor + 2**(SHIFT - 1)) >> SHIFT with a = code - zero_point. This is the definition, not an
    approximation of float rounding: a tie goes up, never to the even neighbour.
    """
    offset = codes.astype(np.int32) - zero_point
    return ((offset * factor + (1 << (SHIFT - 1))) >> SHIFT).clip(-127, 127).astype(np.int8)
