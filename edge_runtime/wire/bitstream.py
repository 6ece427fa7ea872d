"""Symbols to bytes and back: a 2-byte header, then the channel groups, entropy-coded; docs/protocol.md, section 5.

The shape comes from the tables and never from the message, so a message cannot decide how much is allocated. The bytes
are the same on every CPU, since no floating point is used. A truncated message decodes to its complete channels,
without a check.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from edge_runtime.wire.entropy import FLAT, rans_decode, rans_encode
from edge_runtime.wire.errors import BitstreamError
from edge_runtime.wire.tables import Tables

FORMAT = 1
MAX_OVERHEAD = 6  # bytes of a bitstream besides the ideal code length in whole bytes: header, state, rounding


@dataclass(frozen=True, slots=True)
class Header:
    """The first two bytes of a bitstream."""

    level: int  # coarseness, 0..7, 0 = coarsest
    groups: int  # channel groups that follow, 1..4
    table_set: int  # low 6 bits of the tables' id, 0..63

    def to_bytes(self) -> bytes:
        return bytes([FORMAT << 4 | self.level << 1, self.table_set << 2 | self.groups - 1])

    @classmethod
    def from_bytes(cls, data: bytes) -> "Header":
        """Reads the first two bytes only. Raises BitstreamError."""
        if len(data) < 2:
            raise BitstreamError(f"bitstream of {len(data)} bytes, but the header has 2: was the message truncated?")
        if data[0] >> 4 != FORMAT or data[0] & 1:
            raise BitstreamError(f"header {data[:2].hex()}, want format {FORMAT}, a zero bit 0: update the older side")
        return cls(level=data[0] >> 1 & 7, groups=(data[1] & 3) + 1, table_set=data[1] >> 2)


@dataclass(frozen=True, slots=True)
class Decoded:
    symbols: NDArray[np.int8]  # [C, H, W]; channels that are not complete are zero
    header: Header
    complete_channels: int  # 0..C
    checked: bool  # False: the message was truncated, and a prefix has no check


def encode(symbols: NDArray[np.int8], tables: Tables, level: int = 0, groups: int | None = None) -> bytes:
    """Codes symbols int8 [C, H, W], -127..127, with the tables of this level: the first `groups`, or all.

    At most 4 bytes longer than the header and `cost_bits` rounded up to bytes. Raises BitstreamError for symbols, level
    or groups that the tables cannot code.
    """
    groups = tables.groups if groups is None else groups
    if symbols.dtype != np.int8 or symbols.shape != tables.shape:
        raise BitstreamError(
            f"symbols are {symbols.dtype} {[*symbols.shape]}, these tables code int8 {[*tables.shape]}"
        )
    if not (0 <= level < tables.levels and 1 <= groups <= tables.groups):
        raise BitstreamError(f"level {level}, groups {groups}: want 0..{tables.levels - 1} and 1..{tables.groups}")
    sent = symbols[: tables.channels // tables.groups * groups]
    if sent.min() == -128:
        raise BitstreamError("symbol -128 cannot be coded, only -127..127: clip the latent before it is quantised")
    entries = tables.entries(sent, level).ravel()
    frequencies, starts = tables.frequencies.ravel()[entries], tables.starts.ravel()[entries]
    escaped = np.flatnonzero(np.abs(sent.ravel()) > tables.largest)
    if escaped.size:
        frequencies = np.insert(frequencies, escaped + 1, FLAT)
        starts = np.insert(starts, escaped + 1, (sent.ravel()[escaped].astype(np.int16) + 128) * FLAT)
    header = Header(level, groups, tables.set_id & 63).to_bytes()
    return header + rans_encode(frequencies.tolist(), starts.tolist(), _check(tables, header, sent.tobytes()))


def decode(data: bytes, tables: Tables) -> Decoded:
    """Decodes any bytes to symbols, or raises BitstreamError. The tables' shape bounds time and memory.

    The check verifies a complete message. A message that ends early gives its complete channels and `checked=False`.
    Damage can look like truncation, so a receiver that expects complete messages must refuse unchecked ones.
    """
    header = Header.from_bytes(data)
    if header.table_set != tables.set_id & 63:
        raise BitstreamError(f"table set {header.table_set}, these are {tables.set_id & 63}: use the sender's bundle")
    if header.level >= tables.levels or header.groups > tables.groups:
        raise BitstreamError(
            f"level {header.level}, {header.groups} groups, tables have {tables.levels}, {tables.groups}"
        )
    group = tables.channels // tables.groups
    channel = tables.height * tables.width
    # A symbol takes at most two steps of 12 and 8 bits, each rounded up by less than 1/8 bit: less than 3 bytes.
    longest = 6 + 3 * header.groups * group * channel
    if len(data) > longest:
        raise BitstreamError(f"bitstream of {len(data)} bytes, no message exceeds {longest}: is it a bitstream?")
    by_channel = tables.codings(header.level)[: header.groups * group]
    found, check = rans_decode(data[2:], by_channel, tables.height, tables.width, tables.largest)
    complete = len(found) // channel
    if check is not None and check != _check(tables, data[:2], bytes(found)):
        raise BitstreamError("the check does not match: the message was damaged, or other tables wrote it")
    symbols = np.zeros(tables.shape, np.int8)
    whole = found[: complete * channel]
    symbols.ravel()[: len(whole)] = np.frombuffer(whole, np.int8)
    return Decoded(symbols, header, complete, check is not None)


def _check(tables: Tables, header: bytes, symbols: bytes) -> int:
    """Low 16 bits of the CRC-32 of tables, header and symbols. It covers the tables to detect wrong ones."""
    return crc32(symbols, crc32(header, tables.crc)) & 0xFFFF
