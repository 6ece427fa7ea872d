"""The noise with which tokens are sampled: the same bits on every machine, in any order, for any part of a vocabulary.

Noise is not drawn from a state. It is a function of seed, position and token, so that a board, its servers and a second
try have the same noise without a message about it. docs/protocol.md, section 13, defines it, for other implementations.

Libraries round `log` and `exp` in different ways: those of NumPy and PyTorch differ in a third of all float32 values.
So both are made here of steps that IEEE 754 rounds correctly, one array operation for each step. A compiler that fuses
a multiplication with an addition would change the bits.
"""

from math import factorial

import numpy as np
from numpy.typing import NDArray

Float64s = NDArray[np.float64]

TARGET = 0  # the stream of noise that chooses a text's tokens; other numbers are reserved
LN2_HIGH, LN2_LOW = float.fromhex("0x1.62e42fefp-1"), float.fromhex("0x1.473de6af278edp-34")  # ln 2 as a sum
SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
SMALLEST = -708.0  # the exponential of less is not a normal number
MASK = np.uint64(0xFFFFFFFF)


def philox(counter: tuple[NDArray[np.uint64], int, int, int], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011): four 32-bit words [4, N].

    counter: four 32-bit words, the first one an array [N]. key: two 32-bit words.
    """
    x0, (x1, x2, x3) = counter[0], (np.full_like(counter[0], word) for word in counter[1:])
    for turn in range(10):
        k0, k1 = (
            np.uint64(word + turn * step & 0xFFFFFFFF) for word, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)
        )
        a, b = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (b >> np.uint64(32)) ^ x1 ^ k0, b & MASK, (a >> np.uint64(32)) ^ x3 ^ k1, a & MASK
    return np.stack([x0, x1, x2, x3])


def log(x: Float64s) -> Float64s:
    """The natural logarithm of positive normal numbers, float64; it differs from the exact one by at most 2e-15."""
    mantissa, exponent = np.frexp(x)
    is_low = mantissa < SQRT_HALF
    mantissa, exponent = np.where(is_low, 2 * mantissa, mantissa), (exponent - is_low).astype(np.float64)
    s = (mantissa - 1) / (mantissa + 1)
    z, series = s * s, np.full_like(s, 1 / 21)
    for divisor in range(19, 0, -2):  # log m = 2 (s + s^3 / 3 + s^5 / 5 + ...)
        series = series * z + 1 / divisor
    found: Float64s = exponent * LN2_HIGH + (exponent * LN2_LOW + 2 * (s * series))
    return found


def exp(x: Float64s) -> Float64s:
    """The exponential of numbers of at most 0, float64, with a relative error below 1e-15; of at least -708."""
    x = np.maximum(x, SMALLEST)
    k = np.rint(x * (1 / (LN2_HIGH + LN2_LOW)))
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    series = np.full_like(r, 1 / factorial(13))
    for n in range(12, -1, -1):
        series = series * r + 1 / factorial(n)
    power: Float64s = np.ldexp(series, k.astype(np.int32))
    return power


def gumbel(seed: int, position: int, tokens: NDArray[np.int64]) -> Float64s:
    """Standard Gumbel noise of these tokens at a position of the text, float64 [N], between -3.2 and 22.9.

    seed: 0..2^64 - 1. position: of the token in the text, from 0 on. tokens: int64 [N], from 0 on.
    """
    blocks = np.arange(tokens.max(initial=0) // 4 + 1, dtype=np.uint64)  # a counter gives the words of four tokens
    chosen = philox((blocks, position, TARGET, 0), (seed & 0xFFFFFFFF, seed >> 32)).T.reshape(-1)[tokens]
    u = (2 * chosen + np.uint64(1)).astype(np.float64) * 2.0**-33  # exact, and neither 0 nor 1
    return -log(-log(u))
