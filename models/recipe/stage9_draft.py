"""The board's draft decoder, distilled from the cloud's own texts, so that its proposals are accepted.

Its inputs are the int8 head's symbols of the finest level, as on the board.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from edge_runtime.inference.bundle import BOS, EOS, PAD, UNKNOWN
from models.family import DraftDecoder
from models.recipe import stage5_symbols
from models.recipe.precision import autocast
from models.recipe.scores import cider
from models.recipe.stage3_bottleneck import GAINS, caption_loss
from models.recipe.training import Training
from models.recipe.workspace import Workspace

NAME = "9-draft"
BATCH = 256
DRAFT_WORDS = 3500  # the most frequent of the vocabulary: with more it would have over a million parameters
CHECKPOINT_EVERY = 150


@dataclass(frozen=True, slots=True)
class Settings:
    """Length of training."""

    steps: int = 1500
    learning_rate: float = 2e-3
    dropout: float = 0.1


def run(work: Workspace, settings: Settings) -> None:
    """Writes 9-draft.pt."""
    torch.manual_seed(9)
    rng = np.random.default_rng(9)
    # A board drafts from the finest level, whatever it sends.
    parts = [(np.load(work / f"texts-{part}.npy"), work.array(f"codes-{part}")) for part in ("train", "unlabelled")]
    texts = np.concatenate([its for its, _ in parts])
    codes = np.concatenate([codes[: len(its)] for its, codes in parts])
    texts[texts >= DRAFT_WORDS] = UNKNOWN
    net = DraftDecoder(min(work.vocabulary, DRAFT_WORDS))
    optimiser = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    quality = partial(evaluate, work)
    training = Training(work, NAME, net, optimiser, settings.steps, CHECKPOINT_EVERY, evaluate=quality)
    for _ in training.steps():
        chosen = np.sort(rng.integers(0, len(texts), BATCH))
        rows = torch.from_numpy(texts[chosen].astype(np.int64))
        rows = rows[:, : int((rows != PAD).sum(1).max())]
        with autocast():
            memory = net.encode_image(finest(work, codes[chosen]))
            logits = net(rows[:, :-1], memory, settings.dropout)
        loss = caption_loss(logits, rows[:, 1:], smoothing=0.02)
        training.update(loss)
    training.finish()


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
