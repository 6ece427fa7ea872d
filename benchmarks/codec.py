"""The cost of a frame's symbols: bytes against the ideal code and against zstd, milliseconds to encode and to decode.

`python -m benchmarks.codec --json codec.json` uses synthetic symbols; `--symbols FILE.npz --tables FILE` takes real
ones, int8 [N, C, H, W] under the key `symbols`. Times are medians over frames on one thread: compare them within one
run on one machine.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from edge_runtime.wire import Tables, cost_bits, count_tables, decode, encode


def synthetic(frames: int, seed: int) -> NDArray[np.int8]:
    """Symbols int8 [frames, 64, 7, 7] like the shipped head's: mostly zero, half of the channels nearly always."""
    spread = np.concatenate([np.linspace(1.2, 0.18, 30), np.full(34, 0.07)])
    values = np.random.default_rng(seed).laplace(size=(frames, 64, 7, 7))
    values[..., 1:] += values[..., :-1] / 2
    symbols: NDArray[np.int8] = np.clip(np.rint(values * spread[:, None, None]), -127, 127).astype(np.int8)
    return symbols


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
    decode(encode(symbols[0], tables, level), tables)  # builds the slot maps, which happens once
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--symbols", type=Path, help="npz with symbols int8 [N, C, H, W]")
    parser.add_argument("--tables", type=Path, help="the bundle's table file")
    parser.add_argument("--level", type=int, default=0)
    args = parser.parse_args()
    if bool(args.symbols) != bool(args.tables):
        parser.error("--symbols and --tables belong together")
    if args.symbols:
        results = [run(np.load(args.symbols)["symbols"], Tables.from_bytes(args.tables.read_bytes()), args.level)]
    else:
        train, test = synthetic(800, seed=1), synthetic(200, seed=2)
        results = [run(test, count_tables([train], contexts=contexts)) for contexts in (1, 3)]
    text = json.dumps(results, indent=1)
    sys.stdout.write(text + "\n")
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
