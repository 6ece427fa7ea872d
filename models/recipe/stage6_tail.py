"""The tail trained further, together with the cloud's decoder: its features then say what captions ask for.

The bottleneck's training keeps what labels need, with few steps for captions. Here the symbols are fixed, so boards and
bits stay as they are; only what the server makes of them changes. What the tail said of the labels before is kept by
distillation, on photos without captions, too: the captions show few of the thousand classes.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from models.backbone import pretrained_lite0
from models.family import Dropout
from models.labels import some_words
from models.recipe import stage6_targets as targets
from models.recipe.depthwise import use_matrices
from models.recipe.precision import autocast
from models.recipe.scores import cider
from models.recipe.stage3_bottleneck import REFERENCE, Rates, complete_rates, divergence, select_memory, some_captions
from models.recipe.training import Training
from models.recipe.workspace import Workspace

NAME = targets.TAIL
PHOTOS, OTHERS = 64, 24  # per step: with captions, and without
CHECKPOINT_EVERY = 200


@dataclass(frozen=True, slots=True)
class Settings:
    """Length of training, rates, dropout and the weight of the labels."""

    steps: int = 1000
    tail_learning_rate: float = 1e-4
    learning_rate: float = 2.5e-4
    dropout: float = 0.2
    kl_weight: float = 1.0


def run(work: Workspace, settings: Settings) -> None:
    """Writes 6-tail.pt: the tail and the cloud's decoder."""
    torch.manual_seed(6)
    rng = np.random.default_rng((6, 2))
    net = targets.new_target(work, "cloud")
    before = net.tail.features.requires_grad_(False)
    net = targets.new_target(work, "cloud")
    net.load_state_dict(work.averaged(f"{targets.NAME}-cloud"))
    net.tail.requires_grad_(True)
    use_matrices(net.tail.blocks, 14)
    groups = [
        {"params": list(net.tail.parameters()), "lr": settings.tail_learning_rate},
        {"params": list(net.decoder.parameters()), "lr": settings.learning_rate},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.02, betas=(0.9, 0.98))
    quality = partial(evaluate, work)
    training = Training(work, NAME, net, optimiser, settings.steps, CHECKPOINT_EVERY, evaluate=quality)
    classifier = pretrained_lite0().classifier.requires_grad_(False)
    captions, sentences = np.load(work / "captions-train.npy"), np.load(work / "sentences.npy")
    is_noun = np.load(work / "nouns.npy")
    chances = targets.sampling_chances(np.load(work / "collections-train.npy"))
    parts = [
        (work.array(f"codes-{part}"), *targets.maps_and_labels(work, part), targets.view_rates(work, part))
        for part in ("train", "unlabelled")
    ]
    codes, _, labels, _ = parts[0]
    drop = Dropout(settings.dropout)

    def features_of(part: int, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """The features of some views, and the divergence of their labels from what they were."""
        codes, maps, _, rates = parts[part]
        at = Rates(rates.level[chosen], rates.channels[chosen])
        symbols = targets.rated_symbols(work, codes[chosen], at)
        features = net.features(net.tail.last_map(symbols, at.level, at.arrived))
        with torch.no_grad():
            known = classifier(before(targets.maps_of(maps, chosen)).mean((2, 3)))
        return features, divergence(classifier(features.mean(1)).float(), known.float())

    for _ in training.steps():
        photos = np.sort(rng.choice(len(captions), PHOTOS, p=chances))
        chosen = photos + len(captions) * rng.integers(0, len(codes) // len(captions), PHOTOS)
        texts, of_photo = some_captions(captions[photos], targets.CAPTIONS, rng)
        with autocast():
            features, kl = features_of(0, chosen)
            memory = net.decoder.encode_image(features, some_words(labels[chosen], rng), drop)
            caption = targets.text_loss(net.decoder, texts, select_memory(memory, of_photo), drop)
            if len(parts[1][0]):
                _, others = features_of(1, np.sort(rng.integers(0, len(parts[1][0]), OTHERS)))
                kl = (PHOTOS * kl + OTHERS * others) / (PHOTOS + OTHERS)
            loss = caption + settings.kl_weight * kl
            if len(sentences):
                rows = sentences[rng.integers(0, len(sentences), targets.FEWER_SENTENCES)]
                words = targets.own_nouns(rows, is_noun, rng)
                loss = loss + targets.SENTENCE_WEIGHT * targets.sentence_loss(net.decoder, rows, words, drop)
        training.update(loss, caption=caption.item(), kl=kl.item())
    training.finish()


@torch.inference_mode()
def evaluate(work: Workspace, weights: dict[str, Tensor], limit: int | None = None) -> dict[str, float]:
    """CIDEr of greedy texts on dev photos, per collection, and how often the features alone tell the label."""
    net = targets.new_target(work, "cloud")
    net.load_state_dict(weights)
    codes, (_, labels) = work.array("codes-dev"), targets.maps_and_labels(work, "dev")

    def write(photos: np.ndarray) -> list[list[int]]:
        rates = complete_rates(len(photos), REFERENCE)
        with autocast():
            last = net.tail.last_map(targets.rated_symbols(work, codes[photos], rates), rates.level, rates.arrived)
        return targets.write(net, last.permute(0, 2, 3, 1).to(torch.float16).numpy(), labels[photos])

    return cider(work, "dev", write, limit) | targets.label_accuracy(work, net)
