"""The information bottleneck: finds the few hundred bytes of a photo that the answers need.

Trains the bottleneck convolution, its density and the tail on cached maps at the cut. Several tasks share the bits: the
backbone's last map (mean squared error), its ImageNet logits (distillation), the captions (cross-entropy through the
cloud's decoder, which stage 6 trains further) and the labels. The rate in training is -log2 of the density on the
rounded symbols, with straight-through gradients (Minnen & Singh, arXiv 2007.08739). With the usual uniform noise, the
many symbols that are zero would cost too much and their channels would become useless. A slow controller sets the
price, which is the weight of the rate, so that the symbols of a photo take the wanted number of bytes under counted
tables, with the averaged weights that ship. The price is bounded, since channels do not recover from a price that is
too high.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_runtime.inference.bundle import PAD, UNKNOWN
from models.backbone import CUT, CUT_CHANNELS, Conv, Lite0, pretrained_lite0
from models.family import LATENT, Classifier, Density, Dropout, Tail, TextDecoder, decoder_shapes
from models.recipe.depthwise import use_matrices
from models.recipe.training import Training
from models.recipe.workspace import Workspace, channels_last

NAME = "3-bottleneck"
PHOTOS, CLASS_PHOTOS = 48, 16  # per step
CAPTIONS = 3  # per photo and step
CHECKPOINT_EVERY = 100
FIRST_PRICE = 1e-3  # loss per byte
PRICES = 3e-5, 4e-3  # bounds
PRICE_FIXED_STEPS = 100  # before the controller starts: the density must fit the symbols first


@dataclass(frozen=True, slots=True)
class Settings:
    """Length of training, target size and weights of the losses."""

    steps: int = 1700
    bytes: float = 400.0  # per photo, under one table per channel
    learning_rate: float = 1e-3
    known_rate: float = 3e-4  # learning rate of pretrained layers, and of the expander's linear part
    bottleneck_rate: float = 0.04  # of the bottleneck, as a share of its weights' root mean square
    first_step: float = 32.0  # units per symbol, see `principal`; about 550 bytes
    kl_weight: float = 0.7
    caption_weight: float = 0.5
    label_weight: float = 0.3


class Cut(nn.Module):
    """The networks that stage 3 trains."""

    def __init__(self, backbone: Lite0, vocabulary: int, classes: int) -> None:
        super().__init__()
        self.bottleneck = Conv(CUT_CHANNELS, LATENT[0], 3, stride=2, linear=True)
        self.density = Density()
        self.tail = Tail()
        for mine, known in zip(self.tail.blocks, list(backbone.blocks)[CUT:], strict=True):
            mine.load_state_dict(known.state_dict())
        self.tail.features.load_state_dict(backbone.features.state_dict())
        self.classifier = Classifier(classes)
        self.decoder = TextDecoder(decoder_shapes(vocabulary)["cloud"])

    def symbols(self, cut: Tensor) -> Tensor:
        """Maps at the cut to symbols, float [B, 64, 7, 7], with straight-through gradients."""
        latent: Tensor = self.bottleneck(cut).float()
        return latent + (latent.round().clamp(-127, 127) - latent).detach()


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


class Losses(NamedTuple):
    """The losses of one batch."""

    error: Tensor  # squared error of the last map, divided by its variance
    kl: Tensor  # nats per photo to the backbone's own ImageNet logits
    caption: Tensor  # nats per token
    label: Tensor  # nats per class photo
    priced_bytes: Tensor  # per photo, under the density
    counted_bytes: Tensor  # per photo, under one table per channel, counted on this batch


def caption_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.1) -> Tensor:
    """Mean cross-entropy per token, padding and unknown words left out; logits [..., V], targets [...]."""
    targets = targets.masked_fill(targets == UNKNOWN, PAD)
    return F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=PAD, label_smoothing=smoothing
    )


def repeat_memory(memory: list[tuple[Tensor, Tensor]], times: int) -> list[tuple[Tensor, Tensor]]:
    """The decoder's memory of B photos, repeated for `times` texts per photo."""
    return [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in memory]


def counted_bytes(symbols: Tensor) -> Tensor:
    """Bytes per photo of whole-numbered symbols [B, 64, 7, 7] under one table per channel, counted on themselves."""
    photos, channels = symbols.shape[:2]
    values = symbols.detach().transpose(0, 1).flatten(1).long() + 128 + 256 * torch.arange(channels)[:, None]
    shares = torch.bincount(values.flatten(), minlength=256 * channels).float() / values.shape[1]
    return -torch.xlogy(shares, shares).sum() / math.log(2) * values.shape[1] / photos / 8


