"""The cost of a frame's symbols: bytes against the ideal code and against zstd, milliseconds to encode and to decode.

Times are medians over frames on one thread: compare them within one run on one machine.
"""

import statistics
import time
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from edge_runtime.wire.bitstream import decode, encode
from edge_runtime.wire.tables import Tables, cost_bits


def zstd_bytes(symbols: NDArray[np.int8]) -> int:
    """Bytes of one frame with zstd -19: of int8 or, if they fit, two symbols per byte, whichever is smaller."""
    packings = [symbols.tobytes()]
    if np.abs(symbols.astype(np.int16)).max() <= 7:
        nibbles = np.append(symbols.ravel() & 15, np.zeros(symbols.size % 2, np.int8)).astype(np.uint8)
        packings.append((nibbles[::2] << 4 | nibbles[1::2]).tobytes())
    # Without size, checksum and dictionary id zstd's frame is smallest.
    coder = zstandard.ZstdCompressor(level=19, write_content_size=False, write_checksum=False, write_dict_id=False)
    return min(len(coder.compress(packing)) for packing in packings)


def run(symbols: NDArray[np.int8], tables: Tables, level: int = 0) -> dict[str, Any]:
    """Codes every frame of symbols int8 [N, C, H, W], checks the decoded symbols, and returns the figures."""
    decode(encode(symbols[0], tables, level), tables)  # builds the coders' tables, which happens once
    sizes, encode_ms, decode_ms = [], [], []
    for frame in symbols:
        begin = time.perf_counter()
        data = encode(frame, tables, level)
        middle = time.perf_counter()
        decoded = decode(data, tables)
        end = time.perf_counter()
        if not decoded.checked or not np.array_equal(decoded.symbols, frame):
            raise SystemExit("a decoded frame differs from its original: the codec is broken")
        sizes.append(len(data))
        encode_ms.append(1e3 * (middle - begin))
        decode_ms.append(1e3 * (end - middle))
    ideal = float(cost_bits(symbols, tables, level).mean()) / 8
    mean = statistics.fmean(sizes)
    zstd = statistics.fmean(zstd_bytes(frame) for frame in symbols)
    return {
        "frames": len(symbols),
        "shape": list(symbols.shape[1:]),
        "contexts": tables.frequencies.shape[2],
        "mean_bytes": round(mean, 2),
        "ideal_bytes": round(ideal, 2),
        "overhead_percent": round(100 * (mean / ideal - 1), 2),
        "zstd19_bytes": round(zstd, 2),
        "zstd19_percent_more": round(100 * (zstd / mean - 1), 1),
        "encode_ms": round(statistics.median(encode_ms), 3),
        "decode_ms": round(statistics.median(decode_ms), 3),
    }
