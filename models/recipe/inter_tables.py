"""The tables that code a frame against an earlier one, counted on scenes made from photos (scenes.py).

The recipe counts them with the other tables. `python -m models.recipe.inter_tables BUNDLE --images ...` adds them to a
bundle that has none; the bundle's id changes, so servers and boards need the new one.
"""

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.capture.picture_files import read_pictures
from edge_runtime.inference.bundle import INTER_TABLES, MANIFEST, FileRecord, file_hash, open_bundle
from edge_runtime.inference.head import Head
from edge_runtime.inference.networks import load_head
from edge_runtime.inference.preprocess import to_input
from edge_runtime.picture_checks import decode_picture
from edge_runtime.wire.tables import Tables, count_inter_tables
from models.recipe.scenes import SCENES, Pixels, frames_of

PHOTOS = 600  # with 8 frames of each


def count(head: Head, tables: Tables, photos: Sequence[Pixels]) -> Tables:
    """Tables for frames with a reference, for the same latent as `tables`. photos: uint8 [H, W, 3], at least two."""
    rng = np.random.default_rng(0)
    pairs = [
        [head.latent(to_input(frame)) for frame in islice(frames_of(scene, photo, photos[number - 1], rng), 2)]
        for number, photo in enumerate(photos)
        for scene in SCENES
    ]
    by_level = [
        np.array([[latent.symbols(level) for latent in pair] for pair in pairs]) for level in range(tables.levels)
    ]
    return count_inter_tables([(symbols[:, 0], symbols[:, 1]) for symbols in by_level], tables)


def main() -> None:
    """See the docstring of this file."""
    parser = argparse.ArgumentParser("python -m models.recipe.inter_tables", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="DIR_OR_TAR", help="training photos")
    args = parser.parse_args()
    bundle = open_bundle(args.bundle)
    pictures = (picture for source in args.images for picture in read_pictures(source))
    photos = [decode_picture(picture.data) for picture in islice(pictures, PHOTOS)]
    tables = count(load_head(bundle, "onnx", 1), bundle.tables, photos)
    path = bundle.path / INTER_TABLES
    path.write_bytes(tables.to_bytes())
    files = {**bundle.manifest.files, INTER_TABLES: FileRecord(file_hash(path), path.stat().st_size)}
    manifest = msgspec.structs.replace(bundle.manifest, files=dict(sorted(files.items())))
    (bundle.path / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")


if __name__ == "__main__":
    main()
