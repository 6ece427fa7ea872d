"""Trains the tail further on coded pictures, so that `aiflow bench rate` compares with picture codecs fairly.

Ours has seen rounded symbols during its whole training, so the codecs get a tail that has seen JPEG, WebP and AVIF at
all sizes and qualities: one for all of them, as there is one for all of our levels, after as many steps. Error and
distillation are those of stage 3, towards the picture before it was coded. The text decoders stay as they are.

Not a stage of the recipe: the bundle does not need it. `python -m models.recipe.codec_tail --work DIR --out FILE`
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from models.backbone import CUT, normalise, pretrained_lite0
from models.coded_pictures import SIZES, picture_codecs
from models.family import Tail
from models.recipe import stage2_views, stage3_bottleneck
from models.recipe.depthwise import use_matrices
from models.recipe.stage3_bottleneck import GAINS, divergence
from models.recipe.stage4_head import float_head, float_symbols
from models.recipe.training import Training
from models.recipe.workspace import Workspace, channels_last

NAME = "codec-tail"
PHOTOS = 32  # per step
CHECKPOINT_EVERY = 100
OURS = stage3_bottleneck.Settings()


@dataclass(frozen=True, slots=True)
class Settings:
    """Length of training, rate and weights of the losses."""

    steps: int = OURS.steps
    learning_rate: float = OURS.known_rate
    error_weight: float = OURS.error_weights[1]
    kl_weight: float = OURS.kl_weight


def run(work: Workspace, settings: Settings, out: Path) -> None:
    """Writes the averaged weights of the tail to `out`, a safetensors file."""
    torch.manual_seed(12)
    rng = np.random.default_rng(12)
    photos = work.array("photos-train")
    head = float_head(work).requires_grad_(False)
    backbone = channels_last(pretrained_lite0()).to(torch.bfloat16).requires_grad_(False)
    net = Tail(len(GAINS))
    net.load_state_dict(work.averaged(stage3_bottleneck.NAME, "tail."))
    net = channels_last(net)
    use_matrices(net.blocks, 14)
    optimiser = torch.optim.AdamW(net.parameters(), settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    training = Training(work, NAME, net, optimiser, settings.steps, CHECKPOINT_EVERY)
    for _ in training.steps():
        chosen, views = rng.integers(0, len(photos), PHOTOS), rng.integers(0, stage2_views.VIEWS["train"], PHOTOS)
        pixels = np.stack([stage2_views.make_view(photos, *pair, 0) for pair in zip(chosen, views, strict=True)])
        with torch.no_grad():
            maps = backbone.blocks[:CUT](backbone.stem(normalise(torch.from_numpy(pixels), torch.bfloat16)))
            true_map, true_logits = (each.float() for each in backbone.rest(maps))
        with torch.autocast("cpu", torch.bfloat16):
            last = net.last_map(torch.from_numpy(float_symbols(head, coded(pixels, rng))).float())
            logits = backbone.classifier(net.features(last).mean((2, 3)))
        error = (last.float() - true_map).square().mean() / true_map.var()
        kl = divergence(logits.float(), true_logits)
        loss = settings.error_weight * error + settings.kl_weight * kl
        training.update(loss, error=error.item(), kl=kl.item())
    training.finish()
    save_file({name: weight.contiguous() for name, weight in training.weights.items()}, out)


def coded(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [B, 224, 224, 3] to what a server sees of each, coded by a random codec at a random size and quality."""
    codecs = list(picture_codecs().values())
    received = []
    for picture in pixels:
        codec = codecs[rng.integers(len(codecs))]
        quality = rng.integers(codec.qualities[0], codec.qualities[-1] + 1)
        received.append(codec.code(picture, int(rng.choice(SIZES)), int(quality))[1])
    return np.stack(received)


def main() -> None:
    """See `python -m models.recipe.codec_tail --help`."""
    parser = argparse.ArgumentParser("python -m models.recipe.codec_tail", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the working directory of the recipe, after stage 4")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="for `aiflow bench rate --codec-tail`")
    parser.add_argument("--steps", type=int, default=OURS.steps, help=f"default: {OURS.steps}, as in stage 3")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run(Workspace(args.work), Settings(steps=args.steps), args.out)


if __name__ == "__main__":
    main()
