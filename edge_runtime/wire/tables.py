"""Static integer frequency tables, which both ends must share to code and decode bitstreams.

Probabilities that a device computes in floating point differ between CPUs, and then a learned codec decodes to garbage
(Ballé, Johnston & Minnen, "Integer networks for data compression with latent-variable models", ICLR 2019). These are
counted once, as integers, and shipped. An alphabet of M entries is the symbols -A..A, then the escape: M = 2 A + 2.
After an escape the symbol follows as one flat byte. The file is docs/protocol.md, section 6.

Frames of a static camera are coded against an earlier frame, with tables of their own: the context of a symbol is the
earlier frame's symbol at its place. Measured with the bundle of version 0.1.0 on other photos than those that were
counted, as bytes against those of each frame alone: noise and exposure drift 0.32, camera shake 0.50, a moving object
0.46. Tables that all channels share take 4 % more bytes, contexts with the neighbours' changes or signs 1 to 2 % fewer.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from edge_runtime.wire.entropy import ESCAPE, ESCAPE_BITS, PRECISION, TOTAL, Coding, steps_of
from edge_runtime.wire.errors import TablesError

MAGIC = b"AIFT"
VERSION = 1
# Magic, version, levels, contexts, alphabet, groups, zero, channels, height, width, set id.
_PREFIX = struct.Struct("<4s6B4H")
MAX_CHANNELS = 512  # with MAX_SIDE: a frame of at most 2 Mi symbols
MAX_SIDE = 64
NEAR = 3  # earlier symbols beyond it have its context
INTER = 2 * NEAR + 1  # contexts of tables that code against an earlier frame


@dataclass(frozen=True, eq=False)
class Tables:
    """Frequencies for every (level, channel, context), and the shape of the symbols that they code.

    With one context there is no context. With three, the context is the sign of the sum of the left and the upper
    neighbour's signs, see `neighbour_signs`. With seven, it is an earlier frame's symbol at the same place, clipped to
    -3..3; these tables code nothing without such a frame. Raises TablesError if a value is out of range.
    """

    # [levels 1..8, channels, contexts 1, 3 or 7, alphabet], each >= 1, and over the alphabet they sum to 4096
    frequencies: NDArray[np.uint16]
    height: int  # rows of a channel, 1..64
    width: int  # columns, 1..64
    groups: int  # nested channel groups of equal size, 1..4
    set_id: int  # identifies the tables, 0..65535; a bitstream contains the low 6 bits
    _steps: dict[int, NDArray[np.object_]] = field(default_factory=dict, init=False, repr=False)
    _codings: dict[int, list[list[Coding]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        f = self.frequencies
        if f.dtype != np.uint16 or f.ndim != 4:
            raise TablesError(f"frequencies {f.dtype} {[*f.shape]}, want uint16 [levels, channels, contexts, alphabet]")
        levels, channels, contexts, alphabet = f.shape
        for name, found, wanted in (
            ("levels", levels, range(1, 9)),
            ("channels", channels, range(1, MAX_CHANNELS + 1)),
            ("contexts", contexts, (1, 3, INTER)),
            ("alphabet", alphabet, range(4, 255, 2)),
            ("height", self.height, range(1, MAX_SIDE + 1)),
            ("width", self.width, range(1, MAX_SIDE + 1)),
            ("groups", self.groups, range(1, 5)),
            ("table set id", self.set_id, range(1 << 16)),
        ):
            if found not in wanted:
                raise TablesError(f"tables with {name} = {found}, want {wanted}: was the file made for this version?")
        if channels % self.groups:
            raise TablesError(f"{channels} channels do not divide into {self.groups} equal groups: change one of them")
        bad = (f.sum(axis=-1, dtype=np.int64) != TOTAL) | (f.min(axis=-1) < 1)
        if bad.any():
            where = np.argwhere(bad)[0].tolist()
            raise TablesError(f"table [level, channel, context] = {where} must have entries >= 1 that sum to {TOTAL}")
        f.flags.writeable = False  # the coders' tables and the CRC below are computed from it once

    @property
    def levels(self) -> int:
        return int(self.frequencies.shape[0])

    @property
    def channels(self) -> int:
        return int(self.frequencies.shape[1])

    @property
    def is_inter(self) -> bool:
        """Whether they code against an earlier frame."""
        return int(self.frequencies.shape[2]) == INTER

    @property
    def largest(self) -> int:
        """A: the largest magnitude that is coded without an escape."""
        return int(self.frequencies.shape[3]) // 2 - 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one frame's symbols."""
        return self.channels, self.height, self.width

    @cached_property
    def starts(self) -> NDArray[np.uint16]:
        """Exclusive prefix sums over the alphabet, in the shape of the frequencies."""
        return (np.cumsum(self.frequencies, axis=-1) - self.frequencies).astype(np.uint16)

    @cached_property
    def bits(self) -> NDArray[np.float64]:
        """Ideal code length of every entry, with the byte after an escape, in the shape of the frequencies."""
        bits = PRECISION - np.log2(self.frequencies.astype(np.float64))
        bits[..., -1] += ESCAPE_BITS
        return bits

    @cached_property
    def crc(self) -> int:
        """CRC-32 of the file without its last four bytes, which contain it. Every bitstream's check starts from it."""
        return crc32(self._body())

    def steps(self, level: int) -> NDArray[np.object_]:
        """For the encoder: the step of every entry of a level, built when it is first used."""
        if level not in self._steps:
            self._steps[level] = steps_of(self.frequencies[level].ravel().tolist(), self.starts[level].ravel().tolist())
        return self._steps[level]

    def codings(self, level: int) -> list[list[Coding]]:
        """For the decoder, per channel: its table by offset + sign of the left neighbour + sign of the upper neighbour.

        The offset is 2. With seven contexts it is 5 k + 2, with the context k of the earlier symbol. The tables are
        built when a level is first used, and take up to a hundred times its bytes in the file: 0.4 MB for 64 channels
        with 3 contexts. A board that only encodes never needs them.
        """
        if level not in self._codings:
            zero, as_byte = self.largest, [s & 0xFF for s in range(-self.largest, self.largest + 1)] + [ESCAPE]
            rests = TOTAL - self.frequencies[level].astype(int)
            channels = []
            for rows in zip(rests.tolist(), self.starts[level].tolist(), strict=True):
                made: list[Coding] = [
                    (c[zero], c[zero + 1], r[zero], tuple(c[1:]), tuple(zip(as_byte, r, c, strict=True)))
                    for r, c in zip(*rows, strict=True)
                ]
                triples = [made] if len(made) == 3 else [[table] * 3 for table in made]
                channels.append([t[i] for t in triples for i in (0, 0, 1, 2, 2)])
            self._codings[level] = channels
        return self._codings[level]

    def _body(self) -> bytes:
        levels, channels, contexts, alphabet = self.frequencies.shape
        geometry = channels, self.height, self.width, self.set_id
        prefix = _PREFIX.pack(MAGIC, VERSION, levels, contexts, alphabet, self.groups, 0, *geometry)
        return prefix + self.frequencies.astype("<u2").tobytes()

    def to_bytes(self) -> bytes:
        """The table file; the same tables give the same bytes everywhere."""
        return self._body() + struct.pack("<I", self.crc)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Tables":
        """Reads a table file. Raises TablesError. Allocates a small multiple of the file's size at most."""
        if len(data) < _PREFIX.size or data[:4] != MAGIC:
            raise TablesError(f"{len(data)} bytes that begin with {data[:4].hex()}, want a table file ({MAGIC.hex()})")
        _, version, levels, contexts, alphabet, groups, zero, *geometry = _PREFIX.unpack_from(data)
        channels, height, width, set_id = geometry
        if version != VERSION or zero:
            raise TablesError(f"table file of version {version}.{zero}, this side reads {VERSION}.0: update one")
        shape = levels, channels, contexts, alphabet
        wanted = _PREFIX.size + 2 * levels * channels * contexts * alphabet + 4
        if len(data) != wanted:
            raise TablesError(f"table file of {len(data)} bytes, its own geometry wants {wanted}: copy it again")
        if int.from_bytes(data[-4:], "little") != crc32(data[:-4]):
            raise TablesError("table file with a wrong checksum: it was damaged, copy it again")
        frequencies = np.frombuffer(data, "<u2", offset=_PREFIX.size, count=(wanted - 4 - _PREFIX.size) // 2)
        return cls(frequencies.astype(np.uint16).reshape(shape), height, width, groups, set_id)

    def entries(
        self, symbols: NDArray[np.int8], level: int, earlier: NDArray[np.int8] | None = None
    ) -> NDArray[np.intp]:
        """The entry of each symbol: an index into the flattened frequencies, for symbols int8 [..., c, H, W].

        The first c <= C channels may be given alone. Symbols beyond A have the escape of their table as entry.
        earlier: the earlier frame's symbols, the same shape, for tables that code against one.
        """
        assert self.is_inter == (earlier is not None)
        _, channels, contexts, alphabet = self.frequencies.shape
        # As unsigned numbers, symbols below -A are large too. The escape is the last entry.
        unsigned = (symbols.astype(np.int16) + self.largest).view(np.uint16)
        within = np.minimum(unsigned, alphabet - 1).view(np.int16)  # its table
        if contexts > 1:
            context = neighbour_signs(symbols) + 1 if earlier is None else earlier_contexts(earlier)
            within += np.multiply(context, alphabet, dtype=np.int16)
        first = (level * channels + np.arange(symbols.shape[-3])) * (contexts * alphabet)
        entries: NDArray[np.intp] = first[:, None, None] + within
        return entries


def neighbour_signs(symbols: NDArray[np.int8]) -> NDArray[np.int8]:
    """Sign of (left neighbour's sign + upper neighbour's sign), outside 0: int8 [..., H, W] to -1, 0, 1 likewise.

    Both neighbours are in the same channel and come first in raster order, so a decoder knows them. In a linear latent,
    neighbours correlate with their signs, so signs predict better than magnitudes.
    """
    *frames, height, width = symbols.shape
    signs = np.zeros((*frames, height + 1, width + 1), np.int8)  # with a row above and a column on the left
    np.sign(symbols, out=signs[..., 1:, 1:])
    near: NDArray[np.int8] = signs[..., 1:, :-1] + signs[..., :-1, 1:]
    return np.sign(near)


def earlier_contexts(earlier: NDArray[np.int8]) -> NDArray[np.int8]:
    """The context of each symbol of an earlier frame: int8 of any shape to 0..6 likewise."""
    contexts: NDArray[np.int8] = earlier.clip(-NEAR, NEAR) + np.int8(NEAR)
    return contexts


def cost_bits(
    symbols: NDArray[np.int8], tables: Tables, level: int = 0, earlier: NDArray[np.int8] | None = None
) -> NDArray[np.float64]:
    """Sum of -log2 q per frame, with escapes: symbols int8 [..., c, H, W] to bits float64 [...].

    c may be the channels of the first groups only. A bitstream is at most 4 bytes longer than header and this in whole
    bytes.
    """
    return np.asarray(tables.bits.ravel()[tables.entries(symbols, level, earlier)].sum(axis=(-3, -2, -1)))


def entropy_bytes(symbols: NDArray[np.int8], tables: Tables, level: int = 0) -> float:
    """Mean ideal bytes of a frame under these tables; symbols int8 [N, c, H, W]. No header, no coder overhead."""
    return float(cost_bits(symbols, tables, level).mean()) / 8


def count_tables(
    symbols: Sequence[NDArray[np.int8]], *, groups: int = 4, contexts: int = 1, largest: int = 7, set_id: int = 0
) -> Tables:
    """Counts tables on symbols int8 [N, C, H, W], one array per level, coarsest first. 500 photos are enough.

    Each context is smoothed towards its channel (weight 30 symbols), each channel towards all channels (weight 20).
    Only integer sums and single float64 operations are used, so every machine gets the same bytes. Raises
    TablesError.
    """
    if not symbols or {a.shape[1:] for a in symbols} != {symbols[0].shape[1:]} or symbols[0].ndim != 4:
        raise TablesError(f"symbols are {[a.shape for a in symbols]}, want one [N, C, H, W] per level, of one geometry")
    if any(a.dtype != np.int8 or not a.size or a.min() == -128 for a in symbols):
        raise TablesError("symbols must be int8 -127 to 127, at least one frame per level: use a smaller gain")
    _, channels, height, width = symbols[0].shape
    shape = len(symbols), channels, contexts, 2 * largest + 2
    # Any valid tables will do here: only their geometry is used, to find the entry of every symbol.
    blank = Tables(np.broadcast_to(_integers(np.ones(shape[3:])), shape).copy(), height, width, groups, set_id)
    counts = np.zeros(shape, np.int64)
    for level, frames in enumerate(symbols):
        counts += np.bincount(blank.entries(frames, level).ravel(), minlength=counts.size).reshape(shape)
    everywhere = counts.sum(axis=(1, 2), keepdims=True) + 1
    channel = _smooth(counts.sum(axis=2, keepdims=True), everywhere / everywhere.sum(axis=-1, keepdims=True), 20)
    return Tables(_integers(_smooth(counts, channel, 30) if contexts > 1 else channel), height, width, groups, set_id)


def count_inter_tables(pairs: Sequence[tuple[NDArray[np.int8], NDArray[np.int8]]], tables: Tables) -> Tables:
    """Counts tables that code a frame against an earlier one, for the same latent as `tables`.

    pairs: per level, coarsest first, an earlier and a later frame each: symbols int8 [N, C, H, W]. Each (channel,
    context) is smoothed towards its context in all channels (weight 30 symbols), and that towards the symbol of the
    earlier frame (weight 1), since contexts of large symbols are rare. Raises TablesError.
    """
    if len(pairs) != tables.levels or any(a.shape != b.shape or a.shape[1:] != tables.shape for a, b in pairs):
        raise TablesError(f"want two arrays [N, {tables.shape}] for each of {tables.levels} levels, of one length")
    alphabet, largest = tables.frequencies.shape[3], tables.largest
    shape = tables.levels, tables.channels, INTER, alphabet
    blank = Tables(
        np.broadcast_to(_integers(np.ones(alphabet)), shape).copy(),
        tables.height,
        tables.width,
        tables.groups,
        tables.set_id,
    )
    counts = np.zeros(shape, np.int64)
    for level, (earlier, later) in enumerate(pairs):
        counts += np.bincount(blank.entries(later, level, earlier).ravel(), minlength=counts.size).reshape(shape)
    same = np.full((INTER, alphabet), 1 / alphabet)
    same[np.arange(INTER), (np.arange(INTER) - NEAR).clip(-largest, largest) + largest] = 1.0
    everywhere = counts.sum(axis=1, keepdims=True) + same / same.sum(axis=-1, keepdims=True)
    frequencies = _integers(_smooth(counts, everywhere / everywhere.sum(axis=-1, keepdims=True), 30))
    return Tables(frequencies, tables.height, tables.width, tables.groups, tables.set_id)


def _smooth(counts: NDArray[np.int64], parent: NDArray[np.float64], weight: int) -> NDArray[np.float64]:
    smoothed: NDArray[np.float64] = (counts + weight * parent) / (counts.sum(axis=-1, keepdims=True) + weight)
    return smoothed


def _integers(p: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Weights [..., M] > 0 to frequencies >= 1 that sum to 4096: round down, then move counts where they matter most.

    One more count for a frequency f saves p ln((f + 1) / f), near p / (f + 1/2): the Sainte-Laguë rule, which needs no
    logarithm (they differ between C libraries). Ties go to the lowest index.
    """
    shape: Any = p.shape
    p = (p / p.sum(axis=-1, keepdims=True)).reshape(-1, shape[-1])
    f = np.maximum(np.floor(TOTAL * p), 1)
    while (missing := TOTAL - f.sum(axis=-1)).any():
        more, less = np.flatnonzero(missing > 0), np.flatnonzero(missing < 0)
        f[more, np.argmax(p[more] / (f[more] + 0.5), axis=-1)] += 1
        f[less, np.argmin(np.where(f[less] > 1, p[less] / (f[less] - 0.5), np.inf), axis=-1)] -= 1
    integers: NDArray[np.uint16] = f.astype(np.uint16).reshape(shape)
    return integers
