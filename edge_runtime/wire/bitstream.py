"""Symbols to bytes and back: a header, then the channel groups, entropy-coded; docs/protocol.md, section 5.

The shape comes from the tables and never from the message, so a message cannot decide how much is allocated. The bytes
are the same on every CPU, since no floating point is used. A truncated message decodes to its complete channels,
without a check.

A frame may be coded against an earlier one that both sides have, its reference. The header names it, and the check
covers its symbols: if the two sides have different ones, the message is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from edge_runtime.wire.entropy import FLAT_STEPS, rans_decode, rans_encode
from edge_runtime.wire.errors import BitstreamError, ReferenceLostError
from edge_runtime.wire.tables import Tables, earlier_contexts

FORMAT = 1
KEPT_FRAMES = 32  # of each board, by a server: twice as many as a board may have cameras
MAX_OVERHEAD = 6  # bytes of a bitstream besides the ideal code length in whole bytes: header, state, rounding


@dataclass(frozen=True, slots=True)
class Header:
    """The first bytes of a bitstream: two, or four if it names a reference."""

    level: int  # coarseness, 0..7, 0 = coarsest
    groups: int  # channel groups that follow, 1..4
    table_set: int  # low 6 bits of the tables' id, 0..63
    reference: int | None = None  # the last 16 bits of the id of the reference's request; None: coded alone

    def to_bytes(self) -> bytes:
        first = FORMAT << 4 | self.level << 1 | (self.reference is not None)
        name = b"" if self.reference is None else self.reference.to_bytes(2, "big")
        return bytes([first, self.table_set << 2 | self.groups - 1]) + name

    @classmethod
    def from_bytes(cls, data: bytes) -> "Header":
        """Reads the first two or four bytes only. Raises BitstreamError."""
        size = 4 if data[:1] and data[0] & 1 else 2
        if len(data) < size:
            raise BitstreamError(
                f"bitstream of {len(data)} bytes, but the header has {size}: was the message truncated?"
            )
        if data[0] >> 4 != FORMAT:
            raise BitstreamError(f"header {data[:2].hex()}, want format {FORMAT}: update the older side")
        reference = int.from_bytes(data[2:4], "big") if size == 4 else None
        return cls(data[0] >> 1 & 7, (data[1] & 3) + 1, data[1] >> 2, reference)


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """An earlier frame that the receiver has. The new one has the same level and groups."""

    name: int  # the last 16 bits of the id of its request
    symbols: NDArray[np.int8]  # [C, H, W], those of the groups that were sent


class Inter(NamedTuple):
    """What a receiver needs for frames that are coded against an earlier one."""

    tables: Tables  # with seven contexts
    find: Callable[[Header], NDArray[np.int8] | None]  # the symbols of the reference that a header names


@dataclass(frozen=True, slots=True)
class Decoded:
    symbols: NDArray[np.int8]  # [C, H, W]; channels that are not complete are zero
    header: Header
    complete_channels: int  # 0..C
    checked: bool  # False: the message was truncated, and a prefix has no check


def encode(
    symbols: NDArray[np.int8],
    tables: Tables,
    level: int = 0,
    groups: int | None = None,
    reference: Reference | None = None,
) -> bytes:
    """Codes symbols int8 [C, H, W], -127..127, with the tables of this level: the first `groups`, or all.

    At most 4 bytes longer than the header and `cost_bits` rounded up to bytes. With a reference, the tables are those
    with seven contexts. Raises BitstreamError for symbols, level or groups that the tables cannot code.
    """
    groups = tables.groups if groups is None else groups
    if symbols.dtype != np.int8 or symbols.shape != tables.shape:
        raise BitstreamError(
            f"symbols are {symbols.dtype} {[*symbols.shape]}, these tables code int8 {[*tables.shape]}"
        )
    if not (0 <= level < tables.levels and 1 <= groups <= tables.groups):
        raise BitstreamError(f"level {level}, groups {groups}: want 0..{tables.levels - 1} and 1..{tables.groups}")
    if tables.is_inter != (reference is not None):
        raise BitstreamError("a reference needs tables with seven contexts, and these need a reference")
    channels = tables.channels // tables.groups * groups
    sent, earlier = symbols[:channels], reference.symbols[:channels] if reference else None
    content = sent.tobytes()
    if b"\x80" in content:
        raise BitstreamError("symbol -128 cannot be coded, only -127..127: clip the latent before it is quantised")
    steps = tables.steps(level)[tables.entries(sent, 0, earlier).ravel()]  # level 0: entries within one level
    if np.abs(sent).max() > tables.largest:
        escaped = np.flatnonzero(np.abs(sent) > tables.largest)
        steps = np.insert(steps, escaped + 1, FLAT_STEPS[sent.ravel()[escaped].astype(np.int16) + 128])
    header = Header(level, groups, tables.set_id & 63, reference.name if reference else None).to_bytes()
    check = _check(tables, header, b"" if earlier is None else earlier.tobytes(), content)
    return header + rans_encode(steps.tolist(), check)


def decode(data: bytes, tables: Tables, inter: Inter | None = None) -> Decoded:
    """Decodes any bytes to symbols, or raises BitstreamError. The tables' shape bounds time and memory.

    The check verifies a complete message. A message that ends early gives its complete channels and `checked=False`.
    Damage can look like truncation, so a receiver that expects complete messages must refuse unchecked ones. Raises
    ReferenceLostError for any message with a reference that it cannot verify, truncated ones included.
    """
    header = Header.from_bytes(data)
    if header.table_set != tables.set_id & 63:
        raise BitstreamError(f"table set {header.table_set}, these are {tables.set_id & 63}: use the sender's bundle")
    if header.level >= tables.levels or header.groups > tables.groups:
        raise BitstreamError(
            f"level {header.level}, {header.groups} groups, tables have {tables.levels}, {tables.groups}"
        )
    channels = header.groups * (tables.channels // tables.groups)
    # A symbol takes at most two steps of 12 and 8 bits, each rounded up by less than 1/8 bit: less than 3 bytes.
    longest = len(header.to_bytes()) + 4 + 3 * channels * tables.height * tables.width
    if len(data) > longest:
        raise BitstreamError(f"bitstream of {len(data)} bytes, no message exceeds {longest}: is it a bitstream?")
    if header.reference is None:
        return _decode(data, header, tables)
    if inter is None:
        raise BitstreamError("the frame has a reference, but this bundle has no tables for that: send it alone")
    if (reference := inter.find(header)) is None:
        raise ReferenceLostError(f"the reference {header.reference:04x} is not here any more: send the frame alone")
    try:
        decoded = _decode(data, header, inter.tables, reference[:channels])
    except BitstreamError as error:  # the sender may mean another frame with this name
        raise ReferenceLostError(f"with the reference {header.reference:04x} that is here: {error}") from error
    if not decoded.checked:
        raise ReferenceLostError("a frame with a reference ends early, so its check is missing: send it alone")
    return decoded


def _decode(data: bytes, header: Header, tables: Tables, earlier: NDArray[np.int8] | None = None) -> Decoded:
    """The rest of a message behind its header. earlier: the reference's symbols in the channels that were sent."""
    begin, area = len(header.to_bytes()), tables.height * tables.width
    channels = tables.codings(header.level)[: header.groups * (tables.channels // tables.groups)]
    offsets = [[2] * area] * len(channels)
    if earlier is not None:
        offsets = (5 * earlier_contexts(earlier).reshape(-1, area) + 2).tolist()
    found, check = rans_decode(data[begin:], channels, tables.height, tables.width, tables.largest, offsets)
    covered = b"" if earlier is None else earlier.tobytes()
    if check is not None and check != _check(tables, data[:begin], covered, found):
        raise BitstreamError("the check does not match: the message was damaged, or other tables wrote it")
    symbols = np.zeros(tables.shape, np.int8)
    symbols.ravel()[: len(found)] = np.frombuffer(found, np.int8)
    return Decoded(symbols, header, len(found) // area, check is not None)


def _check(tables: Tables, header: bytes, earlier: bytes, symbols: bytes | bytearray) -> int:
    """Low 16 bits of the CRC-32 of tables, header, reference and symbols. It covers the tables to detect wrong ones."""
    return crc32(symbols, crc32(earlier, crc32(header, tables.crc))) & 0xFFFF
