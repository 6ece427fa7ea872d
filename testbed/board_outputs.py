"""What a board computes from pictures, as JSON: `python -m testbed.board_outputs BUNDLE BACKEND FOLDER`.

Two machines whose networks give the same integers print the same. arm64.py compares two.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from edge_runtime import wire
from edge_runtime.capture.picture_files import Picture, read_pictures
from edge_runtime.inference.bundle import Bundle, open_bundle
from edge_runtime.inference.labels import labels_seen
from edge_runtime.inference.networks import load_draft, load_head, load_labels
from edge_runtime.inference.preprocess import to_input
from edge_runtime.inference.rate import features_of
from edge_runtime.picture_checks import decode_picture
from edge_runtime.pipeline import build_request
from edge_runtime.planning import Plan

PLAN = Plan("speculative", "compared", 60_000)


def outputs(bundle: Bundle, backend: str, pictures: Iterator[Picture]) -> Iterator[dict[str, object]]:
    """Of each picture: SHA-256 of the head's input; in hex, the symbols of the finest level and the whole request.

    Raises BundleError, BackendError, PictureError.
    """
    head, draft = load_head(bundle, backend, 1), load_draft(bundle, backend, 1)
    labels = load_labels(bundle, head, backend, 1)
    for picture in pictures:
        pixels = to_input(decode_picture(picture.data))
        latent = head.latent(pixels)
        seen = labels_seen(labels, latent)
        tokens = draft.write(latent.symbols(), seen).tokens
        request = build_request(bundle, bytes(8), PLAN, pixels, features_of(latent, bundle), tokens, labels=seen)
        yield {
            "picture": picture.name,
            "pixels": hashlib.sha256(pixels.tobytes()).hexdigest(),
            "symbols": latent.symbols().tobytes().hex(),
            "request": wire.encode_request(request).hex(),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m testbed.board_outputs")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("backend", choices=["onnx", "litert"])
    parser.add_argument("folder", type=Path, help="of pictures")
    args = parser.parse_args()
    print(json.dumps(list(outputs(open_bundle(args.bundle), args.backend, read_pictures(args.folder)))))
