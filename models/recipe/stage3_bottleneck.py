"""The information bottleneck: finds the bytes of a photo that the answers need, at many rates.

Trains the head's last blocks, the bottleneck convolution, its density and the tail on cached maps behind the frozen
blocks. A linear bottleneck on frozen features keeps what is large in them; trained blocks keep what is asked. Several
tasks share the bits: the backbone's last map (mean squared error), its ImageNet logits (distillation) and, where there
are any, the captions (cross-entropy through a small decoder that is thrown away). `docs/information-bottleneck.md` has
the objective.

One latent serves all rates. Every row of a batch has a random level, which scales the latent before it is rounded (gain
units: Cui et al., arXiv 2003.02012), and often only its first channels (tail-drop: Koike-Akino & Wang, arXiv
2005.02870). The tail is told both.

The rate in training is -log2 of the density on the rounded symbols, with straight-through gradients (Minnen & Singh,
arXiv 2007.08739). With the usual uniform noise, the many symbols that are zero would cost too much and their channels
would become useless. A slow controller sets the price, which is the weight of the rate, so that the symbols of a photo
take the wanted number of bytes at the reference level under counted tables, with the averaged weights that ship. The
price is bounded, since channels do not recover from a price that is too high. A coarser level has a higher price: an
error grows with the square of the step.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_runtime.inference.bundle import PAD, UNKNOWN
from models.backbone import BLOCKS, CUT, CUT_CHANNELS, FROZEN, Block, Conv, Lite0, pretrained_lite0
from models.family import GROUPS, LATENT, Density, Dropout, Tail, TextDecoder, arrived_groups, decoder_shapes
from models.recipe.depthwise import use_matrices
from models.recipe.training import Training
from models.recipe.workspace import Workspace, channels_last

NAME = "3-bottleneck"
GAINS = tuple(1.15 ** (level - 7) for level in range(8))  # symbols per unit of the latent
REFERENCE = 4  # the level whose bytes are steered, and that boards send if nothing else is wanted
LEVEL_CHANCES = (0.07, 0.07, 0.08, 0.1, 0.13, 0.3, 0.13, 0.12)
COMPLETE, WHOLE_GROUPS = 0.75, 0.15  # shares of rows with all channels, and with a whole number of groups of them
PHOTOS, OTHERS = 40, 24  # per step: photos with captions, and without
CAPTIONS = 3  # per photo and step, if it has as many
CHECKPOINT_EVERY = 100
FIRST_PRICE = 1e-3  # loss per byte
PRICES = 3e-5, 1e-2  # bounds
PRICE_FIXED_STEPS = 100  # before the controller starts: the density must fit the symbols first
PRICE_EVERY = 5  # steps
DEV_BATCH = 100


@dataclass(frozen=True, slots=True)
class Settings:
    """Length of training, target size and weights of the losses."""

    steps: int = 300
    bytes: float = 335.0  # per photo at the reference level, under one table per channel
    learning_rate: float = 6e-4
    # Learning rate of pretrained layers, and of the expander's linear part. Ten times as much is better on training
    # photos and worse on others: the layers forget classes that the photos do not show.
    known_rate: float = 3e-5
    bottleneck_rate: float = 0.02  # of the bottleneck, as a share of its weights' root mean square
    first_step: float = 40.0  # units per symbol of the finest level, see `principal`
    error_weights: tuple[float, float] = (1.0, 0.25)  # first and last: it asks for more than the tasks need
    kl_weight: float = 2.0
    caption_weight: float = 0.5


class Cut(nn.Module):
    """The networks that stage 3 trains."""

    def __init__(self, backbone: Lite0, vocabulary: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*(Block(shape) for shape in BLOCKS[FROZEN:CUT]))
        self.bottleneck = Conv(CUT_CHANNELS, LATENT[0], 3, stride=2, linear=True)
        self.density = Density()
        self.tail = Tail(len(GAINS))
        for mine, known in zip((*self.encoder, *self.tail.blocks), list(backbone.blocks)[FROZEN:], strict=True):
            mine.load_state_dict(known.state_dict())
        self.tail.features.load_state_dict(backbone.features.state_dict())
        self.tail.steps.data.copy_(1.0 / torch.tensor(GAINS)[:, None])
        self.decoder = TextDecoder(replace(decoder_shapes(vocabulary)["edge"], label_words=0))

    def latent(self, maps: Tensor) -> Tensor:
        """Maps behind the frozen blocks [B, 80, 14, 14] to the latent, float [B, 64, 7, 7]."""
        latent: Tensor = self.bottleneck(self.encoder(maps))
        return latent.float()

    def symbols(self, maps: Tensor, gains: Tensor) -> Tensor:
        """Maps behind the frozen blocks and gains [B] to symbols, [B, 64, 7, 7], with straight-through gradients."""
        latent = self.latent(maps) * gains[:, None, None, None]
        symbols: Tensor = latent + (latent.round().clamp(-127, 127) - latent).detach()
        return symbols


def principal(net: Cut, backbone: Lite0, cut: Tensor, step: float) -> None:
    """Initialises bottleneck and expander with the best linear code of 2 x 2 blocks of the map at the cut.

    These are the principal components of cut float [B, 112, 14, 14] under the metric E[J^T J], with J the Jacobian of
    the last map with respect to a block (Hutchinson's estimate). One symbol is `step` units for all components, which
    is optimal at high rates (Gersho & Gray, Vector Quantization, 1992, chapter 8). Without any training this is closer
    to the backbone than a random start after thousands of steps.
    """
    metric = torch.zeros(4 * CUT_CHANNELS, 4 * CUT_CHANNELS)
    for at in range(0, min(512, len(cut)), 64):
        some = cut[at : at + 64].clone().requires_grad_()
        last, _ = backbone.rest(some)
        (slopes,) = torch.autograd.grad((last * torch.randn_like(last)).sum(), some)
        metric += blocks_of(slopes) @ blocks_of(slopes).T
    metric *= len(metric) / metric.trace()
    values, vectors = torch.linalg.eigh(metric + 1e-3 * torch.eye(len(metric)))
    root, inverse = (vectors @ torch.diag(values**power) @ vectors.T for power in (0.5, -0.5))
    blocks = blocks_of(cut)
    mean = blocks.mean(1)
    components = torch.linalg.eigh(root @ torch.cov(blocks) @ root).eigenvectors.flip(1)[:, : LATENT[0]]
    down, up = components.T @ root / step, inverse @ components * step
    assert net.bottleneck.bias is not None
    assert net.tail.linear.bias is not None
    with torch.no_grad():
        net.bottleneck.weight.zero_()
        # With SAME padding, the first taps of a stride are on the block itself.
        net.bottleneck.weight[:, :, :2, :2] = down.view(LATENT[0], CUT_CHANNELS, 2, 2)
        net.bottleneck.bias.copy_(-down @ mean)
        net.tail.linear.weight.copy_(up[..., None, None])
        net.tail.linear.bias.copy_(mean)
        for p in net.tail.expand[-1].parameters():
            p.zero_()


def blocks_of(cut: Tensor) -> Tensor:
    """Maps [B, 112, 14, 14] to their 2 x 2 blocks as columns, [448, B * 49], in the order of pixel_unshuffle."""
    return F.pixel_unshuffle(cut, 2).transpose(0, 1).flatten(1)


class Rates(NamedTuple):
    """The rate at which each row of a batch is sent."""

    level: Tensor  # int64 [B]
    channels: Tensor  # int64 [B], how many of the latent's channels arrive

    @property
    def gains(self) -> Tensor:
        return torch.tensor(GAINS)[self.level]

    def cut(self, symbols: Tensor) -> Tensor:
        """Symbols [B, C, 7, 7] without the channels that do not arrive."""
        there = torch.arange(symbols.shape[1]) < self.channels[:, None]
        return symbols * there[..., None, None]

    @property
    def arrived(self) -> Tensor:
        return arrived_groups(self.channels)


def random_rates(rows: int, rng: np.random.Generator) -> Rates:
    """A random level for each row; most rows are complete, some have whole groups, a few end anywhere."""
    level = rng.choice(len(GAINS), rows, p=LEVEL_CHANCES)
    kind = rng.random(rows)
    group = LATENT[0] // GROUPS
    some = np.where(
        kind < COMPLETE + WHOLE_GROUPS, group * rng.integers(1, GROUPS, rows), rng.integers(4, LATENT[0], rows)
    )
    return Rates(torch.from_numpy(level), torch.from_numpy(np.where(kind < COMPLETE, LATENT[0], some)))


def complete_rates(rows: int, level: int) -> Rates:
    """All rows complete, at one level."""
    return Rates(torch.full((rows,), level), torch.full((rows,), LATENT[0]))


class Losses(NamedTuple):
    """The losses of one batch."""

    error: Tensor  # squared error of the last map, divided by its variance
    kl: Tensor  # nats per photo to the backbone's own ImageNet logits
    caption: Tensor  # nats per token
    priced_bytes: Tensor  # per photo, under the density, times the price of its level relative to the reference's


def caption_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.1) -> Tensor:
    """Mean cross-entropy per token, padding and unknown words left out; logits [..., V], targets [...]."""
    targets = targets.masked_fill(targets == UNKNOWN, PAD)
    return F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=PAD, label_smoothing=smoothing
    )


def divergence(logits: Tensor, true_logits: Tensor) -> Tensor:
    """Nats per photo from the true distribution over labels to ours."""
    return F.kl_div(logits.log_softmax(-1), true_logits.log_softmax(-1), log_target=True, reduction="batchmean")


def select_memory(memory: list[tuple[Tensor, Tensor]], photos: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The decoder's memory of the photos with these numbers, int64 [texts]."""
    return [(k.index_select(0, photos), v.index_select(0, photos)) for k, v in memory]


def some_captions(captions: np.ndarray, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Up to `count` random captions of each photo, and the photo of each.

    captions int16 [B, 5, T], a photo's own first; to (int64 [texts, T] without common padding, int64 [texts]).
    """
    own = (captions[:, :, 0] != PAD).sum(1)
    chosen = [(i, j) for i, n in enumerate(own.tolist()) for j in rng.permutation(n)[:count]]
    photos, numbers = np.array(chosen).T
    texts = captions[photos, numbers].astype(np.int64)
    return torch.from_numpy(texts[:, : int((texts != PAD).sum(1).max())]), torch.from_numpy(photos)


def counted_bytes(symbols: Tensor) -> Tensor:
    """Bytes per photo of whole-numbered symbols [B, 64, 7, 7] under one table per channel, counted on themselves."""
    photos, channels = symbols.shape[:2]
    values = symbols.detach().transpose(0, 1).flatten(1).long() + 128 + 256 * torch.arange(channels)[:, None]
    shares = torch.bincount(values.flatten(), minlength=256 * channels).float() / values.shape[1]
    return -torch.xlogy(shares, shares).sum() / math.log(2) * values.shape[1] / photos / 8


@torch.no_grad()
def shipped_bytes(average: Cut, maps: Tensor) -> float:
    """`counted_bytes` of the averaged bottleneck. The weights in training are noisy and need more bytes."""
    with torch.autocast("cpu", torch.bfloat16):
        latent = average.latent(maps)
    return counted_bytes((latent * GAINS[REFERENCE]).round().clamp(-127, 127)).item()


def losses_of(net: Cut, backbone: Lite0, maps: Tensor, rates: Rates, texts: Tensor, photos: Tensor) -> Losses:
    """maps bfloat16 [B, 80, 14, 14]; texts int64 [texts, T] of its rows `photos`, int64 [texts]."""
    drop = Dropout(0.1)
    with torch.no_grad():
        true_map, true_logits = backbone.rest(backbone.blocks[FROZEN:CUT](maps))
    with torch.autocast("cpu", torch.bfloat16):
        symbols = rates.cut(net.symbols(maps, rates.gains))
        last = net.tail.last_map(symbols, rates.level, rates.arrived)
        features = net.tail.features(last).flatten(2).transpose(1, 2)
        logits = backbone.classifier(features.mean(1))
        memory = select_memory(net.decoder.encode_image(features[: int(photos.max()) + 1], drop=drop), photos)
        wanted = texts[:, 1:] != PAD  # half of a padded batch
        words = net.decoder(texts[:, :-1], memory, drop, wanted)
    bits = rates.cut(net.density.bits(symbols, rates.gains)).sum((1, 2, 3))
    return Losses(
        (last.float() - true_map.float()).square().mean() / true_map.float().var(),
        divergence(logits.float(), true_logits.float()),
        caption_loss(words, texts[:, 1:][wanted]),
        (bits * (GAINS[REFERENCE] / rates.gains) ** 2).mean() / 8,
    )


def run(work: Workspace, settings: Settings) -> None:
    """Writes 3-bottleneck.pt with the averaged weights of bottleneck and tail."""
    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    backbone = channels_last(pretrained_lite0()).to(torch.bfloat16)
    captions = work.array("captions-train")
    net = channels_last(Cut(pretrained_lite0(), work.vocabulary))
    photos, others = work.array("frozen-train"), work.array("frozen-unlabelled")
    others = others if len(others) else photos
    sample = torch.from_numpy(np.array(photos[:: max(1, len(photos) // 2048)])).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        sample = net.encoder(sample)
    principal(net, pretrained_lite0(), sample, settings.first_step)
    for blocks in (net.encoder, net.tail.blocks):
        use_matrices(blocks, 14)
    optimiser = optimiser_of(net, settings)

    def quality(weights: dict[str, Tensor], limit: int | None) -> dict[str, float]:
        return evaluate(work, training.average, (REFERENCE,) if limit else range(len(GAINS)))

    training = Training(
        work,
        NAME,
        net,
        optimiser,
        settings.steps,
        CHECKPOINT_EVERY,
        rate=lambda peak, step: peak * min(1.0, (step + 1) / 100) * (1.0 - step / settings.steps) ** 0.7,
        clipped=(p for group in optimiser.param_groups[:3] for p in group["params"]),
        evaluate=quality,
    )
    price = training.values.get("price", FIRST_PRICE)
    first, last = settings.error_weights
    for step in training.steps():
        chosen = np.sort(rng.integers(0, len(photos), PHOTOS))
        also = np.sort(rng.integers(0, len(others), OTHERS))
        maps = torch.from_numpy(np.concatenate([photos[chosen], others[also]])).permute(0, 3, 1, 2).to(torch.bfloat16)
        texts = some_captions(captions[chosen % len(captions)], CAPTIONS, rng)
        loss = losses_of(net, backbone, maps, random_rates(len(maps), rng), *texts)
        error_weight = first + (last - first) * step / settings.steps
        total = error_weight * loss.error + settings.kl_weight * loss.kl + settings.caption_weight * loss.caption
        training.update(total + price * loss.priced_bytes, **{n: value.item() for n, value in loss._asdict().items()})
        if step >= PRICE_FIXED_STEPS and step % PRICE_EVERY == 0:
            size = shipped_bytes(training.average, maps)
            excess = np.clip(size / settings.bytes - 1.0, -1, 1)
            price = float(np.clip(price * np.exp(0.01 * PRICE_EVERY * excess), *PRICES))
            training.values |= {"shipped_bytes": round(size, 1), "price": price}
    training.finish()


@torch.inference_mode()
def evaluate(work: Workspace, net: Cut, levels: range | tuple[int, ...]) -> dict[str, float]:
    """Bytes of the labelled dev photos at some levels, and how often the bits still tell their classes among these."""
    photos, labels = work.array("frozen-labelled"), torch.from_numpy(np.load(work / "labels-labelled.npy"))
    if not len(labels):
        return {}
    backbone = channels_last(pretrained_lite0()).to(torch.bfloat16)
    figures: dict[str, float] = {}
    among = torch.unique(labels)
    for level in levels:
        sizes, right, kl = [], [], 0.0
        for at in range(0, len(labels), DEV_BATCH):
            maps = torch.from_numpy(np.array(photos[at : at + DEV_BATCH])).permute(0, 3, 1, 2).to(torch.bfloat16)
            rates = complete_rates(len(maps), level)
            _, true_logits = backbone.rest(backbone.blocks[FROZEN:CUT](maps))
            with torch.autocast("cpu", torch.bfloat16):
                symbols = net.symbols(maps, rates.gains)
                logits = backbone.classifier(net.tail(symbols, rates.level, rates.arrived).mean(1)).float()
            best = among[logits[:, among].topk(min(5, len(among))).indices] == labels[at : at + DEV_BATCH, None]
            right.append(best)
            kl += len(maps) * divergence(logits, true_logits.float()).item()
            sizes += [counted_bytes(symbols).item()] * len(maps)
        places = torch.cat(right).float()
        figures |= {
            f"bytes_{level}": round(float(np.mean(sizes)), 1),
            f"top1_{level}": round(places[:, 0].mean().item(), 4),
            f"top5_{level}": round(places.sum(1).mean().item(), 4),
            f"kl_{level}": round(kl / len(labels), 4),
        }
    return figures


def optimiser_of(net: Cut, settings: Settings) -> torch.optim.Optimizer:
    """AdamW over new layers, known layers, the bottleneck and the density, each with its own peak rate.

    The folded weights of the backbone are small: steps for new layers would destroy them.
    """
    bottleneck, density = list(net.bottleneck.parameters()), list(net.density.parameters())
    parts = (net.encoder, net.tail.linear, net.tail.blocks, net.tail.features)
    known = [p for part in parts for p in part.parameters()]
    others = {id(p) for p in bottleneck + density + known}
    new = [p for p in net.parameters() if id(p) not in others]
    size = net.bottleneck.weight.square().mean().sqrt().item()
    groups = [
        {"params": new, "lr": settings.learning_rate},
        {"params": known, "lr": settings.known_rate},
        {"params": bottleneck, "lr": settings.bottleneck_rate * size},
        {"params": density, "lr": 6e-3},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
