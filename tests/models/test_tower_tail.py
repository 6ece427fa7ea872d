"""The folder of a tail for somebody's tower: what it holds, and which folders are refused."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import MANIFEST, Bundle, file_hash
from models.family import Tail
from models.tower_tail import READ, WEIGHTS, Record, TowerTail, read_symbols, read_tower_tail
from models.tower_tail import write_tower_tail as write
from tests.bundles import GAINS, lively, random_symbols

TOKENS, WIDTH = 5, 24


@pytest.fixture
def record(board_bundle: Bundle) -> Record:
    return Record(
        board_bundle.id.hex(), "tiny", "folder", "SmolVLM", "0" * 64, 64, TOKENS, WIDTH, 32, 1, 20, {"error": 0.5}
    )


@pytest.fixture
def tail() -> TowerTail:
    torch.manual_seed(0)
    return lively(TowerTail(TOKENS, WIDTH, 32, 1)).eval()


def test_a_written_tail_is_read_again(record: Record, tail: TowerTail, board_bundle: Bundle, tmp_path: Path) -> None:
    tail.mean = torch.full((TOKENS, WIDTH), 1e5)  # too large for float16
    written = write(tmp_path, record, tail)
    found, again = read_tower_tail(tmp_path, board_bundle)
    assert found == written
    known = torch.rand(2, 49, READ)
    assert torch.allclose(again(known), tail(known), rtol=1e-2)


def test_every_symbol_of_a_group_that_arrived_counts() -> None:
    torch.manual_seed(0)
    tail, symbols = lively(Tail(len(GAINS))).eval(), random_symbols(1)
    whole = read_symbols(tail, symbols, [1], [64])
    assert whole.shape == (1, 49, READ)
    for levels, channels in (([0], [64]), ([1], [32])):
        assert not torch.allclose(read_symbols(tail, symbols, levels, channels), whole)


def change(folder: Path, **fields: object) -> None:
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest | fields))


def not_finite(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["scale"][3] = np.nan
    save_file(weights, folder / WEIGHTS)
    change(folder, weights=file_hash(folder / WEIGHTS))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "name a folder that `aiflow distil` wrote"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"{" * 5000), "is no manifest of a tail"),
        (lambda folder: (folder / MANIFEST).write_bytes(b" " * 70_000), "is larger than 65536 bytes"),
        (lambda folder: change(folder, format=2), "has format 2, this version reads 1"),
        (lambda folder: change(folder, bundle="0" * 16), "was made for bundle tiny 0{16}.*again with --bundle"),
        (lambda folder: change(folder, tokens=10**9), "is no manifest of a tail"),
        (lambda folder: change(folder, inner_width=4096, layers=16), "cannot be read.*distil again"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\0" * 100), "is not the file that"),
        (lambda folder: (folder / WEIGHTS).unlink(), "cannot be read"),
        (not_finite, "NaN or infinite values: distil again"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_with_what_to_do(
    record: Record,
    tail: TowerTail,
    board_bundle: Bundle,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    said: str,
) -> None:
    write(tmp_path, record, tail)
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=said):
        read_tower_tail(tmp_path, board_bundle)
