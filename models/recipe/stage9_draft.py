"""The board's draft decoder, distilled from the cloud's own texts, so that its proposals are accepted.

Its inputs are the int8 head's symbols, as on the board.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from edge_runtime.inference.bundle import BOS, EOS, PAD
from models.family import DraftDecoder
from models.recipe import stage6_targets as targets
from models.recipe.scores import cider
from models.recipe.stage3_bottleneck import caption_loss
from models.recipe.training import Training
from models.recipe.workspace import Workspace

NAME = "9-draft"
BATCH = 256
CHECKPOINT_EVERY = 150


@dataclass(frozen=True, slots=True)
class Settings:
    """Length of training."""

    steps: int = 2400
    learning_rate: float = 2e-3
    dropout: float = 0.1


def run(work: Workspace, settings: Settings) -> None:
    """Writes 9-draft.pt."""
    torch.manual_seed(9)
    rng = np.random.default_rng(9)
    symbols, texts = (
        np.concatenate([work.array(f"{kind}-{part}") for part in ("train", "classes")]) for kind in ("symbols", "texts")
    )
    net = DraftDecoder(work.vocabulary)
    optimiser = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    quality = partial(evaluate, work)
    training = Training(work, NAME, net, optimiser, settings.steps, CHECKPOINT_EVERY, evaluate=quality)
    for _ in training.steps():
        chosen = np.sort(rng.integers(0, len(texts), BATCH))
        rows = torch.from_numpy(texts[chosen].astype(np.int64))
        rows = rows[:, : int((rows != PAD).sum(1).max())]
        with torch.autocast("cpu", torch.bfloat16):
            memory = net.encode_image(targets.symbols_of(symbols, chosen))
            logits = net(rows[:, :-1], memory, settings.dropout)
        loss = caption_loss(logits, rows[:, 1:], smoothing=0.02)
        training.update(loss)
    training.finish()


@torch.inference_mode()
def evaluate(work: Workspace, weights: dict[str, Tensor], limit: int | None = None) -> dict[str, float]:
    """CIDEr of the draft alone, and how much of the cloud's text it predicts before its first mistake."""
    net = DraftDecoder(weights["tokens.weight"].shape[0])
    net.load_state_dict(weights, strict=False)
    truth = np.load(work / "texts-dev.npy")[:limit]
    count = len(truth)
    memory = net.encode_image(targets.symbols_of(work.array("symbols-dev"), slice(limit)))
    state, token, columns = net.new_state(count), torch.full((count,), BOS), []
    for _ in range(truth.shape[1] - 1):
        logits, state = net.step(token, state, memory)
        token = logits.argmax(-1)
        columns.append(token)
    rows = torch.stack(columns, 1).numpy()
    right = (rows == truth[:, 1:]).cumprod(1).sum(1)
    lengths = (truth[:, 1:] != PAD).sum(1)
    texts = [row[: row.index(EOS)] if EOS in row else row for row in rows.tolist()]
    accepted = np.minimum(right, lengths)
    return {
        "cider": cider(work, "dev", texts),
        "accepted": float(accepted.mean()),
        "accepted_share": float(accepted.sum() / lengths.sum()),
        "whole": float((accepted == lengths).mean()),
    }
