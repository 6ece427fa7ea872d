"""Frames that are coded against an earlier one: what they cost, and that a wrong reference never gives symbols."""

import math
from contextlib import suppress
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from edge_runtime.wire import BitstreamError, ReferenceLostError, TablesError
from edge_runtime.wire.bitstream import Header, Inter, Reference, decode, encode
from edge_runtime.wire.tables import Tables, cost_bits, count_inter_tables, count_tables
from tests.edge_runtime.wire.conftest import later, peaked

Symbols = NDArray[np.int8]
usual = st.integers(-2, 2)
any_symbols = arrays(np.int8, (8, 3, 4), elements=usual | st.integers(-127, 127), fill=st.just(0))
NAME = 0xBEEF


def read(data: bytes, inter_tables: Tables, earlier: Symbols | None) -> Symbols:
    """The symbols that a server with this reference reads; only verified ones."""
    intra = count_tables([peaked(4, 1.0, 1)] * inter_tables.levels, largest=3, set_id=inter_tables.set_id)
    decoded = decode(data, intra, Inter(inter_tables, lambda header: earlier))
    assert decoded.checked
    return decoded.symbols


@given(any_symbols, any_symbols, st.integers(0, 1), st.integers(1, 4), st.integers(0, 0xFFFF))
def test_any_symbols_survive_against_any_reference(
    inter_tables: Tables, earlier: Symbols, symbols: Symbols, level: int, groups: int, name: int
):
    data = encode(symbols, inter_tables, level, groups, Reference(name, earlier))
    asked: list[Header] = []
    decoded = decode(data, inter_tables, Inter(inter_tables, lambda header: asked.append(header) or earlier))
    assert np.array_equal(decoded.symbols[: 2 * groups], symbols[: 2 * groups])
    assert not decoded.symbols[2 * groups :].any()
    assert asked == [decoded.header] == [Header(level, groups, 300 & 63, name)]
    ideal = cost_bits(symbols[: 2 * groups], inter_tables, level, earlier[: 2 * groups]) / 8
    assert ideal < len(data) <= 4 + math.ceil(ideal) + 4


def test_a_still_scene_costs_less_than_half(tables: Tables, inter_tables: Tables):
    frames = peaked(20, 1.0, 7)
    alone = sum(len(encode(symbols, tables)) for symbols in frames)
    against = sum(
        len(encode(symbols, inter_tables, reference=Reference(NAME, earlier)))
        for earlier, symbols in zip(frames, later(frames, 8), strict=True)
    )
    assert against < 0.6 * alone


def test_another_reference_gives_no_symbols(inter_tables: Tables, frames: Symbols):
    """That of another board, an earlier run or another frame: even one symbol in it is noticed."""
    for earlier, symbols in zip(frames, later(frames, 5), strict=True):
        data = encode(symbols, inter_tables, reference=Reference(NAME, earlier))
        assert np.array_equal(read(data, inter_tables, earlier), symbols)
        for place in ((0, 0, 0), (3, 1, 2), (7, 2, 3)):
            other = earlier.copy()
            other[place] += 1 if other[place] < 127 else -1
            with pytest.raises(BitstreamError):
                read(data, inter_tables, other)


def test_a_reference_that_is_gone_is_named(inter_tables: Tables, frames: Symbols):
    data = encode(frames[5], inter_tables, reference=Reference(NAME, frames[4]))
    with pytest.raises(ReferenceLostError, match="reference beef is not here"):
        read(data, inter_tables, None)
    with pytest.raises(BitstreamError, match="no tables for that"):
        decode(data, inter_tables)


def test_no_part_of_a_message_and_no_flipped_bit_gives_symbols(inter_tables: Tables, frames: Symbols):
    for earlier, symbols in zip(frames[:8], later(frames, 6), strict=False):
        data = encode(symbols, inter_tables, reference=Reference(NAME, earlier))
        damaged = [data[:size] for size in range(len(data))] + [data + b"\0", data + b"\0\0"]
        for byte, bit in product(range(len(data)), range(8)):
            flipped = bytearray(data)
            flipped[byte] ^= 1 << bit
            damaged.append(bytes(flipped))
        for each in damaged:
            with suppress(BitstreamError):
                decoded = decode(each, inter_tables, Inter(inter_tables, lambda _, earlier=earlier: earlier))
                # Without bit 0 of byte 0 it is no inter frame; whoever has tables for both finds the wrong check.
                assert not decoded.checked


@given(st.binary(max_size=400), st.sampled_from([b"", b"\x11\xb3\xbe\xef", b"\x13\xb0\xbe\xef"]))
def test_any_bytes_decode_or_are_refused_by_name(inter_tables: Tables, data: bytes, header: bytes):
    earlier = peaked(1, 1.0, 9)[0]
    with suppress(BitstreamError):
        decoded = decode(header + data, inter_tables, Inter(inter_tables, lambda _: earlier))
        if decoded.checked and decoded.header.reference is not None:
            again = Reference(decoded.header.reference, earlier)
            level, groups = decoded.header.level, decoded.header.groups
            assert encode(decoded.symbols, inter_tables, level, groups, again) == header + data


def test_tables_and_reference_belong_together(tables: Tables, inter_tables: Tables, frames: Symbols):
    for which, reference in ((tables, Reference(NAME, frames[0])), (inter_tables, None)):
        with pytest.raises(BitstreamError, match="seven contexts"):
            encode(frames[1], which, reference=reference)


def test_counting_twice_gives_the_same_file_and_rare_contexts_expect_what_was_there(training: list[Symbols]):
    tables = count_tables(training, contexts=3, largest=3, set_id=300)
    pairs = [(frames, later(frames, 4)) for frames in training]
    counted = count_inter_tables(pairs, tables)
    assert counted.to_bytes() == count_inter_tables(pairs, tables).to_bytes()
    assert Tables.from_bytes(counted.to_bytes()).frequencies.shape == (2, 8, 7, 8)
    zeros = np.zeros((1, 8, 3, 4), np.int8)
    empty = count_inter_tables([(zeros, zeros)] * 2, tables)
    assert empty.frequencies[0, 0].argmax(axis=1).tolist() == [*range(7)]
    with pytest.raises(TablesError, match="for each of 2 levels"):
        count_inter_tables(pairs[:1], tables)
