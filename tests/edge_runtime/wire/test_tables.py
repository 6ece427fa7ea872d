"""Tables: counted the same everywhere, and a damaged or impossible file is refused by name."""

import struct
import tracemalloc
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from edge_runtime.wire import TablesError
from edge_runtime.wire.tables import Tables, _integers, cost_bits, count_tables, entropy_bytes

Symbols = NDArray[np.int8]
uniform = np.full((1, 4, 1, 4), 1024, np.uint16)


@given(
    arrays(np.int8, (3, 4, 2, 2), elements=st.integers(-127, 127)),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 7, 126]),
)
def test_whatever_is_counted_every_table_sums_to_4096_and_allows_everything(
    symbols: Symbols, contexts: int, largest: int
):
    tables = count_tables([symbols], contexts=contexts, largest=largest)
    assert (tables.frequencies.sum(axis=-1) == 4096).all()
    assert tables.frequencies.min() >= 1
    assert tables.to_bytes() == count_tables([symbols.copy()], contexts=contexts, largest=largest).to_bytes()


def test_counted_frequencies_cost_hardly_more_than_the_real_probabilities(training: list[Symbols]):
    tables = count_tables(training, largest=3)
    for level, symbols in enumerate(training):
        ideal = 0.0
        for channel in range(8):
            values = np.clip(symbols[:, channel].astype(int), -4, 4)
            values[values == -4] = 4  # the escape, as in the tables
            counts = np.unique(values, return_counts=True)[1]
            ideal -= (counts * np.log2(counts / counts.sum())).sum() - 8 * (values == 4).sum()
        assert ideal <= cost_bits(symbols, tables, level).sum() < 1.003 * ideal


def test_no_single_count_would_save_anything_in_another_place():
    """The rule needs no logarithm and must still find what logarithms call the best, to 1e-4 bits a symbol."""
    p = np.random.default_rng(5).dirichlet(np.full(16, 0.3), size=50)
    for weights, f in zip(p, _integers(p).astype(float), strict=True):
        gain = weights * np.log2((f + 1) / f)
        loss = np.where(f > 1, weights * np.log2(f / np.maximum(f - 1, 0.5)), np.inf)
        assert gain.max() - loss.min() < 1e-4


def test_contexts_shorten_correlated_symbols(training: list[Symbols]):
    one, three = (count_tables(training, contexts=contexts, largest=3) for contexts in (1, 3))
    assert entropy_bytes(training[1], three, 1) < 0.99 * entropy_bytes(training[1], one, 1)


def test_a_channel_without_counts_takes_the_distribution_of_all(training: list[Symbols]):
    symbols = np.concatenate([training[0], np.zeros((200, 4, 3, 4), np.int8)], axis=1)
    alone = count_tables([symbols[:1]])
    many = count_tables([symbols])
    assert many.frequencies[0, 11].max() > 4050
    silent = alone.frequencies[0, 11, 0]
    assert silent.max() < 4050  # twelve zeros prove less than 2,400
    assert silent[6] > silent[5] > silent[3]  # -1, -2 and -4 as often as elsewhere, not alike


@pytest.mark.parametrize(
    ("symbols", "reason"),
    [
        ([], "want one"),
        ([np.zeros((4, 2, 2), np.int8)], "want one"),
        ([np.zeros((1, 4, 2, 2), np.int8), np.zeros((1, 4, 2, 3), np.int8)], "one geometry"),
        ([np.zeros((1, 4, 2, 2), np.int16)], "int8"),
        ([np.zeros((0, 4, 2, 2), np.int8)], "at least one frame"),
        ([np.full((1, 4, 2, 2), -128, np.int8)], "-127"),
        ([np.zeros((1, 4, 2, 2), np.int8)] * 9, "levels = 9"),
        ([np.zeros((1, 6, 2, 2), np.int8)], "6 channels"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_name(symbols: list[Symbols], reason: str):
    with pytest.raises(TablesError, match=reason):
        count_tables(symbols)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"frequencies": uniform.astype(np.int32)}, "int32"),
        ({"frequencies": uniform[0]}, r"\[4, 1, 4\]"),
        ({"frequencies": np.full((1, 4, 2, 4), 1024, np.uint16)}, "contexts = 2"),
        ({"frequencies": np.full((1, 4, 1, 5), 1024, np.uint16)}, "alphabet = 5"),
        ({"frequencies": uniform + np.uint16(1)}, "sum to 4096"),
        ({"frequencies": np.tile(np.array([0, 4094, 1, 1], np.uint16), (1, 4, 1, 1))}, ">= 1"),
        ({"height": 0}, "height = 0"),
        ({"width": 65}, "width = 65"),
        ({"groups": 5}, "groups = 5"),
        ({"groups": 3}, "4 channels"),
        ({"set_id": 1 << 16}, "table set id"),
    ],
)
def test_impossible_tables_are_refused_by_name(change: dict[str, object], reason: str):
    fine = {"frequencies": uniform.copy(), "height": 2, "width": 2, "groups": 4, "set_id": 0}
    Tables(**fine)  # type: ignore[arg-type]
    with pytest.raises(TablesError, match=reason):
        Tables(**fine | change)  # type: ignore[arg-type]


def test_tables_survive_their_file(tables: Tables):
    again = Tables.from_bytes(tables.to_bytes())
    assert again.to_bytes() == tables.to_bytes()
    assert np.array_equal(again.frequencies, tables.frequencies)
    assert (again.shape, again.groups, again.set_id, again.largest) == ((8, 3, 4), 4, 300, 3)


def test_tables_do_not_change_once_made(tables: Tables):
    with pytest.raises(ValueError, match="read-only"):
        tables.frequencies[0] = 1


def test_every_damaged_byte_and_every_cut_of_a_table_file_is_refused(tables: Tables):
    data = tables.to_bytes()
    for i in range(len(data)):
        with pytest.raises(TablesError):
            Tables.from_bytes(data[:i])
        with pytest.raises(TablesError):
            Tables.from_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
    with pytest.raises(TablesError, match="geometry"):
        Tables.from_bytes(data + b"\0")


def test_a_right_checksum_does_not_excuse_wrong_frequencies(tables: Tables):
    body = bytearray(tables.to_bytes()[:-4])
    body[18] ^= 1
    with pytest.raises(TablesError, match=r"\[0, 0, 0\] must have"):
        Tables.from_bytes(bytes(body) + struct.pack("<I", crc32(body)))


def test_a_file_that_lies_about_its_size_allocates_nothing():
    huge = struct.pack("<4s6B4H", b"AIFT", 1, 255, 255, 255, 4, 0, 65535, 64, 64, 0) + bytes(100)
    tracemalloc.start()
    with pytest.raises(TablesError, match="geometry"):
        Tables.from_bytes(huge)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000
