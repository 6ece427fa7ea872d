"""Self-critical sequence training of the targets' decoders: the reward is the score itself.

Rennie et al., arXiv 1612.00563. Cross-entropy trains the next word of a text; this trains whole texts. Several texts
are sampled per photo. Each one's reward is its CIDEr-D against the photo's captions, and its baseline is the mean of
the others (Luo, arXiv 2003.09971). The end token is part of every text and its reward; otherwise the decoder learns to
end too early. Some cross-entropy stays in the loss: for the cloud on people's captions, which keeps it fluent, for the
edge on the cloud's texts, which keeps it close to what the cloud will write.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from edge_runtime.inference.bundle import BOS, EOS, PAD
from models.family import Cache, Dropout, Memory, TextDecoder
from models.labels import some_words
from models.recipe import stage6_targets as targets
from models.recipe.precision import autocast
from models.recipe.scores import Cider, references
from models.recipe.stage3_bottleneck import select_memory, some_captions
from models.recipe.training import Evaluate, Training, cosine
from models.recipe.workspace import Workspace

NAME = "7-critic"
PHOTOS, SAMPLES = 32, 5
# Label smoothing leaves a little chance for each of thousands of wrong words: at a temperature of 1 most texts would
# have one, and their rewards would say nothing else.
TEMPERATURE = 0.7
CHECKPOINT_EVERY = 100


@dataclass(frozen=True, slots=True)
class Settings:
    """Length of training, learning rates and weights of the cross-entropy."""

    cloud_steps: int = 1000
    edge_steps: int = 400
    cloud_learning_rate: float = 1.5e-4
    edge_learning_rate: float = 3e-4
    caption_weight: float = 0.2
    imitation_weight: float = 0.5


def run(work: Workspace, settings: Settings, tier: str) -> None:
    """Writes 7-critic-<tier>.pt."""
    rng = np.random.default_rng(7)
    torch.manual_seed(7)
    is_cloud = tier == "cloud"
    net = targets.new_target(work, tier)
    net.load_state_dict(work.averaged(f"{targets.NAME}-{tier}"))
    training = training_of(
        work,
        f"{NAME}-{tier}",
        net.decoder,
        net,
        settings.cloud_steps if is_cloud else settings.edge_steps,
        settings.cloud_learning_rate if is_cloud else settings.edge_learning_rate,
        partial(targets.evaluate, work, tier),
    )
    maps, labels = work.array("maps-train"), np.load(work / "labels-train.npy")
    captions = np.load(work / "captions-train.npy")
    imitated = None if is_cloud else np.load(work / "texts-train.npy")
    views = len(maps if imitated is None else imitated) // len(captions)
    chances = targets.sampling_chances(np.load(work / "collections-train.npy"))
    scorer = Cider(references(captions), end=True)
    for _ in training.steps():
        photos = np.sort(rng.choice(len(captions), PHOTOS, p=chances))
        chosen = photos + len(captions) * rng.integers(0, views, PHOTOS)
        words = some_words(labels[chosen], rng)
        with torch.no_grad(), autocast():
            features = net.features(targets.maps_of(maps, chosen))
            memory = select_memory(net.decoder.encode_image(features, words), each_of(PHOTOS))
            texts = sample(net.decoder, memory)
        advantages, reward = judge(scorer, photos, texts)
        if imitated is None:
            known, of_photo = some_captions(captions[photos], 1, rng)
            weight, smoothing = settings.caption_weight, 0.1
        else:
            known, of_photo = torch.from_numpy(imitated[chosen].astype(np.int64)), torch.arange(PHOTOS)
            weight, smoothing = settings.imitation_weight, 0.02
        with autocast():
            memory = net.decoder.encode_image(features, words)
            written = texts[:, 1:] != PAD
            logits = net.decoder(texts[:, :-1], select_memory(memory, each_of(PHOTOS)), Dropout(), written)
            plain = targets.text_loss(net.decoder, known, select_memory(memory, of_photo), Dropout(0.1), smoothing)
        loss = policy_loss(logits.float() + net.decoder.never_emitted, texts, advantages)
        training.update(loss + weight * plain, reward=reward)
    training.finish()


def training_of(
    work: Workspace,
    name: str,
    decoder: torch.nn.Module,
    net: torch.nn.Module,
    total: int,
    learning_rate: float,
    evaluate: Evaluate,
) -> Training:
    """Trains the decoder only, of which `net` may have more, in small steps: rewards are noisy."""
    weights = list(decoder.parameters())
    return Training(
        work,
        name,
        net,
        torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
        total,
        CHECKPOINT_EVERY,
        decay=0.99,
        rate=lambda peak, step: peak * cosine(step, total, warm_up=50),
        clip=0.5,
        clipped=weights,
        evaluate=evaluate,
    )


def each_of(photos: int) -> Tensor:
    """The photo of each sample, int64 [photos * SAMPLES]."""
    return torch.arange(photos).repeat_interleave(SAMPLES)


def chosen_tokens(logits: Tensor) -> Tensor:
    """A random next token for each row of logits [B, V], int64 [B]. Much faster than torch.multinomial."""
    sums = (logits.float() / TEMPERATURE).softmax(-1).cumsum(-1)
    # Above 0, so that no token is chosen whose probability is 0; at most the last sum, which need not be 1.
    places = (1.0 - torch.rand(len(sums), 1)) * sums[:, -1:]
    return torch.searchsorted(sums, places)[:, 0]


def sample(decoder: TextDecoder, memory: Memory) -> Tensor:
    """A random text for each row of the memory: int64 [B, 1 + T], BOS first, PAD after EOS."""
    rows = torch.arange(len(memory[0][0]))
    cache = decoder.new_cache(len(rows), 1)
    texts = torch.full((len(rows), 1 + decoder.shape.max_tokens), PAD)
    texts[:, 0] = BOS
    for t in range(decoder.shape.max_tokens):
        logits = decoder.step(texts[rows, t, None], torch.full((len(rows),), t), memory, cache)[:, 0]
        texts[rows, t + 1] = chosen_tokens(logits)
        unfinished = (texts[rows, t + 1] != EOS).nonzero()[:, 0]
        if not len(unfinished):
            break
        if len(unfinished) < len(rows):
            rows, memory = rows[unfinished], select_memory(memory, unfinished)
            kept = select_memory(list(zip(cache.keys, cache.values, strict=True)), unfinished)
            cache = Cache([keys for keys, _ in kept], [values for _, values in kept])
    return texts[:, : t + 2]


def judge(scorer: Cider, photos: np.ndarray, texts: Tensor) -> tuple[Tensor, float]:
    """How much better each of a photo's sampled texts is than the mean of the others, float [texts], and the mean
    reward of all.
    """
    rows = [cut(row) for row in texts[:, 1:].tolist()]
    rewards = np.array([scorer.score(photos[i // SAMPLES], row) for i, row in enumerate(rows)]).reshape(-1, SAMPLES)
    advantages = (rewards - rewards.mean(1, keepdims=True)) * SAMPLES / (SAMPLES - 1)
    return torch.from_numpy(advantages.reshape(-1)).float(), float(rewards.mean())


def policy_loss(logits: Tensor, texts: Tensor, advantages: Tensor) -> Tensor:
    """logits float [N, V] of the N tokens of texts [B, 1 + T]. Per token and not per text, so that long texts do not
    weigh more.
    """
    written = texts[:, 1:] != PAD
    of_tokens = (logits / TEMPERATURE).log_softmax(-1).gather(-1, texts[:, 1:][written][:, None])[:, 0]
    return -(of_tokens * advantages.repeat_interleave(written.sum(1))).mean()


def cut(row: list[int]) -> list[int]:
    """The words of a sampled row. A text without an end gets a token that no reference has, so that it scores less."""
    return row[: row.index(EOS)] if EOS in row else [*row, PAD]


def final_weights(work: Workspace, tier: str) -> dict[str, Tensor]:
    """The weights of a tier's target that ship."""
    return work.averaged(f"{NAME}-{tier}")
