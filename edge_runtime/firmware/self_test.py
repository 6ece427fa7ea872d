"""`python -m edge_runtime.firmware.self_test FOLDER SETUP`: whether a bundle works on this board.

SETUP is a Setup as JSON, with the backend "none" for a board that only offloads.

It runs before the bundle is installed, in a process of its own: one frame goes through head, symbols, labels, draft,
bits and back.
"""

import sys
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import open_bundle
from edge_runtime.inference.choice import Setup
from edge_runtime.inference.labels import labels_seen
from edge_runtime.inference.networks import load_networks
from edge_runtime.inference.preprocess import PIXELS
from edge_runtime.wire.bitstream import decode, encode


def check(folder: Path, setup: Setup) -> None:
    """Raises AiflowError."""
    bundle = open_bundle(folder)
    tables, _ = bundle.tables, bundle.inter_tables
    symbols = np.zeros(tables.shape, np.int8)
    if setup.backend != "none":
        head, draft, labels = load_networks(bundle, setup, has_labels=True)
        assert head
        assert draft
        pixels = np.random.default_rng(0).integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)
        latent = head.latent(pixels)
        symbols = latent.symbols()
        bundle.text(list(draft.write(symbols, labels_seen(labels, latent)).tokens))
    level, groups = tables.levels - 1, tables.groups
    if (decode(encode(symbols, tables, level, groups), tables).symbols != symbols).any():
        raise AiflowError("the symbols of a frame do not come back from their bits: build the bundle again")


if __name__ == "__main__":
    try:
        check(Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=Setup))
    except AiflowError as failure:
        sys.exit(str(failure))
