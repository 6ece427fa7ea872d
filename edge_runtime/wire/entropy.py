"""Scalar rANS: a 32-bit state, 16-bit words, 12-bit frequencies, plain Python integers.

Duda, arXiv 1311.2540; Giesen, "Interleaved entropy coders", arXiv 1402.3392, section 2. Between two steps the state x
is in [L, 2^32) with L = 2^16, and each step is a bijection of that interval, so no hostile stream leaves it or loops.
The encoder runs backwards, and starts at L + check: the decoder must end on the same 16 bits, so a check of the whole
message costs nothing. Knows nothing of headers and groups.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edge_runtime.wire.errors import BitstreamError

PRECISION = 12  # bits; the frequencies of every table sum to 4096
TOTAL = 1 << PRECISION
LOW = 1 << 16
ESCAPE = 128  # as a byte, the one value that is no symbol (-128): slot maps use it for the escape
ESCAPE_BITS = 8  # a flat byte, symbol + 128, follows the escape
FLAT = TOTAL >> ESCAPE_BITS  # frequency of each of its values


class Coding(NamedTuple):
    """One table, ready for the decoder. Lists and bytes, since a numpy scalar costs more than a whole step."""

    slot: bytes  # [4096]: state's low bits -> symbol as a byte, ESCAPE for the escape
    frequency: list[int]  # [256], by that byte
    start: list[int]  # [256]


def push(frequencies: Sequence[int], starts: Sequence[int], check: int) -> bytes:
    """Codes steps given in decoding order: the final state big-endian, then the words in the order of their use."""
    x, words = LOW + check, []
    for f, c in zip(reversed(frequencies), reversed(starts), strict=True):
        if x >> 32 - PRECISION >= f:
            words.append(x & 0xFFFF)
            x >>= 16
        x += x // f * (TOTAL - f) + c  # (x // f << 12) + x % f + c
    words += [x & 0xFFFF, x >> 16]
    return np.array(words[::-1], ">u2").tobytes()


class Pulled(NamedTuple):
    """What a stream held."""

    symbols: bytearray  # int8 in decoding order, as many as arrived
    check: int | None  # the encoder's 16 bits (other numbers after damage), None where words were missing


def pull(data: bytes, channels: Sequence[Sequence[Coding]], height: int, width: int, largest: int) -> Pulled:
    """Decodes channels of height x width symbols.

    A word is read only when a step needs it, so a cut stream gives exactly the symbols that arrived. Raises
    BitstreamError for what no encoder writes: a first state below L, bytes left over, a needless escape.
    """
    x = int.from_bytes(data[:4], "big")
    symbols = bytearray()
    if len(data) < 4:
        return Pulled(symbols, None)
    if x < LOW:
        raise BitstreamError(f"first state {x:#x} is below {LOW:#x}: the message was damaged")
    words = iter(np.frombuffer(data, ">u2", (len(data) - 4) // 2, 4).tolist())
    word, append = words.__next__, symbols.append
    sign = [0] + [1] * 127 + [-1] * 128  # of a byte as int8
    outside = [0] * width
    try:
        # One long loop on purpose: a call per symbol would double its time.
        for by_signs in channels:
            above = outside
            for _ in range(height):
                row, left = [], 0
                for up in above:
                    slot, frequency, start = by_signs[left + up]
                    if x < LOW:
                        x = x << 16 | word()
                    low = x & 4095
                    s = slot[low]
                    x = frequency[s] * (x >> 12) + low - start[s]
                    if s == ESCAPE:
                        if x < LOW:
                            x = x << 16 | word()
                        low = x & 4095
                        s = low // FLAT ^ 128  # the flat byte is the symbol + 128
                        x = FLAT * (x >> 12) + low % FLAT
                        if s == ESCAPE or s <= largest or s >= 256 - largest:
                            raise BitstreamError(f"escape for byte {s}, which needs none: the message was damaged")
                    append(s)
                    left = sign[s]
                    row.append(left)
                above = row
    except StopIteration:
        return Pulled(symbols, None)
    left_over = sum(2 for _ in words) + len(data) % 2
    if left_over:
        raise BitstreamError(f"{left_over} bytes left over: the message was damaged, or other tables wrote it")
    # Below 2 L no step puts out a word, so the encoder's first state is the decoder's last, without a refill.
    return Pulled(symbols, x - LOW)
