"""The board's draft decoder. It is distilled from the cloud's own texts, so that its proposals are accepted. Then it is
also trained on its own score, since its texts must be good without a server, too.

Its inputs are the int8 head's symbols of the finest level and the labels that the board has seen, as on the board: it
drafts from these, whatever it sends. In training a part of the rows has only the first labels or none, since a board
may do without the network that finds them.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from edge_runtime.inference.bundle import BOS, EOS, PAD, UNKNOWN
from edge_runtime.wire.labels import LABEL_BYTES
from models.family import DraftDecoder
from models.imagenet import imagenet_classes
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
DRAFT_WORDS = 3500  # the most frequent of the vocabulary: with more it would have over a million parameters for words
FEWER_LABELS = 0.4  # share of the rows that see only the first labels, or none
CHECKPOINT_EVERY = 150


@dataclass(frozen=True, slots=True)
class Settings:
    """Lengths of training, rates and the weight of imitation beside the score."""

    steps: int = 1500
    critic_steps: int = 1000
    learning_rate: float = 2e-3
    critic_learning_rate: float = 5e-4
    dropout: float = 0.1
    imitation_weight: float = 0.5


@dataclass(frozen=True, slots=True)
class Seen:
    """What a draft decoder sees of some views."""

    symbols: Tensor  # of the finest level, float [B, 64, 7, 7]
    classes: Tensor  # of the labels, int64 [B, K]
    probabilities: Tensor  # float [B, K]; 0: no label


def run(work: Workspace, settings: Settings) -> None:
    """Writes 9-draft.pt."""
    torch.manual_seed(9)
    rng = np.random.default_rng(9)
    parts = [
        (imitated(work, part), work.array(f"codes-{part}"), np.load(work / f"seen-{part}.npy"))
        for part in ("train", "unlabelled")
    ]
    texts = np.concatenate([its for its, _, _ in parts])
    codes = np.concatenate([codes[: len(its)] for its, codes, _ in parts])
    labels = np.concatenate([labels[: len(its)] for its, _, labels in parts])
    net = new_draft(work)
    optimiser = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    quality = partial(evaluate, work)
    training = Training(work, NAME, net, optimiser, settings.steps, CHECKPOINT_EVERY, evaluate=quality)
    for _ in training.steps():
        chosen = np.sort(rng.integers(0, len(texts), BATCH))
        views = views_of(work, codes[chosen], some_labels(labels[chosen], rng))
        with autocast():
            loss = imitation_loss(net, texts[chosen], *begin(net, views), settings.dropout)
        training.update(loss)
    training.finish()


def run_critic(work: Workspace, settings: Settings) -> None:
    """Writes 9-draft-critic.pt: self-critical training as in stage 7, on captioned photos."""
    torch.manual_seed(9)
    rng = np.random.default_rng((9, 2))
    net = new_draft(work)
    net.load_state_dict(work.averaged(NAME))
    total, quality = settings.critic_steps, partial(evaluate, work)
    training = critic.training_of(work, CRITIC, net, net, total, settings.critic_learning_rate, quality)
    captions, texts = np.load(work / "captions-train.npy"), imitated(work, "train")
    codes, labels = work.array("codes-train"), np.load(work / "seen-train.npy")
    chances = sampling_chances(np.load(work / "collections-train.npy"))
    scorer = Cider(references(captions), end=True)
    for _ in training.steps():
        photos = np.sort(rng.choice(len(captions), PHOTOS, p=chances))
        chosen = photos + len(captions) * rng.integers(0, len(texts) // len(captions), PHOTOS)
        views = views_of(work, codes[chosen], some_labels(labels[chosen], rng))
        with autocast():
            memory, state = begin(net, views)
            of_sample = critic.each_of(PHOTOS)
            each, states = memory[of_sample], state[of_sample]
            samples = sample(net, each.detach(), states.detach())
            advantages, reward = critic.judge(scorer, photos, samples)
            logits = net(samples[:, :-1], each, states, samples[:, 1:] != PAD)
            plain = imitation_loss(net, texts[chosen], memory, state, settings.dropout)
        loss = critic.policy_loss(logits.float(), samples, advantages)
        training.update(loss + settings.imitation_weight * plain, reward=reward)
    training.finish()


def new_draft(work: Workspace) -> DraftDecoder:
    """A draft decoder without training, for this vocabulary and the labels of ImageNet."""
    return DraftDecoder(min(work.vocabulary, DRAFT_WORDS), len(imagenet_classes()))


def imitated(work: Workspace, part: str) -> np.ndarray:
    """The cloud's texts about the first views of a part, int16 [N, T + 1], with the words that the draft knows."""
    texts: np.ndarray = np.load(work / f"texts-{part}.npy")
    texts[texts >= DRAFT_WORDS] = UNKNOWN
    return texts


