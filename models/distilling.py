"""Trains a tail that imitates a vision tower (tower_tail.py), on photos without captions, and measures it.

First by regression: the squared error of the image tokens, each dimension divided by its variance. Then also by the
divergence of the language model's next-token distribution, on the texts that it writes about the same photos when it is
fed the picture. Every row of a batch has a random level, and some have only their first groups, so that one tail serves
all rates (as in recipe/stage3_bottleneck.py).

The tower sees each photo once, and a file per photo keeps what it found. Knows nothing of pictures and transformers:
`Model` is its interface to one.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire.bitstream import encode
from models.family import GROUPS, LATENT, Tail
from models.recipe.training import Training
from models.recipe.workspace import Workspace
from models.tower_tail import SymbolReader, TowerTail, read_symbols

MIN_PHOTOS = 20  # so that two are held out; a useful tail takes thousands
HELD_OUT = 10  # one photo of so many is measured on, not trained on
MEASURED = 100  # photos at most, since the model writes a text for each and every rate
COUNTED = 2000  # photos for mean and variance of the tokens
COMPLETE = 0.75  # share of the rows with all groups
CHECKPOINT_EVERY = 100  # steps

Symbols = Callable[[NDArray[np.integer], int], NDArray[np.int8]]  # the head's codes and a level to symbols, as a board
Progress = Callable[[Iterable[int], str, int], Iterable[int]]  # shows how many of a number of steps are done


class Model(Protocol):
    """The language model behind the tower, with one prompt."""

    def log_probabilities(self, tokens: Tensor, text: Sequence[int]) -> Tensor:
        """Of each next token of a text about the image tokens [N, D]: [len(text), vocabulary]. It has gradients."""

    def write(self, tokens: Tensor) -> list[int]:
        """The text about the image tokens [N, D], end token included."""


@dataclass(frozen=True)
class Settings:
    """Lengths and sizes."""

    steps: int = 3000
    kl_steps: int = 500
    batch: int = 16
    kl_batch: int = 4  # the language model reads one photo at a time
    learning_rate: float = 5e-4
    kl_learning_rate: float = 1e-4
    kl_weight: float = 1.0  # of nats per token, relative to the squared error
    inner_width: int = 384
    layers: int = 2


class Seen(NamedTuple):
    """One photo, as head and tower saw it."""

    codes: NDArray[np.integer]  # of the int8 head, [64, 7, 7]: the symbols of every level
    tokens: Tensor  # of the tower, float32 [N, D]
    text: list[int]  # what the model writes about the picture, end token included


def keep(path: Path, seen: Seen) -> None:
    """Writes the file of a photo, whole or not at all. Raises AiflowError."""
    partial = path.with_suffix(".partial")
    # bfloat16 has the range of float32, and rounds by less than a tail will ever be right.
    tensors = {"codes": torch.from_numpy(seen.codes), "tokens": seen.tokens.to("cpu", torch.bfloat16).contiguous()}
    try:
        save_file(tensors | {"text": torch.tensor(seen.text)}, partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise AiflowError(f"{path} cannot be written ({error}): want more room there, or fewer photos") from error


def kept(path: Path) -> Seen:
    """Raises AiflowError."""
    try:
        tensors = load_file(path)
        return Seen(tensors["codes"].numpy(), tensors["tokens"].float(), tensors["text"].tolist())
    except (OSError, SafetensorError, KeyError) as error:
        raise AiflowError(f"{path} is damaged ({error}): remove it, and run this again") from error


def split(photos: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The photos to train on, and those held out. Raises AiflowError if there are too few."""
    photos = sorted(set(photos))
    if len(photos) < MIN_PHOTOS:
        raise AiflowError(
            f"there are {len(photos)} different photos, want at least {MIN_PHOTOS}, and thousands for a good tail: "
            "they need no captions, so add any that look like what the cameras see"
        )
    return [path for i, path in enumerate(photos) if i % HELD_OUT], photos[::HELD_OUT]


