"""What a bitstream promises, and what becomes of bytes that are none."""

import math
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from edge_runtime.wire import BitstreamError
from edge_runtime.wire.bitstream import Header, decode, encode
from edge_runtime.wire.entropy import FLAT, rans_encode, steps_of
from edge_runtime.wire.tables import Tables, cost_bits, neighbour_signs

Symbols = NDArray[np.int8]
usual = st.integers(-2, 2)
any_symbols = arrays(np.int8, (8, 3, 4), elements=usual | st.integers(-127, 127), fill=st.just(0))


def moved(tables: Tables, table: tuple[int, int, int], set_id: int | None = None) -> Tables:
    """The same tables with one count of one table moved from its largest entry to the next one."""
    frequencies = tables.frequencies.copy()
    row = frequencies[table]
    most = int(row.argmax())
    row[most] -= 1
    row[most - 1] += 1
    return Tables(frequencies, tables.height, tables.width, tables.groups, tables.set_id if set_id is None else set_id)


def vouched(data: bytes, tables: Tables) -> bool:
    """Whether these bytes decode as a whole, verified message. Damage either is an error or looks like a cut."""
    try:
        return decode(data, tables).checked
    except BitstreamError:
        return False


@given(any_symbols, st.integers(0, 1), st.integers(1, 4))
def test_any_symbols_survive_at_every_level_and_group_count(tables: Tables, symbols: Symbols, level: int, groups: int):
    decoded = decode(encode(symbols, tables, level, groups), tables)
    assert np.array_equal(decoded.symbols[: 2 * groups], symbols[: 2 * groups])
    assert not decoded.symbols[2 * groups :].any()
    assert decoded.header == Header(level, groups, 300 & 63)
    assert (decoded.complete_channels, decoded.checked) == (groups * tables.channels // tables.groups, True)


@given(any_symbols, st.integers(0, 1))
def test_a_message_is_at_most_four_bytes_longer_than_header_and_ideal_code(
    tables: Tables, symbols: Symbols, level: int
):
    ideal = cost_bits(symbols, tables, level) / 8
    assert ideal < len(encode(symbols, tables, level)) <= 2 + math.ceil(ideal) + 4


@given(arrays(np.int8, (2, 3, 4), elements=st.integers(-128, 127)))
def test_contexts_are_the_sign_of_the_summed_neighbour_signs(symbols: Symbols):
    def sign(c: int, y: int, x: int) -> int:
        return 0 if x < 0 or y < 0 else int(symbols[c, y, x] > 0) - int(symbols[c, y, x] < 0)

    near = neighbour_signs(symbols)
    for c, y, x in np.ndindex(symbols.shape):
        total = sign(c, y, x - 1) + sign(c, y - 1, x)
        assert near[c, y, x] == (total > 0) - (total < 0)


def test_every_cut_keeps_its_complete_channels_and_says_that_nothing_vouches_for_them(tables: Tables, frames: Symbols):
    for symbols in frames:
        data = encode(symbols, tables, 1)
        before = 0
        for size in range(2, len(data)):
            decoded = decode(data[:size], tables)
            kept = decoded.complete_channels
            assert not decoded.checked
            assert np.array_equal(decoded.symbols[:kept], symbols[:kept])
            assert not decoded.symbols[kept:].any()
            assert kept >= before
            before = kept
        # Whoever cuts need not rewrite the header: an encoder that sends k groups stops within 4 bytes of where they
        # end.
        for groups in range(1, 5):
            assert decode(data[: len(encode(symbols, tables, 1, groups)) + 4], tables).complete_channels >= 2 * groups


def test_a_cut_header_is_an_error(tables: Tables):
    for data in (b"", b"\x10"):
        with pytest.raises(BitstreamError, match="header"):
            decode(data, tables)


def test_no_flipped_bit_goes_unnoticed(tables: Tables, frames: Symbols):
    for symbols in frames[:8]:
        data = encode(symbols, tables)
        for bit in range(8 * len(data)):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            assert not vouched(bytes(damaged), tables)


@given(st.binary(max_size=400), st.sampled_from([b"", b"\x10\xb3", b"\x12\xb0"]))
def test_any_bytes_decode_or_are_refused_by_name(tables: Tables, data: bytes, header: bytes):
    with suppress(BitstreamError):
        decoded = decode(header + data, tables)
        assert decoded.symbols.shape == tables.shape
        if decoded.checked:  # then the encoder wrote it: no two messages mean the same
            assert encode(decoded.symbols, tables, decoded.header.level, decoded.header.groups) == header + data


def test_a_message_longer_than_any_is_refused_before_it_is_decoded(tables: Tables):
    with pytest.raises(BitstreamError, match="exceeds 294"):
        decode(b"\x10\xb3" + bytes([255]) * 293, tables)


def test_bytes_left_over_are_refused(tables: Tables, frames: Symbols):
    for extra in (b"\0", b"\0\0", b"abcde"):
        with pytest.raises(BitstreamError, match="left over"):
            decode(encode(frames[4], tables) + extra, tables)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("00b3", "format"),
        ("20b3", "format"),
        ("11b3", "header has 4"),
        ("11b3000000010000", "no tables for that"),
        ("10b7", "table set"),
        ("14b3", "level 2"),
        ("10b30000ffff", "first state"),
    ],
)
def test_a_wrong_header_is_refused_with_its_reason(tables: Tables, header: str, reason: str):
    with pytest.raises(BitstreamError, match=reason):
        decode(bytes.fromhex(header), tables)