def some_labels(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same rows of seen-* (stage 5), some of them with only their first k labels, k random."""
    most = labels.shape[1] // LABEL_BYTES
    kept = np.where(rng.random(len(labels)) < FEWER_LABELS, rng.integers(0, most + 1, len(labels)), most)
    return np.where(np.arange(labels.shape[1]) < LABEL_BYTES * kept[:, None], labels, 0).astype(np.uint8)


def views_of(work: Workspace, codes: np.ndarray, labels: np.ndarray) -> Seen:
    """Codes uint8 [B, 64, 7, 7] and rows of seen-* to what the decoder sees."""
    symbols = stage5_symbols.symbols(work, codes, len(GAINS) - 1).astype(np.float32)
    parts = torch.from_numpy(labels.reshape(len(labels), -1, LABEL_BYTES).astype(np.int64))
    return Seen(torch.from_numpy(symbols), 256 * parts[..., 0] + parts[..., 1], parts[..., 2] / 255)


def begin(net: DraftDecoder, views: Seen) -> tuple[Tensor, Tensor]:
    """The memory [B, N, 128] and the first state [B, 256]."""
    return net.encode_image(views.symbols), net.first_state(views.classes, views.probabilities)


def imitation_loss(net: DraftDecoder, texts: np.ndarray, memory: Tensor, state: Tensor, dropout: float) -> Tensor:
    """Mean cross-entropy per token of texts int16 [B, T + 1]."""
    rows = torch.from_numpy(texts[:, : int((texts != PAD).sum(1).max())].astype(np.int64))
    wanted = rows[:, 1:] != PAD  # half of a padded batch
    return caption_loss(net(rows[:, :-1], memory, state, wanted, dropout), rows[:, 1:][wanted], SMOOTHING)


@torch.no_grad()
def sample(net: DraftDecoder, memory: Tensor, state: Tensor) -> Tensor:
    """A random text for each row of the memory [B, N, 128] from its first state on: int64 [B, 1 + T], BOS first, PAD
    after EOS.
    """
    texts = torch.full((len(memory), 1 + MAX_TOKENS), PAD)
    texts[:, 0] = BOS
    for t in range(MAX_TOKENS):
        logits, state = net.step(texts[:, t], state, memory)
        unfinished = (texts[:, : t + 1] != EOS).all(1)
        if not unfinished.any():
            break
        texts[unfinished, t + 1] = critic.chosen_tokens(logits[unfinished])
    return texts[:, : int((texts != PAD).sum(1).max())]


@torch.inference_mode()
def evaluate(work: Workspace, weights: dict[str, Tensor], limit: int | None = None) -> dict[str, float]:
    """CIDEr of the draft alone, and how much of the cloud's text it predicts before its first mistake."""
    net = new_draft(work)
    net.load_state_dict(weights, strict=False)
    codes, labels, truth = work.array("codes-dev"), np.load(work / "seen-dev.npy"), np.load(work / "texts-dev.npy")
    rows = np.full((len(truth), truth.shape[1] - 1), PAD, np.int64)

    def write(photos: np.ndarray) -> list[list[int]]:
        memory, state = begin(net, views_of(work, codes[photos], labels[photos]))
        token, columns = torch.full((len(photos),), BOS), []
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
