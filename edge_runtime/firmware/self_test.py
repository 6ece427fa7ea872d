"""`python -m edge_runtime.firmware.self_test FOLDER BACKEND THREADS`: whether a bundle works on this board.

It runs before the bundle is installed, in a process of its own: one frame goes through head, symbols, draft, labels,
bits and back.
"""

import sys
from pathlib import Path

import numpy as np

from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import open_bundle
from edge_runtime.inference.networks import load_draft, load_head, load_labels
from edge_runtime.inference.preprocess import PIXELS
from edge_runtime.wire import decode, encode


def check(folder: Path, backend: str, threads: int) -> None:
    """backend: "none" for a board that only offloads. Raises AiflowError."""
    bundle = open_bundle(folder)
    tables, _ = bundle.tables, bundle.inter_tables
    symbols = np.zeros(tables.shape, np.int8)
    if backend != "none":
        head = load_head(bundle, backend, threads)
        pixels = np.random.default_rng(0).integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)
        symbols = head.symbols(pixels)
        drafted = load_draft(bundle, backend, threads).write(symbols)
        bundle.text(list(drafted.tokens))
        load_labels(bundle, head, backend, threads)  # tries them on a frame
    level, groups = tables.levels - 1, tables.groups
    if (decode(encode(symbols, tables, level, groups), tables).symbols != symbols).any():
        raise AiflowError("the symbols of a frame do not come back from their bits: build the bundle again")


if __name__ == "__main__":
    try:
        check(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    except AiflowError as failure:
        sys.exit(str(failure))
