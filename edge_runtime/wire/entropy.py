"""Scalar rANS: a 32-bit state, 16-bit words, 12-bit frequencies, plain Python integers.

Duda, arXiv 1311.2540; Giesen, "Interleaved entropy coders", arXiv 1402.3392, section 2. Between two steps the state x
is in [L, 2^32) with L = 2^16. Each step is a bijection of that interval, so no hostile stream can leave it or loop.
The encoder runs backwards and starts at L + check. The decoder must end with the same 16 bits, so checking the whole
message costs no bytes. This file knows nothing about headers and groups.
"""

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np

from edge_runtime.wire.errors import BitstreamError

PRECISION = 12  # bits; the frequencies of every table sum to 4096
TOTAL = 1 << PRECISION
LOW = 1 << 16
ESCAPE = 128  # in slot maps: the escape. As a signed byte it is -128, the only value that is not a symbol
ESCAPE_BITS = 8  # the escape is followed by symbol + 128 as a byte with equal probabilities
FLAT = TOTAL >> ESCAPE_BITS  # frequency of each of its values


class Coding(NamedTuple):
    """One table, ready for the decoder. Lists and bytes, since reading a numpy scalar takes longer than a step."""

    slot: bytes  # [4096]: low bits of the state -> symbol as a byte, or ESCAPE
    frequency: list[int]  # [256], by that byte
    start: list[int]  # [256]


def rans_encode(frequencies: Sequence[int], starts: Sequence[int], check: int) -> bytes:
    """Codes steps, given in decoding order. Returns the final state big-endian, then the words in the order of use."""
    x, words = LOW + check, []
    for f, c in zip(reversed(frequencies), reversed(starts), strict=True):
        if x >> 32 - PRECISION >= f:
            words.append(x & 0xFFFF)
            x >>= 16
        x += x // f * (TOTAL - f) + c  # (x // f << 12) + x % f + c
    words += [x & 0xFFFF, x >> 16]
    return np.array(words[::-1], ">u2").tobytes()


class RansDecoded(NamedTuple):
    symbols: bytearray  # int8 in decoding order, as many as the stream has
    check: int | None  # the encoder's 16 bits (other bits after damage); None if words are missing


def rans_decode(
    data: bytes,
    channels: Sequence[Sequence[Coding]],
    height: int,
    width: int,
    largest: int,
    offsets: Iterable[int] = repeat(2),
) -> RansDecoded:
    """Decodes channels of height x width symbols. offsets: of each symbol, in decoding order: see `Tables.codings`.

    A word is read only when a step needs it, so a truncated stream gives exactly the symbols that arrived. Raises
    BitstreamError for what no encoder writes: a first state below L, bytes left over, an unnecessary escape.
    """
    x = int.from_bytes(data[:4], "big")
    symbols = bytearray()
    if len(data) < 4:
        return RansDecoded(symbols, None)
    if x < LOW:
        raise BitstreamError(f"first state {x:#x} is below {LOW:#x}: the message was damaged")
    words = iter(np.frombuffer(data, ">u2", (len(data) - 4) // 2, 4).tolist())
    word, append = words.__next__, symbols.append
    sign = [0] + [1] * 127 + [-1] * 128  # of a byte as int8
    outside = [0] * width
    try:
        # One long loop on purpose: a function call per symbol would double the time.
        offsets = iter(offsets)  # one for all rows: zip asks it last, so no offset is lost at the end of a row
        for by_context in channels:
            above = outside
            for _ in range(height):
                row, left = [], 0
                for up, offset in zip(above, offsets):  # noqa: B905 it is longer
                    slot, frequency, start = by_context[offset + left + up]
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
                            raise BitstreamError(f"unnecessary escape for byte {s}: the message was damaged")
                    append(s)
                    left = sign[s]
                    row.append(left)
                above = row
    except StopIteration:
        return RansDecoded(symbols, None)
    left_over = sum(2 for _ in words) + len(data) % 2
    if left_over:
        raise BitstreamError(f"{left_over} bytes left over: the message was damaged, or other tables wrote it")
    # Below 2 L no step emits a word, so the encoder's first state is the decoder's last one, without another word.
    return RansDecoded(symbols, x - LOW)
