"""Self-critical sequence training of the cloud's decoder: reward what the score rewards.

Rennie et al., arXiv 1612.00563. Cross-entropy teaches the next word of a person's text; this teaches whole texts.
Several texts are sampled a photo, each is rewarded by its CIDEr-D against that photo's captions, and the mean of the
others is its baseline (Luo, arXiv 2003.09971). The end token is part of every text and of its reward:
without it, texts are cut off.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edge_runtime.inference.bundle import BOS, EOS, PAD
from models.family import NEVER_EMITTED, Dropout
from models.recipe import stage6_targets as targets
from models.recipe.scores import Cider, strip
from models.recipe.stage3_bottleneck import caption_loss, repeat_memory
from models.recipe.workspace import Average, Workspace, steps

NAME = "7-critic"
PHOTOS, SAMPLES = 32, 5
CHECKPOINT_EVERY = 200


@dataclass(frozen=True, slots=True)
class Settings:
    """Length and strength."""

    steps: int = 500
    learning_rate: float = 1e-4
    caption_weight: float = 0.1  # of the cross-entropy that keeps texts plain


def run(work: Workspace, settings: Settings) -> None:
    """Writes 7-critic.pt."""
    rng = np.random.default_rng(7)
    torch.manual_seed(7)
    net = targets.new_target(work, "cloud")
    net.load_state_dict(torch.load(work / f"{targets.NAME}-cloud.pt", map_location="cpu", weights_only=True)["average"])
    for p in (*net.tail.parameters(), *net.classifier.parameters()):
        p.requires_grad_(False)
    weights = list(net.decoder.parameters())
    optimiser = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    average = Average(net, 0.99)
    first = work.load(NAME, net=net, optimiser=optimiser, average=average)
    maps, captions = work.array("maps-train"), np.load(work / "captions-train.npy")
    scorer = Cider([[strip(row) for row in texts] for texts in captions.tolist()], end=True)
    rewards_seen, started = [], time.monotonic()
    for step in steps("critic", first, settings.steps):
        optimiser.param_groups[0]["lr"] = settings.learning_rate * targets.rate_at(step, settings.steps, 50)
        chosen = np.sort(rng.integers(0, len(maps), PHOTOS))
        photos = chosen % len(captions)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = net.features(targets.maps_of(maps, chosen))
            texts = sample(net, features)
        lists = [cut(row) for row in texts[:, 1:].tolist()]
        rewards = np.array([scorer.score(photos[i // SAMPLES], text) for i, text in enumerate(lists)]).reshape(
            PHOTOS, SAMPLES
        )
        advantage = (rewards - rewards.mean(1, keepdims=True)) * SAMPLES / (SAMPLES - 1)
        human = torch.from_numpy(captions[photos, rng.integers(0, captions.shape[1], PHOTOS)].astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            memory = net.decoder.encode_image(features)
            each = repeat_memory(memory, SAMPLES)
            logits = net.decoder(texts[:, :-1], each).float()
            plain = caption_loss(net.decoder(human[:, :-1], memory, Dropout(0.1)), human[:, 1:])
        logits[..., list(NEVER_EMITTED)] = -torch.inf
        chances = logits.log_softmax(-1).gather(-1, texts[:, 1:, None])[..., 0]
        written = texts[:, 1:] != PAD
        chances = chances.masked_fill(~written, 0.0)
        # Per token rather than per text: long texts do not weigh more.
        policy = -(chances.sum(1) * torch.from_numpy(advantage.reshape(-1)).float()).sum() / written.sum()
        optimiser.zero_grad(set_to_none=True)
        (policy + settings.caption_weight * plain).backward()
        nn.utils.clip_grad_norm_(weights, 0.5)
        optimiser.step()
        average.update(net, step)
        rewards_seen.append(rewards.mean())
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == settings.steps:
            work.save(NAME, step + 1, net=net, optimiser=optimiser, average=average)
            quality = targets.evaluate(work, average.weights, "cloud", 300 if step + 1 < settings.steps else None)
            minutes = (time.monotonic() - started) / 60
            print(
                NAME,
                step + 1,
                {"reward": np.mean(rewards_seen[-CHECKPOINT_EVERY:]).round(4), **quality, "minutes": round(minutes, 1)},
                flush=True,
            )
    work.finish(NAME, quality)


def sample(net: targets.Target, features: Tensor) -> Tensor:
    """SAMPLES texts a photo, by chance: int64 [B * SAMPLES, 1 + T], BOS first, PAD after EOS."""
    decoder = net.decoder
    memory = repeat_memory(decoder.encode_image(features), SAMPLES)
    rows = len(features) * SAMPLES
    cache, token = decoder.new_cache(rows, 1), torch.full((rows, 1), BOS)
    columns, ended = [token], torch.zeros(rows, dtype=torch.bool)
    for t in range(decoder.shape.max_tokens):
        logits = decoder.step(token, torch.full((rows,), t), memory, cache)[:, 0].float()
        token = torch.multinomial(logits.softmax(-1), 1)
        columns.append(token.masked_fill(ended[:, None], PAD))
        ended |= token[:, 0] == EOS
        if bool(ended.all()):
            break
    return torch.cat(columns, 1)


def cut(row: list[int]) -> list[int]:
    """A sampled row to its words. One that never ended keeps a mark that no reference has, so that it scores less."""
    return row[: row.index(EOS)] if EOS in row else [*row, PAD]


def final_weights(work: Workspace, tier: str) -> dict[str, Tensor]:
    """A tier's target as it ships: the edge imitates the cloud, a reward of its own would lead it away from it."""
    name = NAME if tier == "cloud" else f"{targets.NAME}-{tier}"
    weights: dict[str, Tensor] = torch.load(work / f"{name}.pt", map_location="cpu", weights_only=True)["average"]
    return weights
