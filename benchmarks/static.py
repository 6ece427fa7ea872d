"""A static camera: bytes of frames that are coded against an earlier one, and frames that need no answer of their own.

The scenes are made from photos (models/recipe/scenes.py). Each frame is coded against the one before it, as over a link
whose replies come within the interval between frames. Its symbols, and so its answer, are the same in either coding.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any

import cv2
import numpy as np

from edge_runtime.inference.bundle import Bundle, BundleError
from edge_runtime.inference.head import Head, Latent
from edge_runtime.inference.preprocess import to_input
from edge_runtime.inference.reuse import distance
from edge_runtime.wire.bitstream import Reference, encode
from models.recipe.scenes import SCENES, Pixels, frames_of

APPEARING = 0.12, 0.2  # side of an object that appears, share of the height


def run(bundle: Bundle, head: Head, photos: Sequence[Pixels], frames: int, reuse_distance: float) -> dict[str, Any]:
    """Figures by scene. photos: uint8 [H, W, 3], at least two. frames: of each scene of each photo."""
    if bundle.inter_tables is None:
        raise BundleError(f"bundle {bundle.manifest.name} has no tables to code against an earlier frame")
    rng, figures = np.random.default_rng(0), {}
    for scene in SCENES:
        sequences = [
            [head.latent(to_input(frame)) for frame in islice(frames_of(scene, photo, photos[i - 1], rng), frames)]
            for i, photo in enumerate(photos)
        ]
        figures[scene] = _coded(bundle, sequences) | {"reused_share": _reused(sequences, reuse_distance)}
    cuts = [[head.latent(to_input(photos[i - 1])), head.latent(to_input(photo))] for i, photo in enumerate(photos)]
    figures["cut"] = _coded(bundle, cuts)
    for side in APPEARING:
        found = [_change(head, photo, photos[i - 1], side, rng) > reuse_distance for i, photo in enumerate(photos)]
        figures[f"object of {side:.0%}"] = {"noticed_share": round(statistics.fmean(found), 3)}
    return figures


def _coded(bundle: Bundle, sequences: Sequence[Sequence[Latent]]) -> dict[str, float]:
    """Bytes of the features of all frames but the first one."""
    level, tables, inter = bundle.manifest.latent.default_level, bundle.tables, bundle.inter_tables
    assert inter is not None
    alone, sent = [], []
    for latents in sequences:
        symbols = [latent.symbols(level) for latent in latents]
        for earlier, later in pairwise(symbols):
            alone.append(len(encode(later, tables, level)))
            sent.append(min(alone[-1], len(encode(later, inter, level, reference=Reference(0, earlier)))))
    ratio = round(statistics.fmean(sent) / statistics.fmean(alone), 3)
    return {"alone_bytes": round(statistics.fmean(alone), 1), "bytes": round(statistics.fmean(sent), 1), "ratio": ratio}


def _reused(sequences: Sequence[Sequence[Latent]], reuse_distance: float) -> float:
    """The share of the frames that use an answer again, if each answer is there before the next frame."""
    reused = 0
    for latents in sequences:
        answered = latents[0]
        for latent in latents[1:]:
            is_reused = distance(latent, answered) <= reuse_distance
            answered = answered if is_reused else latent
            reused += is_reused
    return round(reused / sum(map(len, sequences)), 3)


def _change(head: Head, photo: Pixels, other: Pixels, side: float, rng: np.random.Generator) -> float:
    """The distance between a scene and the same one with an object anywhere in it."""
    pixels = math.ceil(side * photo.shape[0])
    y, x = (int(rng.integers(0, length - pixels + 1)) for length in photo.shape[:2])
    changed = photo.copy()
    changed[y : y + pixels, x : x + pixels] = cv2.resize(other, (pixels, pixels), interpolation=cv2.INTER_AREA)
    before, after = (next(frames_of("noise", scene, other, rng)) for scene in (photo, changed))
    return distance(head.latent(to_input(before)), head.latent(to_input(after)))
