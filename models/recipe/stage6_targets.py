"""The targets: classifier and one text decoder per tier, trained on the symbols of the deployed head.

The tail was trained with the bottleneck on rounded symbols and stays fixed, so its maps of all views are computed once,
and the layers behind it are trained on those maps. First the last convolution and the classifier, together with the
cloud's decoder, on people's captions; later the edge's smaller decoder on the same features and the cloud's own texts
(sequence-level distillation: Kim & Rush, arXiv 1606.07947). So one pass of the tail serves every tier.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_runtime.inference.bundle import BOS, EOS, PAD
from models.backbone import MAP_CHANNELS
from models.family import LATENT, Classifier, DecoderShape, Dropout, Tail, TextDecoder, decoder_shapes
from models.recipe.scores import cider
from models.recipe.stage3_bottleneck import caption_loss, repeat_memory
from models.recipe.training import Training
from models.recipe.workspace import Workspace, blocks, channels_last

NAME, MAPS = "6-targets", "6-maps"
TEXTS, CLASS_PHOTOS = 320, 16  # per step
CHECKPOINT_EVERY = 300


@dataclass(frozen=True, slots=True)
class Settings:
    """Lengths of training, rates and dropout."""

    cloud_steps: int = 1000
    edge_steps: int = 900
    learning_rate: float = 6e-4
    features_rate: float = 0.3  # for the tail's last convolution, which is not new: a share of the learning rate
    dropout: float = 0.2


class Target(nn.Module):
    """A tail with a classifier and one decoder."""

    def __init__(self, shape: DecoderShape, classes: int) -> None:
        super().__init__()
        self.tail, self.classifier, self.decoder = Tail(), Classifier(classes), TextDecoder(shape)

    def features(self, maps: Tensor) -> Tensor:
        """The tail's last maps [B, 320, 7, 7] to features [B, N, 1280]."""
        features: Tensor = self.tail.features(maps)
        return features.flatten(2).transpose(1, 2)


def symbols_of(symbols: np.ndarray, chosen: np.ndarray | slice) -> Tensor:
    """Rows of a symbols array as float [B, 64, 7, 7]."""
    return torch.from_numpy(symbols[chosen].astype(np.float32)).contiguous(memory_format=torch.channels_last)


def maps_of(maps: np.ndarray, chosen: np.ndarray | slice) -> Tensor:
    """Rows of a cache of maps as bfloat16 [B, 320, 7, 7]."""
    return torch.from_numpy(np.array(maps[chosen])).permute(0, 3, 1, 2).to(torch.bfloat16)


def run(work: Workspace, settings: Settings, tier: str) -> None:
    """Writes 6-targets-<tier>.pt; the edge's needs the cloud's texts of stage 8."""
    torch.manual_seed(6)
    net = new_target(work, tier)
    if tier == "cloud":
        if not work.is_done(MAPS):
            cache_maps(work)
        train(work, tier, net, np.load(work / "captions-train.npy"), settings.cloud_steps, settings)
    else:
        cloud = work.averaged(f"{NAME}-cloud")
        net.load_state_dict({k: v for k, v in cloud.items() if not k.startswith("decoder.")}, strict=False)
        train(work, tier, net, np.load(work / "texts-train.npy")[:, None], settings.edge_steps, settings)


def new_target(work: Workspace, tier: str) -> Target:
    """A target with the weights of the bottleneck's training. Only the edge's decoder is new."""
    net = Target(decoder_shapes(work.vocabulary)[tier], work.classes)
    cut = work.averaged("3-bottleneck")
    known = ("tail.", "classifier.", "decoder.") if tier == "cloud" else ("tail.", "classifier.")
    missing = net.load_state_dict({k: v for k, v in cut.items() if k.startswith(known)}, strict=False).missing_keys
    assert tier == "edge" or not missing, missing
    return channels_last(net)