class Distilling:
    """A training on these photos. It continues from its last checkpoint in the folder `work`."""

    def __init__(
        self, work: Path, photos: Sequence[Path], tail: Tail, symbols: Symbols, model: Model, settings: Settings
    ) -> None:
        """tail: the bundle's. photos: files of `keep`."""
        identity = hashlib.sha256(repr((sorted(p.parts[-2:] for p in photos), asdict(settings))).encode()).hexdigest()
        self.work = Workspace(work / f"training-{identity[:16]}")
        self.photos, self.tail, self.symbols, self.model, self.settings = photos, tail, symbols, model, settings
        self.device = tail.linear.weight.device

    def run(self, progress: Progress) -> TowerTail:
        """The trained tail, float32."""
        torch.manual_seed(0)
        tokens, width = kept(self.photos[0]).tokens.shape
        net = TowerTail(tokens, width, self.settings.inner_width, self.settings.layers).to(self.device)
        net.mean, net.scale = (found.to(self.device) for found in self._spread())
        self._train(net, "regression", self.settings.steps, self.settings.learning_rate, self._regression, progress)
        if self.settings.kl_steps:
            rate = self.settings.kl_learning_rate
            self._train(net, "divergence", self.settings.kl_steps, rate, self._divergence, progress)
        return net.eval().requires_grad_(False)

    def _train(
        self,
        net: TowerTail,
        name: str,
        steps: int,
        rate: float,
        loss_of: Callable[[TowerTail, np.random.Generator], Tensor],
        progress: Progress,
    ) -> None:
        """Trains the network and leaves the averaged weights in it."""
        if not self.work.is_done(name):
            optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01)
            training = Training(self.work, name, net.train(), optimiser, steps, min(CHECKPOINT_EVERY, steps))
            for step in progress(training.steps(), name, steps):
                training.update(loss_of(net, np.random.default_rng((len(name), step))))
            training.finish()
        net.load_state_dict(self.work.averaged(name))

    def _spread(self) -> tuple[Tensor, Tensor]:
        """The mean token of each place [N, D], and the standard deviation from it in each dimension [D]."""
        total, squares, count = torch.zeros(()), torch.zeros(()), 0
        for path in self.photos[:COUNTED]:
            tokens = kept(path).tokens.double()
            total, squares, count = total + tokens, squares + tokens.square(), count + 1
        mean = total / count
        variance = (squares / count - mean.square()).mean(0).clamp_min(0)
        return mean.float(), variance.sqrt().clamp_min(1e-4 * float(variance.max().sqrt()) + 1e-12).float()

    def _batch(self, net: TowerTail, rng: np.random.Generator, size: int) -> tuple[list[Seen], Tensor, Tensor]:
        """Photos at random rates, their tokens as the network writes them [B, N, D], and its squared error."""
        seen = [kept(self.photos[i]) for i in rng.integers(0, len(self.photos), size)]
        levels = rng.integers(0, self.tail.levels, size).tolist()
        fewer = rng.integers(1, GROUPS, size) * (LATENT[0] // GROUPS)
        channels = np.where(rng.random(size) < COMPLETE, LATENT[0], fewer).tolist()
        rows = np.stack([self.symbols(one.codes, level) for one, level in zip(seen, levels, strict=True)])
        for row, there in zip(rows, channels, strict=True):
            row[there:] = 0
        found = net(read_symbols(self.tail, rows, levels, channels))
        return seen, found, squared_error(net, found, torch.stack([one.tokens for one in seen]).to(self.device))

    def _regression(self, net: TowerTail, rng: np.random.Generator) -> Tensor:
        return self._batch(net, rng, self.settings.batch)[2]

    def _divergence(self, net: TowerTail, rng: np.random.Generator) -> Tensor:
        seen, found, error = self._batch(net, rng, self.settings.kl_batch)
        nats = [divergence(self.model, one, tokens) for one, tokens in zip(seen, found, strict=True)]
        return error + self.settings.kl_weight * torch.stack(nats).mean()


def squared_error(net: TowerTail, found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of image tokens, each dimension divided by its variance: 1.0 for the mean tokens."""
    return ((found - wanted) / net.scale).square().mean()


def divergence(model: Model, seen: Seen, tokens: Tensor) -> Tensor:
    """Nats per token from the distribution that the picture gives to the one of these image tokens [N, D]."""
    with torch.no_grad():
        true = model.log_probabilities(seen.tokens.to(tokens.device), seen.text)
    ours = model.log_probabilities(tokens, seen.text)
    return (true.exp() * (true - ours)).sum(-1).mean()


class Rate(NamedTuple):
    """The symbols that a board sends of a frame."""

    level: int
    groups: int


class Agreement(NamedTuple):
    """With the model that is fed the picture: means over photos."""

    bytes: float  # of the bitstream
    error: float  # share of the tokens' variance that is not explained
    kl: float  # nats per token of the text about the picture
    first: float  # share of texts with the same first token
    whole: float  # share of texts that are the same


def some_rates(bundle: Bundle) -> list[Rate]:
    """The coarsest level, half of the default one, the default one and the finest."""
    latent = bundle.manifest.latent
    levels = (Rate(level, latent.groups) for level in (0, latent.default_level, len(latent.gains) - 1))
    return sorted({*levels, Rate(latent.default_level, max(1, latent.groups // 2))})


def measure(
    reader: SymbolReader,
    bundle: Bundle,
    photos: Iterable[Path],
    symbols: Symbols,
    model: Model,
    rate: Rate | None,
) -> Agreement:
    """The agreement at a rate. None: of the mean tokens, which know nothing of the photo."""
    net, rows = reader.tower_tail, list[tuple[float, ...]]()
    for path in photos:
        seen, size, tokens = kept(path), 0, net.mean
        if rate:
            channels = rate.groups * (LATENT[0] // GROUPS)
            sent = symbols(seen.codes, rate.level)
            size = len(encode(sent, bundle.tables, rate.level, rate.groups))
            sent[channels:] = 0
            tokens = reader.tokens(sent, rate.level, channels)
        with torch.no_grad():
            kl = float(divergence(model, seen, tokens))
        text = model.write(tokens)
        error = float(squared_error(net, tokens, seen.tokens.to(tokens.device)))
        rows.append((size, error, kl, text[:1] == seen.text[:1], text == seen.text))
    return Agreement(*(round(float(mean), 4) for mean in np.mean(rows, 0)))
