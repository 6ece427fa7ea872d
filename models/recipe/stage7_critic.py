"""Self-critical sequence training of the cloud's decoder: the reward is the score itself.

Rennie et al., arXiv 1612.00563. Cross-entropy trains the next word of a person's text; this trains whole texts. Several
texts are sampled per photo. Each one's reward is its CIDEr-D against the photo's captions, and its baseline is the mean
of the others (Luo, arXiv 2003.09971). The end token is part of every text and its reward; otherwise the decoder learns
to end too early.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from edge_runtime.inference.bundle import BOS, EOS, PAD
from models.family import Cache, Dropout
from models.labels import some_words
from models.recipe import stage6_targets as targets
from models.recipe.precision import autocast
from models.recipe.scores import Cider, references
from models.recipe.stage3_bottleneck import select_memory, some_captions
from models.recipe.training import Training, cosine
from models.recipe.workspace import Workspace

NAME = "7-critic"
PHOTOS, SAMPLES = 32, 5
# Label smoothing leaves a little chance for each of thousands of wrong words: at a temperature of 1 most texts would
# have one, and their rewards would say nothing else.
TEMPERATURE = 0.7
CHECKPOINT_EVERY = 200


@dataclass(frozen=True, slots=True)
class Settings:
    """Length of training, learning rate and weights."""

    steps: int = 1000
    learning_rate: float = 1.5e-4
    caption_weight: float = 0.2  # weight of the cross-entropy, which keeps the texts fluent


def run(work: Workspace, settings: Settings) -> None:
    """Writes 7-critic.pt."""
    rng = np.random.default_rng(7)
    torch.manual_seed(7)
    net = targets.new_target(work, "cloud")
    net.load_state_dict(work.averaged(f"{targets.NAME}-cloud"))
    weights = list(net.decoder.parameters())
    optimiser = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    training = Training(
        work,
        NAME,
        net,
        optimiser,
        settings.steps,
        CHECKPOINT_EVERY,
        decay=0.99,
        rate=lambda peak, step: peak * cosine(step, settings.steps, warm_up=50),
        clip=0.5,
        clipped=weights,
        evaluate=partial(targets.evaluate, work, "cloud"),
    )
    maps, labels = work.array("maps-train"), np.load(work / "labels-train.npy")
    captions = np.load(work / "captions-train.npy")
    chances, views = targets.sampling_chances(np.load(work / "collections-train.npy")), len(maps) // len(captions)
    scorer = Cider(references(captions), end=True)
    for _ in training.steps():
        photos = np.sort(rng.choice(len(captions), PHOTOS, p=chances))
        chosen = photos + len(captions) * rng.integers(0, views, PHOTOS)
        words = some_words(labels[chosen], rng)
        with torch.no_grad(), autocast():
            features = net.features(targets.maps_of(maps, chosen))
            texts = sample(net, features, words)
        lists = [cut(row) for row in texts[:, 1:].tolist()]
        rewards = np.array([scorer.score(photos[i // SAMPLES], text) for i, text in enumerate(lists)]).reshape(
            PHOTOS, SAMPLES
        )
        advantage = (rewards - rewards.mean(1, keepdims=True)) * SAMPLES / (SAMPLES - 1)
        human, of_photo = some_captions(captions[photos], 1, rng)
        with autocast():
            memory = net.decoder.encode_image(features, words)
            each = select_memory(memory, torch.arange(PHOTOS).repeat_interleave(SAMPLES))
            written = texts[:, 1:] != PAD
            logits = net.decoder(texts[:, :-1], each, Dropout(), written)  # half of a padded batch
            plain = targets.text_loss(net.decoder, human, select_memory(memory, of_photo), Dropout(0.1))
        chances_of = (logits.float() / TEMPERATURE + net.decoder.never_emitted).log_softmax(-1)
        of_tokens = chances_of.gather(-1, texts[:, 1:][written][:, None])[:, 0]
        advantages = torch.from_numpy(advantage.reshape(-1)).float().repeat_interleave(written.sum(1))
        # Per token and not per text, so that long texts do not weigh more.
        policy = -(of_tokens * advantages).mean()
        training.update(policy + settings.caption_weight * plain, reward=float(rewards.mean()))
    training.finish()


def sample(net: targets.Target, features: Tensor, words: Tensor) -> Tensor:
    """SAMPLES random texts per photo: int64 [B * SAMPLES, 1 + T], BOS first, PAD after EOS."""
    decoder = net.decoder
    of_photo = torch.arange(len(features)).repeat_interleave(SAMPLES)
    memory = select_memory(decoder.encode_image(features, words), of_photo)
    rows, cache = torch.arange(len(of_photo)), decoder.new_cache(len(of_photo), 1)
    texts = torch.full((len(rows), 1 + decoder.shape.max_tokens), PAD)
    texts[:, 0] = BOS
    for t in range(decoder.shape.max_tokens):
        logits = decoder.step(texts[rows, t, None], torch.full((len(rows),), t), memory, cache)[:, 0].float()
        texts[rows, t + 1] = torch.multinomial((logits / TEMPERATURE).softmax(-1), 1)[:, 0]
        unfinished = (texts[rows, t + 1] != EOS).nonzero()[:, 0]
        if not len(unfinished):
            break
        if len(unfinished) < len(rows):
            rows, memory = rows[unfinished], select_memory(memory, unfinished)
            kept = select_memory(list(zip(cache.keys, cache.values, strict=True)), unfinished)
            cache = Cache([keys for keys, _ in kept], [values for _, values in kept])
    return texts[:, : t + 2]


def cut(row: list[int]) -> list[int]:
    """The words of a sampled row. A text without an end gets a token that no reference has, so that it scores less."""
    return row[: row.index(EOS)] if EOS in row else [*row, PAD]


def final_weights(work: Workspace, tier: str) -> dict[str, Tensor]:
    """The weights of a tier's target that ship. The edge imitates the cloud and has no reward training of its own."""
    name = NAME if tier == "cloud" else f"{targets.NAME}-{tier}"
    return work.averaged(name)
