"""Each target's lookahead: it learns the target's own words from the target's hidden states, over all training views.

The examples are the texts that the target writes by itself, and its hidden states while it reads them again.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from edge_runtime.inference.bundle import PAD
from models.lookahead import LookaheadNet, lookahead_file, tensors_of
from models.recipe import stage6_targets as targets
from models.recipe import stage7_critic as critic
from models.recipe.precision import autocast
from models.recipe.stage8_texts import written
from models.recipe.training import Training
from models.recipe.workspace import Workspace, blocks

NAME = "10-lookahead"
BATCH = 64  # texts
READ = 250  # texts per pass of the target
DISTANCE = 7  # words ahead; a pass of the server verifies fewer
FADES = 0.9  # weight per word of distance: a word only matters if all words before it are right
CHECKPOINT_EVERY = 500


@dataclass(frozen=True, slots=True)
class Settings:
    """Length of training, learning rate and dropout."""

    steps: int = 800
    learning_rate: float = 3e-3
    dropout: float = 0.1


@dataclass(frozen=True, slots=True)
class Texts:
    """A target's texts about some views: rows of words, and the hidden state that each word was chosen from."""

    tokens: np.ndarray  # int16 [N, T + 1], BOS first, PAD after EOS
    hidden: np.ndarray  # float16 [N, T + 1, D]; zeros for BOS


def run(work: Workspace, settings: Settings, tier: str) -> None:
    """Writes the tier's lookahead."""
    torch.manual_seed(10)
    rng = np.random.default_rng(10)
    net = targets.new_target(work, tier)
    net.load_state_dict(critic.final_weights(work, tier))
    net.eval()
    parts = [texts_of(work, net, tier, part) for part in ("train", "unlabelled", "dev")]
    dev = parts.pop()
    tokens = np.unique(np.concatenate([np.unique(part.tokens) for part in parts]))
    tokens = tokens[tokens != PAD].astype(np.int64)
    numbers = np.full(work.vocabulary, -1, np.int64)  # token to the network's own number of it
    numbers[tokens] = np.arange(len(tokens))
    ahead = LookaheadNet(net.decoder.shape.width, len(tokens))
    optimiser = torch.optim.AdamW(ahead.parameters(), lr=settings.learning_rate, weight_decay=0.02, betas=(0.9, 0.98))

    def quality(weights: dict[str, Tensor], _: int | None) -> dict[str, float]:
        return evaluate(weights, dev, numbers)

    training = Training(work, f"{NAME}-{tier}", ahead, optimiser, settings.steps, CHECKPOINT_EVERY, evaluate=quality)
    border, total = len(parts[0].tokens), sum(len(part.tokens) for part in parts)
    for _ in training.steps():
        chosen = np.sort(rng.integers(0, total, BATCH))
        split = np.searchsorted(chosen, border)
        rows = [cut(parts[0], chosen[:split]), cut(parts[1], chosen[split:] - border)]
        longest = max(part.tokens.shape[1] for part in rows)
        loss = torch.zeros(())
        for part in rows:
            if len(part.tokens):
                loss = loss + loss_of(ahead, part, numbers, settings.dropout) / (BATCH * longest)
        training.update(loss)
    save_file(tensors_of(tokens.tolist(), training.average), work / lookahead_file(tier))
    training.values["words"] = len(tokens)
    training.finish()


@torch.inference_mode()
def texts_of(work: Workspace, net: targets.Target, tier: str, part: str) -> Texts:
    """A target's greedy texts about the views of a part, and its hidden states while it reads them again."""
    maps, labels = work.array(f"maps-{part}"), np.load(work / f"labels-{part}.npy")
    tokens = np.load(work / f"texts-{part}.npy") if tier == "cloud" else written(work, net, part)
    hidden = np.zeros((*tokens.shape, net.decoder.shape.width), np.float16)
    states: list[Tensor] = []
    hook = net.decoder.norm.register_forward_hook(lambda _, __, state: states.append(state))
    for at in blocks(f"states of {part}", len(tokens), READ):
        states.clear()
        with autocast():
            words = torch.from_numpy(labels[at].astype(np.int64))
            memory = net.decoder.encode_image(net.features(targets.maps_of(maps, at)), words)
            net.decoder(torch.from_numpy(tokens[at, :-1].astype(np.int64)), memory)
        hidden[at, 1:] = states[0].float().numpy()
    hook.remove()
    return Texts(tokens, hidden)


def cut(texts: Texts, chosen: np.ndarray) -> Texts:
    """Some of the texts, as wide as the longest of them."""
    tokens = texts.tokens[chosen]
    width = int((tokens != PAD).sum(1).max(initial=1))
    return Texts(tokens[:, :width], texts.hidden[chosen, :width])


def unrolled(texts: Texts, numbers: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Every position of every text as an example: hidden [M, D], the words from there on [M, DISTANCE], and the word
    after each of them, -1 after the end of the text.
    """
    tokens = texts.tokens.astype(np.int64)
    padded = np.pad(tokens, ((0, 0), (0, DISTANCE)), constant_values=PAD)
    windows = np.lib.stride_tricks.sliding_window_view(padded, DISTANCE + 1, axis=1)  # [N, T, DISTANCE + 1]
    is_place = (windows[..., 0] != PAD) & (windows[..., 1] != PAD)
    hidden = torch.from_numpy(texts.hidden[is_place].astype(np.float32))
    words = torch.from_numpy(np.where(windows == PAD, -1, numbers[windows])[is_place])
    return hidden, words[:, :-1].clamp_min(0), words[:, 1:]


def loss_of(ahead: LookaheadNet, texts: Texts, numbers: np.ndarray, dropout: float) -> Tensor:
    """Cross-entropy, summed over positions and distances."""
    hidden, words, wanted = unrolled(texts, numbers)
    logits = ahead(hidden, words, dropout)
    losses = F.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=-1, label_smoothing=0.02, reduction="none"
    )
    weighted: Tensor = losses.view(wanted.shape) * FADES ** torch.arange(DISTANCE)
    return weighted.sum()


@torch.inference_mode()
def evaluate(weights: dict[str, Tensor], dev: Texts, numbers: np.ndarray) -> dict[str, float]:
    """Mean number of words ahead, at most DISTANCE, that are right before the first wrong one."""
    words, width = weights["out.weight"].shape[0], weights["start.weight"].shape[1]
    ahead = LookaheadNet(width, words)
    ahead.load_state_dict(weights)
    runs = []
    for at in range(0, len(dev.tokens), READ):
        hidden, given, wanted = unrolled(cut(dev, np.arange(at, min(at + READ, len(dev.tokens)))), numbers)
        # Up to the first mistake, teacher forcing gives the same words as free running.
        runs.append((ahead(hidden, given).argmax(-1) == wanted).cumprod(1).sum(1))
    return {"words_ahead": round(float(torch.cat(runs).float().mean()), 3)}
