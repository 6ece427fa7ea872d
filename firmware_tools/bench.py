"""`aiflow bench`: speed of one part, on the demo's photos or the user's own; benchmarks/ says what a figure means."""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.preprocess import decode_picture, to_input
from firmware_tools.demo_photos import collect
from firmware_tools.evaluate import SHIPPED_BUNDLE
from firmware_tools.terminal import print_figures

BACKENDS = ("onnx", "litert")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which part, and on what."""
    parser.add_argument("part", choices=["codec", "device", "server", "gateway"])
    parser.add_argument("--images", type=Path, nargs="+", metavar="DIR_OR_TAR", help="photos (default: the demo's)")
    parser.add_argument("--limit", type=int, default=64, metavar="N", help="at most N of them (default: 64)")
    parser.add_argument("--bundle", type=Path, default=SHIPPED_BUNDLE, metavar="DIR", help="default: the shipped one")
    parser.add_argument("--backend", choices=BACKENDS, help="of head and draft (default: onnx; device: both)")
    parser.add_argument("--tier", choices=["edge", "cloud"], default="edge", help="of server, gateway (default: edge)")
    parser.add_argument("--frames", type=int, default=500, metavar="N", help="of device (default: 500)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each half of gateway (default: 10)")
    parser.add_argument("--threads", type=int, default=1, help="of server and gateway (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")


def run(args: argparse.Namespace) -> None:
    """Prints the figures and writes the JSON."""
    figures = measure(args, open_bundle(args.bundle))
    print_figures(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(args: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    """The figures of one part."""
    from edge_runtime.runtime import load_draft, load_head

    frames = list(frames_of(args.images, args.limit))
    if args.part == "device":
        from benchmarks import device

        return device.run(bundle, frames, [args.backend] if args.backend else BACKENDS, args.frames)
    head = load_head(bundle, args.backend or "onnx", 1)
    symbols = np.stack([head.symbols(to_input(frame)) for frame in frames])
    if args.part == "codec":
        from benchmarks import codec

        return codec.run(symbols, bundle.tables, bundle.tables.levels - 1)
    draft = load_draft(bundle, args.backend or "onnx", 1)
    drafts = [draft.write(s).tokens for s in symbols]
    if args.part == "server":
        from benchmarks import server

        return server.run(bundle, symbols, drafts, args.tier, threads=args.threads)
    from benchmarks import gateway

    return gateway.run(bundle, symbols, drafts, args.tier, seconds=args.seconds, threads=args.threads)


def frames_of(images: list[Path] | None, limit: int) -> Iterator[NDArray[np.uint8]]:
    """uint8 RGB [H, W, 3]: the user's photos; or of each shipped one the whole, its mirror image and its quarters."""
    photos = (decode_picture(photo.data) for photo in collect(images, limit=limit))
    return photos if images else islice((view for photo in photos for view in _views(photo)), limit)


def _views(photo: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    y, x = photo.shape[0] // 2, photo.shape[1] // 2
    for view in (photo, photo[:, ::-1], photo[:y, :x], photo[:y, x:], photo[y:, :x], photo[y:, x:]):
        yield np.ascontiguousarray(view)
