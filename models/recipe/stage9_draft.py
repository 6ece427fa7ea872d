"""The board's draft decoder. It is distilled from the cloud's own texts, so that its proposals are accepted. Then it is
also trained on its own score, since its texts must be good without a server, too.

Its inputs are the int8 head's symbols of the finest level, as on the board: it drafts from that, whatever it sends.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from edge_runtime.inference.bundle import BOS, EOS, PAD, UNKNOWN
from models.family import DraftDecoder
from models.recipe import stage5_symbols
from models.recipe import stage7_critic as critic
from models.recipe.precision import autocast
from models.recipe.scores import Cider, cider, references
from models.recipe.stage1_photos import MAX_TOKENS
from models.recipe.stage3_bottleneck import GAINS, caption_loss
from models.recipe.stage6_targets import sampling_chances
from models.recipe.training import Training
from models.recipe.workspace import Workspace

NAME, CRITIC = "9-draft", "9-draft-critic"
BATCH, PHOTOS = 256, 64  # per step of imitation, and of self-critical training
SMOOTHING = 0.02
DRAFT_WORDS = 3500  # the most frequent of the vocabulary: with more it would have over a million parameters
CHECKPOINT_EVERY = 150


@dataclass(frozen=True, slots=True)
class Settings:
    """Lengths of training, rates and the weight of imitation beside the score."""

    steps: int = 1500
    critic_steps: int = 500
    learning_rate: float = 2e-3
    critic_learning_rate: float = 5e-4
    dropout: float = 0.1
    imitation_weight: float = 0.5


def run(work: Workspace, settings: Settings) -> None:
    """Writes 9-draft.pt."""
    torch.manual_seed(9)
    rng = np.random.default_rng(9)
    parts = [(imitated(work, part), work.array(f"codes-{part}")) for part in ("train", "unlabelled")]
    texts = np.concatenate([its for its, _ in parts])
    codes = np.concatenate([codes[: len(its)] for its, codes in parts])
    net = DraftDecoder(min(work.vocabulary, DRAFT_WORDS))
    optimiser = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    quality = partial(evaluate, work)
    training = Training(work, NAME, net, optimiser, settings.steps, CHECKPOINT_EVERY, evaluate=quality)
    for _ in training.steps():
        chosen = np.sort(rng.integers(0, len(texts), BATCH))
        with autocast():
            memory = net.encode_image(finest(work, codes[chosen]))
            loss = imitation_loss(net, texts[chosen], memory, settings.dropout)
        training.update(loss)
    training.finish()


def run_critic(work: Workspace, settings: Settings) -> None:
    """Writes 9-draft-critic.pt: self-critical training as in stage 7, on captioned photos."""
    torch.manual_seed(9)
    rng = np.random.default_rng((9, 2))
    net = DraftDecoder(min(work.vocabulary, DRAFT_WORDS))
    net.load_state_dict(work.averaged(NAME))
    total, quality = settings.critic_steps, partial(evaluate, work)
    training = critic.training_of(work, CRITIC, net, net, total, settings.critic_learning_rate, quality)
    captions, texts, codes = np.load(work / "captions-train.npy"), imitated(work, "train"), work.array("codes-train")
    chances = sampling_chances(np.load(work / "collections-train.npy"))
    scorer = Cider(references(captions), end=True)
    for _ in training.steps():
        photos = np.sort(rng.choice(len(captions), PHOTOS, p=chances))
        chosen = photos + len(captions) * rng.integers(0, len(texts) // len(captions), PHOTOS)
        with autocast():
            memory = net.encode_image(finest(work, codes[chosen]))
            each = memory.repeat_interleave(critic.SAMPLES, 0)
            samples = sample(net, each.detach())
            advantages, reward = critic.judge(scorer, photos, samples)
            logits = net(samples[:, :-1], each)[samples[:, 1:] != PAD]
            plain = imitation_loss(net, texts[chosen], memory, settings.dropout)
        loss = critic.policy_loss(logits.float(), samples, advantages)
        training.update(loss + settings.imitation_weight * plain, reward=reward)
    training.finish()


def imitated(work: Workspace, part: str) -> np.ndarray:
    """The cloud's texts about the first views of a part, int16 [N, T + 1], with the words that the draft knows."""
    texts: np.ndarray = np.load(work / f"texts-{part}.npy")
    texts[texts >= DRAFT_WORDS] = UNKNOWN
    return texts


def imitation_loss(net: DraftDecoder, texts: np.ndarray, memory: Tensor, dropout: float) -> Tensor:
    """Mean cross-entropy per token of texts int16 [B, T + 1]."""
    rows = torch.from_numpy(texts[:, : int((texts != PAD).sum(1).max())].astype(np.int64))
    return caption_loss(net(rows[:, :-1], memory, dropout), rows[:, 1:], SMOOTHING)


@torch.no_grad()
def sample(net: DraftDecoder, memory: Tensor) -> Tensor:
    """A random text for each row of the memory [B, N, 128]: int64 [B, 1 + T], BOS first, PAD after EOS."""
    texts = torch.full((len(memory), 1 + MAX_TOKENS), PAD)
    texts[:, 0] = BOS
    state = net.new_state(len(memory))
    for t in range(MAX_TOKENS):
        logits, state = net.step(texts[:, t], state, memory)
        unfinished = (texts[:, : t + 1] != EOS).all(1)
        if not unfinished.any():
            break
        texts[unfinished, t + 1] = critic.chosen_tokens(logits[unfinished])
    return texts[:, : int((texts != PAD).sum(1).max())]


def finest(work: Workspace, codes: np.ndarray) -> Tensor:
    """Codes to symbols of the finest level, float [B, 64, 7, 7]."""
    return torch.from_numpy(stage5_symbols.symbols(work, codes, len(GAINS) - 1).astype(np.float32))


@torch.inference_mode()
def evaluate(work: Workspace, weights: dict[str, Tensor], limit: int | None = None) -> dict[str, float]:
    """CIDEr of the draft alone, and how much of the cloud's text it predicts before its first mistake."""
    net = DraftDecoder(weights["tokens.weight"].shape[0])
    net.load_state_dict(weights, strict=False)
    codes, truth = work.array("codes-dev"), np.load(work / "texts-dev.npy")
    rows = np.full((len(truth), truth.shape[1] - 1), PAD, np.int64)

    def write(photos: np.ndarray) -> list[list[int]]:
        memory = net.encode_image(finest(work, codes[photos]))
        state, token, columns = net.new_state(len(photos)), torch.full((len(photos),), BOS), []
        for _ in range(rows.shape[1]):
            logits, state = net.step(token, state, memory)
            token = logits.argmax(-1)
            columns.append(token)
        rows[photos] = torch.stack(columns, 1).numpy()
        return [row[: row.index(EOS)] if EOS in row else row for row in rows[photos].tolist()]

    figures = cider(work, "dev", write, limit)
    seen = rows[:, 0] != PAD
    right = (rows[seen] == truth[seen, 1:]).cumprod(1).sum(1)
    lengths = (truth[seen, 1:] != PAD).sum(1)
    accepted = np.minimum(right, lengths)
    return figures | {
        "accepted": float(accepted.mean()),
        "accepted_share": float(accepted.sum() / lengths.sum()),
        "whole": float((accepted == lengths).mean()),
    }