def test_more_groups_than_the_tables_have_are_refused(tables: Tables):
    halves = Tables(tables.frequencies.copy(), tables.height, tables.width, 2, tables.set_id)
    with pytest.raises(BitstreamError, match="4 groups"):
        decode(b"\x10\xb3", halves)


@pytest.mark.parametrize("value", [-128, -3, 0, 3])
def test_an_escape_that_no_encoder_writes_is_refused(tables: Tables, value: int):
    context = (tables.frequencies.shape[2] - 1) // 2
    escape, start = tables.frequencies[0, 0, context, -1], tables.starts[0, 0, context, -1]
    steps = steps_of([int(escape), FLAT], [int(start), FLAT * (value + 128)]).tolist()
    with pytest.raises(BitstreamError, match="unnecessary escape"):
        decode(b"\x10\xb3" + rans_encode(steps, 0), tables)


def test_other_tables_are_caught_even_with_the_same_id(tables: Tables, frames: Symbols):
    for symbols in frames:
        data = encode(symbols, tables)
        assert not vouched(data, moved(tables, (0, 3, 0)))
        with pytest.raises(BitstreamError, match="check"):  # no symbol of this message is coded with level 1
            decode(data, moved(tables, (1, 3, 0)))
    with pytest.raises(BitstreamError, match="table set 44, these are 45"):
        decode(data, moved(tables, (0, 3, 0), set_id=301))


def test_symbols_that_cannot_be_coded_are_refused_by_name(tables: Tables, frames: Symbols):
    low = frames[0].copy()
    low[0, 0, 0] = -128
    for symbols, level, groups, reason in (
        (low, 0, 4, "-128"),
        (frames[0].astype(np.int16), 0, 4, "int16"),
        (frames[0][:7], 0, 4, r"\[7, 3, 4\]"),
        (frames[0], 2, 4, "level 2"),
        (frames[0], -1, 4, "level -1"),
        (frames[0], 0, 0, "groups 0"),
        (frames[0], 0, 5, "groups 5"),
    ):
        with pytest.raises(BitstreamError, match=reason):
            encode(symbols, tables, level, groups)


def test_minus_128_in_a_group_that_is_not_sent_is_no_error(tables: Tables, frames: Symbols):
    symbols = frames[0].copy()
    symbols[7] = -128
    assert decode(encode(symbols, tables, 0, 3), tables).complete_channels == 6


def test_decoding_allocates_a_small_multiple_of_the_symbols_whatever_the_bytes(tables: Tables):
    random = np.random.default_rng(4)
    tables.codings(0)
    for data in [b"", bytes(280), b"\xff" * 280, *(random.bytes(280) for _ in range(50))]:
        tracemalloc.start()
        with suppress(BitstreamError):
            decode(b"\x10\xb3" + data, tables)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 30_000, data.hex()