@torch.no_grad()
def shipped_bytes(average: Cut, cut: Tensor) -> float:
    """`counted_bytes` of the averaged bottleneck. The weights in training are noisy and need more bytes."""
    with torch.autocast("cpu", torch.bfloat16):
        latent: Tensor = average.bottleneck(cut)
    return counted_bytes(latent.float().round().clamp(-127, 127)).item()


def losses_of(net: Cut, backbone: Lite0, cut: Tensor, texts: Tensor, labels: Tensor) -> Losses:
    """cut bfloat16 [B, 112, 14, 14]; texts int64 [PHOTOS * CAPTIONS, T] of its first rows; labels int64 of the rest."""
    drop = Dropout(0.1)
    with torch.no_grad():
        true_map, true_logits = backbone.rest(cut)
    with torch.autocast("cpu", torch.bfloat16):
        symbols = net.symbols(cut)
        last = net.tail.last_map(symbols)
        features = net.tail.features(last).flatten(2).transpose(1, 2)
        logits = backbone.classifier(features.mean(1))
        memory = repeat_memory(net.decoder.encode_image(features[:PHOTOS], drop), CAPTIONS)
        wanted = texts[:, 1:] != PAD  # half of a padded batch
        words = net.decoder(texts[:, :-1], memory, drop, wanted)
        guesses = net.classifier(features[PHOTOS:])
    log_probabilities = logits.float().log_softmax(-1), true_logits.float().log_softmax(-1)
    return Losses(
        (last.float() - true_map.float()).square().mean() / true_map.float().var(),
        F.kl_div(*log_probabilities, log_target=True, reduction="batchmean"),
        caption_loss(words, texts[:, 1:][wanted]),
        F.cross_entropy(guesses.float(), labels),
        net.density.bits(symbols).sum((1, 2, 3)).mean() / 8,
        counted_bytes(symbols),
    )


def run(work: Workspace, settings: Settings) -> None:
    """Writes 3-bottleneck.pt with the averaged weights of bottleneck, tail, classifier and the cloud's decoder."""
    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    backbone = channels_last(pretrained_lite0()).to(torch.bfloat16)
    captions = work.array("captions-train")
    labels = np.load(work / "labels-classes.npy")
    net = channels_last(Cut(pretrained_lite0(), work.vocabulary, work.classes))
    use_matrices(net.tail.blocks, 14)
    photos, class_photos = work.array("cut-train"), work.array("cut-classes")
    sample = torch.from_numpy(np.array(photos[:: max(1, len(photos) // 2048)])).permute(0, 3, 1, 2).float()
    principal(net, pretrained_lite0(), sample, settings.first_step)
    optimiser = optimiser_of(net, settings)
    training = Training(
        work,
        NAME,
        net,
        optimiser,
        settings.steps,
        CHECKPOINT_EVERY,
        rate=lambda peak, step: peak * min(1.0, (step + 1) / 100) * (1.0 - step / settings.steps) ** 0.7,
        clipped=(p for group in optimiser.param_groups[:3] for p in group["params"]),
    )
    price = training.values.get("price", FIRST_PRICE)
    for step in training.steps():
        chosen = np.sort(rng.integers(0, len(photos), PHOTOS))
        also = np.sort(rng.integers(0, len(class_photos), CLASS_PHOTOS))
        maps = np.concatenate([photos[chosen], class_photos[also]])
        some = rng.permutation(captions.shape[1])[:CAPTIONS]
        texts = torch.from_numpy(captions[chosen % len(captions)][:, some].astype(np.int64)).flatten(0, 1)
        cut = torch.from_numpy(maps).permute(0, 3, 1, 2).to(torch.bfloat16)

        loss = losses_of(net, backbone, cut, texts, torch.from_numpy(labels[also % len(labels)]))
        total = loss.error + settings.kl_weight * loss.kl + settings.caption_weight * loss.caption
        total = total + settings.label_weight * loss.label + price * loss.priced_bytes
        training.update(total, **{name: value.item() for name, value in loss._asdict().items()})
        size = shipped_bytes(training.average, cut)
        if step >= PRICE_FIXED_STEPS:
            excess = np.clip(size / settings.bytes - 1.0, -1, 1)
            price = float(np.clip(price * np.exp(0.01 * excess), *PRICES))
        training.values |= {"shipped_bytes": round(size, 1), "price": price}
    training.finish()


def optimiser_of(net: Cut, settings: Settings) -> torch.optim.Optimizer:
    """AdamW over new layers, known layers, the bottleneck and the density, each with its own peak rate.

    The folded weights of the backbone are small: steps for new layers would destroy them.
    """
    bottleneck, density = list(net.bottleneck.parameters()), list(net.density.parameters())
    known = [p for part in (net.tail.linear, net.tail.blocks, net.tail.features) for p in part.parameters()]
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
