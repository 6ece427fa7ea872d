"""Scalar rANS: a 32-bit state, 16-bit words, 12-bit frequencies, plain Python integers.

Duda, arXiv 1311.2540; Giesen, "Interleaved entropy coders", arXiv 1402.3392, section 2. Between two steps the state x
is in [L, 2^32) with L = 2^16. Each step is a bijection of that interval, so no hostile stream can leave it or loop.
The encoder runs backwards and starts at L + check. The decoder must end with the same 16 bits, so checking the whole
message costs no bytes. This file knows nothing about headers and groups.
"""

import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.wire.errors import BitstreamError

PRECISION = 12  # bits; the frequencies of every table sum to 4096
TOTAL = 1 << PRECISION
LOW = 1 << 16
ESCAPE = 128  # the escape's byte. As a signed byte it is -128, the only value that is not a symbol
ESCAPE_BITS = 8  # the escape is followed by symbol + 128 as a byte with equal probabilities
FLAT = TOTAL >> ESCAPE_BITS  # frequency of each of its values

# Plain tuples, since unpacking a NamedTuple takes three times as long, and reading a numpy scalar even longer.
# A step for the encoder: frequency, 4096 - frequency, start.
Step = tuple[int, int, int]
# A table for the decoder: start, end and 4096 - frequency of symbol 0; the starts of all choices but the first; and of
# each choice the symbol as a byte, or ESCAPE, 4096 - frequency, and start.
Coding = tuple[int, int, int, tuple[int, ...], tuple[tuple[int, int, int], ...]]


def steps_of(frequencies: Sequence[int], starts: Sequence[int]) -> NDArray[np.object_]:
    """Steps for the encoder, as an array of tuples: taking from it is faster than making Python's integers."""
    number = list(range(TOTAL + 1))  # one object for equal numbers
    made = [(number[f], number[TOTAL - f], number[c]) for f, c in zip(frequencies, starts, strict=True)]
    steps = np.empty(len(made), object)
    steps[:] = made
    return steps


FLAT_STEPS = steps_of([FLAT] * (TOTAL // FLAT), range(0, TOTAL, FLAT))  # of the byte after an escape


def rans_encode(steps: Sequence[Step], check: int) -> bytes:
    """Codes steps, given in decoding order. Returns the final state big-endian, then the words in the order of use."""
    x, words, limit = LOW + check, [], 1 << 32 - PRECISION
    for f, rest, start in reversed(steps):
        quotient = x // f
        if quotient >= limit:  # x >= f << 20, without a shift for each step
            words.append(x & 0xFFFF)
            x >>= 16
            quotient = x // f
        x += quotient * rest + start  # (x // f << 12) + x % f + start
    words += [x & 0xFFFF, x >> 16]
    return struct.pack(f">{len(words)}H", *reversed(words))


class RansDecoded(NamedTuple):
    symbols: bytearray  # int8 in decoding order, of the channels that the stream has to their end
    check: int | None  # the encoder's 16 bits (other bits after damage); None if words are missing


def rans_decode(
    data: bytes,
    channels: Sequence[Sequence[Coding]],
    height: int,
    width: int,
    largest: int,
    offsets: Iterable[Sequence[int]],
) -> RansDecoded:
    """Decodes channels of height x width symbols. offsets: per channel, of each symbol: see `Tables.codings`.

    A word is read only when a step needs it, so a truncated stream gives exactly the channels that arrived. Raises
    BitstreamError for what no encoder writes: a first state below L, bytes left over, an unnecessary escape.
    """
    x = int.from_bytes(data[:4], "big")
    symbols = bytearray()
    if len(data) < 4:
        return RansDecoded(symbols, None)
    if x < LOW:
        raise BitstreamError(f"first state {x:#x} is below {LOW:#x}: the message was damaged")
    words = iter(np.frombuffer(data, ">u2", (len(data) - 4) // 2, 4).tolist())
    word = words.__next__
    try:
        # One long loop on purpose: a function call per symbol would double the time. Most symbols are zero, and take
        # the short way: nothing to search, nothing to store.
        for by_context, offset in zip(channels, offsets, strict=True):
            contexts = [*offset, *[0] * width]  # with a row below the last one
            block = bytearray(height * width)
            for place in range(height * width):
                start, end, rest, starts, steps = by_context[contexts[place]]
                if x < LOW:
                    x = x << 16 | word()
                low = x & 4095
                if start <= low < end:
                    x -= (x >> 12) * rest + start  # f * (x >> 12) + low - start
                    continue
                symbol, rest, start = steps[bisect_right(starts, low)]
                x -= (x >> 12) * rest + start
                if symbol == ESCAPE:
                    if x < LOW:
                        x = x << 16 | word()
                    low = x & 4095
                    symbol = low // FLAT ^ 128  # the flat byte is the symbol + 128
                    x = FLAT * (x >> 12) + low % FLAT
                    if symbol == ESCAPE or symbol <= largest or symbol >= 256 - largest:
                        raise BitstreamError(f"unnecessary escape for byte {symbol}: the message was damaged")
                block[place] = symbol
                sign = 1 if symbol < 128 else -1
                contexts[place + width] += sign
                if (place + 1) % width:
                    contexts[place + 1] += sign
            symbols += block
    except StopIteration:
        return RansDecoded(symbols, None)
    left_over = sum(2 for _ in words) + len(data) % 2
    if left_over:
        raise BitstreamError(f"{left_over} bytes left over: the message was damaged, or other tables wrote it")
    # Below 2 L no step emits a word, so the encoder's first state is the decoder's last one, without another word.
    return RansDecoded(symbols, x - LOW)
