"""`aiflow evaluate`: quality and bytes on photos, through the real codec, envelopes and verifier in one process."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.config import PolicyConfig
from edge_runtime.inference.bundle import Bundle, open_bundle
from models import SHIPPED_BUNDLE
from testbed.argument_types import PHOTOS, new_file, number, share
from testbed.terminal import print_figures, track

if TYPE_CHECKING:
    from benchmarks.quality import RateLimit

CAPTIONS_HELP = "columns image, caption, and split if there are several; images by path or file name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="caption|classify", required=True)
    caption = kinds.add_parser("caption", help="CIDEr and BLEU against captions that people wrote")
    caption.add_argument("--captions", type=Path, required=True, metavar="TSV", help=CAPTIONS_HELP)
    caption.add_argument("--split", help="only photos of this split")
    caption.add_argument(
        "--paradigm",
        choices=["device", "split", "speculative", "offload", "auto"],
        required=True,
        help="auto: speculative, and the board accepts good drafts without verification",
    )
    floor = PolicyConfig().quality_floor
    caption.add_argument(
        "--quality-floor", type=share, default=floor, metavar="SHARE", help=f"for auto (default: {floor}, a board's)"
    )
    caption.add_argument(
        "--tier", choices=["edge", "cloud", "lm"], default="cloud", help="who answers (default: cloud)"
    )
    classify = kinds.add_parser("classify", help="accuracy on pictures named class/name.JPEG")
    classify.add_argument(
        "--question", type=Path, metavar="FILE", help="a taught question's classes, not the bundle's own"
    )
    classify.add_argument(
        "--paradigm", choices=["device", "split"], default="split", help="who labels: the board, or a server (default)"
    )
    for kind in (caption, classify):
        kind.add_argument("--level", type=int, metavar="N", help="finest level that is sent (default: the bundle's)")
        kind.add_argument("--groups", type=int, metavar="N", help="channel groups that are sent (default: all)")
        kind.add_argument("--bytes", type=number, metavar="N", help="longest features; coarser ones are sent if needed")
        kind.add_argument(
            "--no-labels", action="store_true", help="no labels of the board, for drafts or with features"
        )
        kind.add_argument("--images", **PHOTOS, required=True)
        kind.add_argument("--bundle", type=Path, default=SHIPPED_BUNDLE, help="default: the shipped bundle")
        kind.add_argument("--backend", choices=["onnx", "litert"], default="onnx")
        kind.add_argument("--limit", type=number, metavar="N", help="only the first N photos")
        kind.add_argument("--json", type=new_file, metavar="FILE", help="write the figures to FILE")


def run(args: argparse.Namespace) -> None:
    """Prints the figures and writes the JSON."""
    bundle = open_bundle(args.bundle)
    figures = _caption(args, bundle) if args.kind == "caption" else _classify(args, bundle)
    print_figures(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def _caption(args: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    from benchmarks.quality import Photos, measure_captions, proven_chain
    from models.captions import captions_of

    captions = captions_of(args.captions, args.split)
    photos = Photos(args.images, captions, args.limit)
    chain = proven_chain(
        bundle,
        args.paradigm,
        args.tier,
        args.backend,
        args.quality_floor,
        rate_limit(args),
        sends_labels=not args.no_labels,
    )
    title, count = f"{args.paradigm} {args.tier}", args.limit or len(captions)
    return measure_captions(chain, photos, captions, lambda pictures: track(pictures, title, count))


def _classify(args: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    from benchmarks.quality import Photos, class_names, measure_labels, proven_chain

    question = None
    if args.question:
        from models.questions import read_question

        question = read_question(args.question, bundle)
    else:
        class_names(bundle)
    tier = next(iter(bundle.manifest.targets), "")
    chain = proven_chain(
        bundle, args.paradigm, tier, args.backend, None, rate_limit(args), sends_labels=not args.no_labels
    )
    photos = Photos(args.images, limit=args.limit)
    return measure_labels(chain, photos, lambda pictures: track(pictures, "classify", args.limit), question)


def rate_limit(args: argparse.Namespace) -> "RateLimit":
    from benchmarks.quality import RateLimit

    return RateLimit(args.level, args.groups, args.bytes)
