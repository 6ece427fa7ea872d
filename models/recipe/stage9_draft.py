"""The board's draft decoder, distilled from the cloud's own texts, so that what it proposes gets accepted.

Its inputs are the int8 head's symbols, as on the board.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from edge_runtime.inference.bundle import BOS, EOS, PAD
from models.family import DraftDecoder
from models.recipe import stage6_targets as targets
from models.recipe.scores import cider
from models.recipe.stage3_bottleneck import caption_loss
from models.recipe.workspace import Average, Workspace, steps

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
    parts = ("train", "classes")
    symbols = [work.array(f"symbols-{part}") for part in parts]
    texts = np.concatenate([np.load(work / f"texts-{part}.npy") for part in parts])
    border = len(symbols[0])
    net = DraftDecoder(work.vocabulary)
    optimiser = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    average = Average(net, 0.998)
    first = work.load(NAME, net=net, optimiser=optimiser, average=average)
    losses, started = [], time.monotonic()
    for step in steps("draft", first, settings.steps):
        optimiser.param_groups[0]["lr"] = settings.learning_rate * targets.rate_at(step, settings.steps)
        chosen = np.sort(rng.integers(0, len(texts), BATCH))
        rows = torch.from_numpy(texts[chosen].astype(np.int64))
        rows = rows[:, : int((rows != PAD).sum(1).max())]
        split = np.searchsorted(chosen, border)
        inputs = torch.cat(
            [targets.symbols_of(symbols[0], chosen[:split]), targets.symbols_of(symbols[1], chosen[split:] - border)]
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(rows[:, :-1], net.look(inputs), settings.dropout)
        loss = caption_loss(logits, rows[:, 1:], smoothing=0.02)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        average.update(net, step)
        losses.append(loss.item())
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == settings.steps:
            work.save(NAME, step + 1, net=net, optimiser=optimiser, average=average)
            quality = evaluate(work, average.weights, 300 if step + 1 < settings.steps else None)
            minutes = round((time.monotonic() - started) / 60, 1)
            print(
                "draft",
                step + 1,
                {"loss": round(float(np.mean(losses[-CHECKPOINT_EVERY:])), 4), **quality, "minutes": minutes},
                flush=True,
            )
    work.finish(NAME, quality)


@torch.inference_mode()
def evaluate(work: Workspace, weights: dict[str, torch.Tensor], limit: int | None = None) -> dict[str, float]:
    """CIDEr of the draft alone, and how much of the cloud's text it gets right before its first mistake."""
    net = DraftDecoder(weights["tokens.weight"].shape[0])
    net.load_state_dict(weights, strict=False)
    truth = np.load(work / "texts-dev.npy")[:limit]
    count = len(truth)
    memory = net.look(targets.symbols_of(work.array("symbols-dev"), slice(limit)))
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
