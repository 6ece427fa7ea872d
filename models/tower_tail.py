"""A tail that imitates the vision tower of somebody's model: symbols to the image tokens that its language model reads.

The bundle's own tail comes first, unchanged. Behind it, a small transformer reads the tail's features and the map at
the cut, and writes one token for each place. It is trained on unlabelled photos (distilling.py) and stored as a folder:
safetensors, and a manifest that names the bundle and the model that it is for.

Shapes: B batch, P = 49 positions of the tail, N image tokens, D their width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Meta
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edge_runtime.bounded_file import read_bounded
from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import MANIFEST, Bundle, Sha256, file_hash
from models.backbone import CUT_CHANNELS, FEATURES
from models.family import POSITIONS, Tail, arrived_groups

FORMAT = 1
WEIGHTS = "tail.safetensors"
READ = FEATURES + 4 * CUT_CHANNELS  # of each position: the tail's features, and 2 x 2 places of the map at the cut
MAX_TOKENS = 1024  # of a picture; towers that are fed one square have 49 to 729
MAX_MANIFEST = 64 * 1024  # bytes
HEAD_WIDTH = 32  # of an attention head


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of the manifest."""

    bundle: Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]  # its id
    bundle_name: Annotated[str, Meta(max_length=64)]
    target: Annotated[str, Meta(max_length=512)]  # name of the model
    architecture: Annotated[str, Meta(max_length=128)]
    target_weights: Sha256  # of the model, as huggingface_tower.py hashes them
    pixels: Annotated[int, Meta(ge=32, le=2048)]  # side of the square that the tower was shown
    tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]  # of a picture, N
    width: Annotated[int, Meta(ge=1, le=16384)]  # of a token, D
    inner_width: Annotated[int, Meta(ge=HEAD_WIDTH, le=4096, multiple_of=HEAD_WIDTH)]
    layers: Annotated[int, Meta(ge=1, le=16)]
    photos: Annotated[int, Meta(ge=1)]  # that it was trained on
    quality: dict[str, float]  # measured on photos that were held out
    weights: Sha256 = "0" * 64  # of the file
    format: int = FORMAT


class _Versioned(msgspec.Struct):
    """The fields that the manifest of every format has."""

    format: int


class TowerTail(nn.Module):
    """Maps the output of the bundle's tail to image tokens. At first, it writes the mean tokens for every picture."""

    mean: Tensor
    scale: Tensor

    def __init__(self, tokens: int, width: int, inner_width: int, layers: int) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(READ, inner_width), nn.LayerNorm(inner_width))
        self.positions = nn.Parameter(torch.randn(POSITIONS, inner_width) * 0.02)
        self.queries = nn.Parameter(torch.randn(tokens, inner_width) * 0.02)
        layer = nn.TransformerDecoderLayer(
            inner_width, inner_width // HEAD_WIDTH, 4 * inner_width, 0.1, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, layers, nn.LayerNorm(inner_width))
        self.write = nn.Linear(inner_width, width)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)
        self.register_buffer("mean", torch.zeros(tokens, width))  # of the tower's tokens over photos
        self.register_buffer("scale", torch.ones(width))  # their standard deviation from it

    def forward(self, known: Tensor) -> Tensor:
        """Float [B, P, READ] to image tokens, float [B, N, D]."""
        memory = self.read(known) + self.positions
        written = self.write(self.layers(self.queries.expand(len(known), -1, -1), memory))
        tokens: Tensor = self.mean + self.scale * written
        return tokens


@dataclass(frozen=True)
class SymbolReader:
    """From symbols to image tokens."""

    tail: Tail  # the bundle's
    tower_tail: TowerTail

    @torch.no_grad()
    def tokens(self, symbols: NDArray[np.int8], level: int, channels: int) -> Tensor:
        """One frame: symbols int8 [64, 7, 7] of a level, of which the first channels have arrived; to float [N, D]."""
        found: Tensor = self.tower_tail(read_symbols(self.tail, symbols[None], [level], [channels]))[0]
        return found


@torch.no_grad()
def read_symbols(tail: Tail, symbols: NDArray[np.int8], levels: list[int], channels: list[int]) -> Tensor:
    """Output of the bundle's tail for symbols int8 [B, 64, 7, 7]: its features and the map at the cut, [B, P, READ].

    levels, channels: of each row, its level and how many channels have arrived. The others are zero.
    """
    device = tail.linear.weight.device
    rows = torch.from_numpy(symbols.astype(np.float32)).to(device)
    cut = tail.cut(rows, torch.tensor(levels, device=device), arrived_groups(torch.tensor(channels, device=device)))
    features = tail.features(tail.blocks(cut))
    return torch.cat([features, F.pixel_unshuffle(cut, 2)], 1).flatten(2).transpose(1, 2)


def write_tower_tail(folder: Path, record: Record, tail: TowerTail) -> Record:
    """Writes the folder and returns the manifest, which now has the hash of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.cpu().to(torch.float16).contiguous() for name, weight in tail.state_dict().items()}
    # Not rounded: a few dimensions of a tower's tokens are hundreds of times larger than the others.
    weights |= {name: weight.cpu().contiguous() for name, weight in tail.named_buffers()}
    save_file(weights, folder / WEIGHTS)
    record = msgspec.structs.replace(record, weights=file_hash(folder / WEIGHTS))
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    return record


def read_tower_tail(folder: Path, bundle: Bundle) -> tuple[Record, TowerTail]:
    """A tail for this bundle, checked and ready to serve. Raises ConfigError."""
    record = _read_record(folder / MANIFEST)
    if record.bundle != bundle.id.hex():
        raise ConfigError(
            f"{folder} was made for bundle {record.bundle_name} {record.bundle}, this is {bundle.manifest.name} "
            f"{bundle.id.hex()}, whose symbols differ: run `aiflow distil` again with --bundle {bundle.path}"
        )
    path = folder / WEIGHTS
    try:
        if file_hash(path) != record.weights:
            raise ConfigError(f"{path} is not the file that {MANIFEST} names: copy the folder again")
        weights: dict[str, Tensor] = {name: tensor.float() for name, tensor in load_file(path).items()}
        with torch.device("meta"):  # takes no memory: the numbers of the manifest are not proven yet
            tail = TowerTail(record.tokens, record.width, record.inner_width, record.layers)
        tail.load_state_dict(weights, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path} cannot be read ({reason}): copy the folder again, or distil again") from error
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise ConfigError(f"{path} has NaN or infinite values: distil again")
    return record, tail.eval().requires_grad_(False)


def _read_record(path: Path) -> Record:
    try:
        data = read_bounded(path, MAX_MANIFEST)
        if (found := msgspec.json.decode(data, type=_Versioned).format) != FORMAT:
            raise ConfigError(f"{path} has format {found}, this version reads {FORMAT}: distil again, or update")
        return msgspec.json.decode(data, type=Record)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: name a folder that `aiflow distil` wrote") from error
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no manifest of a tail ({error}): name what `aiflow distil` wrote") from error
