"""The targets: classifier and one text decoder a tier, trained on the symbols of the deployed head.

The tail was trained with the bottleneck on rounded symbols and is kept as it is, so that its maps of all views are
computed once; what follows it trains on those. First the last convolution and the classifier together with the cloud's
decoder, on people's captions; later the edge's smaller decoder on the same features, on the cloud's own texts
(sequence-level distillation: Kim & Rush, arXiv 1606.07947). One pass of the tail thus serves every tier.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_runtime.inference.bundle import BOS, EOS, PAD
from models.backbone import MAP_CHANNELS
from models.family import LATENT, Classifier, DecoderShape, Dropout, Tail, TextDecoder, decoder_shapes
from models.recipe.scores import cider
from models.recipe.stage3_bottleneck import caption_loss, repeat_memory
from models.recipe.workspace import Average, Workspace, channels_last, steps

NAME = "6-targets"
TEXTS, CLASS_PHOTOS = 320, 16  # of a step
CHECKPOINT_EVERY = 300


@dataclass(frozen=True, slots=True)
class Settings:
    """Lengths of training and its strength."""

    cloud_steps: int = 1000
    edge_steps: int = 900
    learning_rate: float = 6e-4
    features_rate: float = 0.3  # of the learning rate, for the tail's last convolution, which is not new
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


def rate_at(step: int, total: int, warm_up: int = 100) -> float:
    """Linear warm-up, then a cosine to nothing."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / total))


def run(work: Workspace, settings: Settings, tier: str) -> None:
    """Writes 6-targets-<tier>.pt; the edge's needs the cloud's texts of stage 8."""
    torch.manual_seed(6)
    net = new_target(work, tier)
    if tier == "cloud":
        if not (work / "maps-dev.npy").is_file():
            cache_maps(work)
        train(work, tier, net, np.load(work / "captions-train.npy"), settings.cloud_steps, settings)
    else:
        cloud = torch.load(work / f"{NAME}-cloud.pt", map_location="cpu", weights_only=True)["average"]
        net.load_state_dict({k: v for k, v in cloud.items() if not k.startswith("decoder.")}, strict=False)
        train(work, tier, net, np.load(work / "texts-train.npy")[:, None], settings.edge_steps, settings)


def new_target(work: Workspace, tier: str) -> Target:
    """A target that begins where the bottleneck's training ended; the edge's decoder alone is new."""
    net = Target(decoder_shapes(work.vocabulary)[tier], work.classes)
    cut = torch.load(work / "3-bottleneck.pt", map_location="cpu", weights_only=True)["average"]
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
        for step in steps(f"maps of {part}", 0, -(-len(symbols) // batch)):
            rows = slice(step * batch, (step + 1) * batch)
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                last = tail.last_map(symbols_of(symbols, rows))
            maps[rows] = last.permute(0, 2, 3, 1).to(torch.float16).numpy()


def train(work: Workspace, tier: str, net: Target, captions: np.ndarray, total: int, settings: Settings) -> None:
    """Cross-entropy training of one tier; with the cloud, of the shared features and the classifier too.

    captions int16 [photos or views of them, texts, T].
    """
    rng = np.random.default_rng(6)
    maps, photos = work.array("maps-train"), TEXTS // captions.shape[1]
    class_maps, labels = work.array("maps-classes"), np.load(work / "labels-classes.npy")
    trains_features = tier == "cloud"
    shared = [*net.tail.features.parameters(), *net.classifier.parameters()] if trains_features else []
    groups = [{"params": list(net.decoder.parameters())}] + [{"params": shared}] * trains_features
    rates = [settings.learning_rate, settings.learning_rate * settings.features_rate][: len(groups)]
    optimiser = torch.optim.AdamW(groups, lr=rates[0], weight_decay=0.02, betas=(0.9, 0.98))
    average = Average(net, 0.998)
    name = f"{NAME}-{tier}"
    first = work.load(name, net=net, optimiser=optimiser, average=average)
    drop, losses, started = Dropout(settings.dropout), [], time.monotonic()
    quality: dict[str, float] = {}
    for step in steps(tier, first, total):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * rate_at(step, total)
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
        optimiser.zero_grad(set_to_none=True)
        (loss + 0.3 * label_loss if trains_features else loss).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in net.parameters() if p.grad is not None], 1.0)
        optimiser.step()
        average.update(net, step)
        losses.append((loss.item(), label_loss.item()))
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == total:
            work.save(name, step + 1, net=net, optimiser=optimiser, average=average)
            quality = evaluate(work, average.weights, tier, 300 if step + 1 < total else None)
            recent = np.mean(losses[-CHECKPOINT_EVERY:], 0).round(4).tolist()
            print(tier, step + 1, recent, quality, round((time.monotonic() - started) / 60, 1), "min", flush=True)
    work.finish(name, quality)


def evaluate(work: Workspace, weights: dict[str, Tensor], tier: str, limit: int | None = None) -> dict[str, float]:
    """CIDEr of greedy texts on the first `limit` dev photos."""
    net = new_target(work, tier)
    net.load_state_dict(weights)
    return {"cider": cider(work, "dev", write(net, work.array("maps-dev")[:limit]))}


@torch.inference_mode()
def write(net: Target, maps: np.ndarray) -> list[list[int]]:
    """Greedy texts of many photos, quickly: bfloat16, one column at a time; for choosing, not for shipping."""
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