def cache_maps(work: Workspace, batch: int = 200) -> None:
    """Writes maps-{train,classes,dev}: the tail's last map of every view, float16 [views * photos, 7, 7, 320]."""
    tail = new_target(work, "edge").tail
    for part in ("train", "classes", "dev"):
        symbols = work.array(f"symbols-{part}")
        maps = work.new_array(f"maps-{part}", (len(symbols), *LATENT[1:], MAP_CHANNELS), np.float16)
        for rows in blocks(f"maps of {part}", len(symbols), batch):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                last = tail.last_map(symbols_of(symbols, rows))
            maps[rows] = last.permute(0, 2, 3, 1).to(torch.float16).numpy()
    work.finish(MAPS, {part: len(work.array(f"maps-{part}")) for part in ("train", "classes", "dev")})


def train(work: Workspace, tier: str, net: Target, captions: np.ndarray, total: int, settings: Settings) -> None:
    """Cross-entropy training of one tier. The cloud's also trains the shared features and the classifier.

    captions int16 [photos or views of them, texts, T].
    """
    rng = np.random.default_rng(6)
    maps, photos = work.array("maps-train"), TEXTS // captions.shape[1]
    class_maps, labels = work.array("maps-classes"), np.load(work / "labels-classes.npy")
    trains_features = tier == "cloud"
    shared = [*net.tail.features.parameters(), *net.classifier.parameters()] if trains_features else []
    groups: list[dict[str, Any]] = [{"params": list(net.decoder.parameters()), "lr": settings.learning_rate}]
    groups += [{"params": shared, "lr": settings.learning_rate * settings.features_rate}] * trains_features
    optimiser = torch.optim.AdamW(groups, weight_decay=0.02, betas=(0.9, 0.98))
    quality = partial(evaluate, work, tier)
    training = Training(work, f"{NAME}-{tier}", net, optimiser, total, CHECKPOINT_EVERY, evaluate=quality)
    drop = Dropout(settings.dropout)
    for _ in training.steps():
        chosen = np.sort(rng.integers(0, len(maps), photos))
        also = np.sort(rng.integers(0, len(class_maps), CLASS_PHOTOS))
        texts = torch.from_numpy(captions[chosen % len(captions)].astype(np.int64)).flatten(0, 1)  # [B * 5, T]
        texts = texts[:, : int((texts != 0).sum(1).max())]
        with torch.autocast("cpu", torch.bfloat16):
            features = net.features(torch.cat([maps_of(maps, chosen), maps_of(class_maps, also)]))
            guesses = net.classifier(drop(features[photos:])).float()
            memory = repeat_memory(net.decoder.encode_image(features[:photos], drop), captions.shape[1])
            wanted = texts[:, 1:] != PAD  # half of a padded batch
            words = net.decoder(texts[:, :-1], memory, drop, wanted)
            loss = caption_loss(words, texts[:, 1:][wanted])
        label_loss = F.cross_entropy(guesses, torch.from_numpy(labels[also % len(labels)]))
        total_loss = loss + 0.3 * label_loss if trains_features else loss
        training.update(total_loss, caption=loss.item(), label=label_loss.item())
    training.finish()


def evaluate(work: Workspace, tier: str, weights: dict[str, Tensor], limit: int | None = None) -> dict[str, float]:
    """CIDEr of greedy texts on the first `limit` dev photos."""
    net = new_target(work, tier)
    net.load_state_dict(weights)
    return {"cider": cider(work, "dev", write(net, work.array("maps-dev")[:limit]))}


@torch.inference_mode()
def write(net: Target, maps: np.ndarray) -> list[list[int]]:
    """Greedy texts of many photos in bfloat16, one token at a time: fast, for evaluation only."""
    out: list[list[int]] = []
    for at in range(0, len(maps), 250):
        rows = maps_of(maps, slice(at, at + 250))
        with torch.autocast("cpu", torch.bfloat16):
            memory = net.decoder.encode_image(net.features(rows))
            cache = net.decoder.new_cache(len(rows), 1)
            token = torch.full((len(rows), 1), BOS)
            columns = []
            for t in range(net.decoder.shape.max_tokens):
                logits = net.decoder.step(token, torch.full((len(rows),), t), memory, cache)
                token = logits.argmax(-1)
                columns.append(token)
        tokens = torch.cat(columns, 1).tolist()
        out += [row[: row.index(EOS)] if EOS in row else row for row in tokens]
    return out
