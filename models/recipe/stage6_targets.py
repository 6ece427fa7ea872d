"""The targets: tail, classifier and one text decoder a tier, trained on the symbols of the deployed head.

The cloud's decoder trains together with the tail that both share; the edge's smaller one then trains on the frozen
tail, so that one pass of the tail serves both. Captions first by cross-entropy, then by self-critical sequence
training (stage 7).
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.family import BOS, EOS, Classifier, DecoderShape, Dropout, Tail, TextDecoder
from models.recipe.depthwise import use_matrices
from models.recipe.scores import cider
from models.recipe.stage3_bottleneck import caption_loss
from models.recipe.workspace import Average, Workspace, channels_last, steps

NAME = "6-targets"
PHOTOS = 64
CLASS_PHOTOS = 16
CHECKPOINT_EVERY = 300


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes and lengths of training."""

    cloud_steps: int = 3000
    edge_steps: int = 1500
    learning_rate: float = 6e-4
    tail_rate: float = 0.3  # of the learning rate
    dropout: float = 0.2


def shapes(vocabulary: int) -> dict[str, DecoderShape]:
    """The decoders of both tiers."""
    return {
        "cloud": DecoderShape(vocabulary, width=256, heads=4, encoder_layers=1, decoder_layers=3),
        "edge": DecoderShape(vocabulary, width=160, heads=4, encoder_layers=0, decoder_layers=1),
    }


class Target(nn.Module):
    """A tail with a classifier and one decoder."""

    def __init__(self, shape: DecoderShape, classes: int) -> None:
        super().__init__()
        self.tail, self.classifier, self.decoder = Tail(), Classifier(classes), TextDecoder(shape)


def batch_of(symbols: np.ndarray, chosen: np.ndarray) -> Tensor:
    """Rows of a symbols array as float [B, 64, 7, 7]."""
    return torch.from_numpy(symbols[chosen].astype(np.float32)).contiguous(memory_format=torch.channels_last)


def rate_at(step: int, total: int, warm_up: int = 200) -> float:
    """Linear warm-up, then a cosine to nothing."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / total))


def run(work: Workspace, settings: Settings) -> None:
    """Writes 6-targets-cloud.pt and 6-targets-edge.pt."""
    figures: dict[str, float] = {}
    torch.manual_seed(6)
    for tier, total in (("cloud", settings.cloud_steps), ("edge", settings.edge_steps)):
        net = new_target(work, tier)
        if tier == "edge":
            cloud = torch.load(work / f"{NAME}-cloud.pt", map_location="cpu", weights_only=True)["average"]
            net.load_state_dict({k: v for k, v in cloud.items() if not k.startswith("decoder.")}, strict=False)
        figures |= _train(work, tier, net, total, settings)
    work.finish(NAME, figures)


def new_target(work: Workspace, tier: str) -> Target:
    """A target whose tail comes from the bottleneck's training and whose decoder is new."""
    vocabulary = len((work / "vocabulary.txt").read_text().split())
    classes = max(1, len((work / "classes.txt").read_text().split()))
    net = Target(shapes(vocabulary)[tier], classes)
    cut = torch.load(work / "3-bottleneck.pt", map_location="cpu", weights_only=True)["average"]
    net.tail.load_state_dict({k.removeprefix("tail."): v for k, v in cut.items() if k.startswith("tail.")})
    return channels_last(net)


def _train(work: Workspace, tier: str, net: Target, total: int, settings: Settings) -> dict[str, float]:
    rng = np.random.default_rng(6)
    symbols, captions = work.array("symbols-train"), np.load(work / "captions-train.npy")
    class_symbols, labels = work.array("symbols-classes"), np.load(work / "labels-classes.npy")
    trains_tail = tier == "cloud"
    use_matrices(net.tail.blocks, 14)
    for p in (*net.tail.parameters(), *net.classifier.parameters()):
        p.requires_grad_(trains_tail)
    rates = [settings.learning_rate, settings.learning_rate * settings.tail_rate]
    groups = [
        {"params": list(net.decoder.parameters()) + list(net.classifier.parameters())},
        {"params": list(net.tail.parameters())},
    ]
    optimiser = torch.optim.AdamW(groups, lr=rates[0], weight_decay=0.02, betas=(0.9, 0.98))
    average = Average(net, 0.999)
    name = f"{NAME}-{tier}"
    first = work.load(name, net=net, optimiser=optimiser, average=average)
    drop, losses, started = Dropout(settings.dropout), [], time.monotonic()
    for step in steps(tier, first, total):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * rate_at(step, total)
        chosen = np.sort(rng.integers(0, len(symbols), PHOTOS))
        texts = torch.from_numpy(captions[chosen % len(captions)].astype(np.int64)).flatten(0, 1)  # [B * 5, T]
        also = rng.integers(0, len(class_symbols), CLASS_PHOTOS)
        inputs = torch.cat([batch_of(symbols, chosen), batch_of(class_symbols, np.sort(also))])
        with torch.autocast("cpu", torch.bfloat16):
            features = net.tail(inputs)
            label_loss = F.cross_entropy(
                net.classifier(drop(features[PHOTOS:])).float(), torch.from_numpy(labels[np.sort(also) % len(labels)])
            )
            memory = net.decoder.look(features[:PHOTOS], drop)
            each = captions.shape[1]
            memory = [(k.repeat_interleave(each, 0), v.repeat_interleave(each, 0)) for k, v in memory]
            longest = int((texts != 0).sum(1).max())
            loss = caption_loss(net.decoder(texts[:, : longest - 1], memory, drop), texts[:, 1:longest])
        optimiser.zero_grad(set_to_none=True)
        (loss + 0.3 * label_loss if trains_tail else loss).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], 1.0)
        optimiser.step()
        average.update(net, step)
        losses.append((loss.item(), label_loss.item()))
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == total:
            work.save(name, step + 1, net=net, optimiser=optimiser, average=average)
            quality = evaluate(work, average.weights, tier, 300 if step + 1 < total else 1000)
            report = {
                "loss": np.mean(losses[-CHECKPOINT_EVERY:], 0).round(4).tolist(),
                **quality,
                "minutes": round((time.monotonic() - started) / 60, 1),
            }
            print(tier, step + 1, report, flush=True)
    return {f"{tier}_{k}": v for k, v in quality.items()}


def evaluate(work: Workspace, weights: dict[str, Tensor], tier: str, limit: int) -> dict[str, float]:
    """CIDEr of greedy texts on `limit` dev photos."""
    net = new_target(work, tier)
    net.load_state_dict(weights)
    net.eval()
    texts = write(net, work.array("symbols-dev")[:limit])
    return {"cider": cider(work, "dev", texts)}


@torch.inference_mode()
def write(net: Target, symbols: np.ndarray) -> list[list[int]]:
    """Greedy texts of many photos, quickly: bfloat16, one column at a time; for choosing, not for shipping."""
    out: list[list[int]] = []
    for at in range(0, len(symbols), 250):
        rows = batch_of(symbols, np.arange(at, min(at + 250, len(symbols))))
        with torch.autocast("cpu", torch.bfloat16):
            memory = net.decoder.look(net.tail(rows))
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
