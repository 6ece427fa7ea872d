"""A bundle: a directory with every file of one model family, and a manifest with the hash of each file.

The id of a bundle is the hash of its manifest, so two sides that name the same id hold the same files. This module
checks files before they are used; it knows nothing of networks or runtimes. A bundle may come from a stranger: every
number of the manifest has a bound, and no file is read beyond the size that the manifest states.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_runtime.bounded_file import read_bounded
from edge_runtime.errors import ConfigError
from edge_runtime.inference.draft_calibration import MAX_POINTS, Calibration
from edge_runtime.wire import TablesError
from edge_runtime.wire.envelope import MAX_TOKEN, MAX_TOKENS, Share
from edge_runtime.wire.tables import MAX_CHANNELS, MAX_SIDE, Tables

SCHEMA = 1
MANIFEST = "manifest.json"
TABLES, INTER_TABLES, VOCABULARY = "tables.bin", "inter_tables.bin", "vocabulary.txt"
DRAFT_LABELS = "draft_labels.bin"  # what each label adds to the draft decoder's first state: float16, little-endian
SERVER_SUFFIX = ".safetensors"  # of PyTorch's weights: the server's part of a bundle, which a board may lack
MAX_MANIFEST_BYTES = 256 * 1024  # the shipped one has 4 KB
MAX_TABLES_BYTES = 8 << 20  # the shipped ones have 6 KB
MAX_DRAFT_LABELS_BYTES = 32 << 20  # for the most classes; the shipped ones have 512 KB
MAX_VOCABULARY_BYTES = 16 << 20  # for the largest vocabulary, 16 bytes per word
MAX_WORD = 128  # characters
CHUNK = 1 << 20  # bytes of a file in memory at once

TierName = Annotated[str, Meta(pattern=r"^(edge|cloud)\Z")]
AnyTierName = Annotated[str, Meta(pattern=r"^(device|edge|cloud)\Z")]
FileName = Annotated[str, Meta(min_length=1, max_length=128)]
Label = Annotated[str, Meta(min_length=1, max_length=64)]  # as in a reply's scores
Term = Annotated[str, Meta(max_length=1024)]
Factor = Annotated[float, Meta(ge=1e-3, le=1e3)]
BundleName = Annotated[str, Meta(pattern=r"^[\w.-]{1,64}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]  # in hex


class BundleError(ConfigError):
    """A bundle is missing, incomplete, altered, or its manifest is outside its bounds."""


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: Sha256
    bytes: Annotated[int, Meta(ge=0, le=1 << 36)]


class LatentRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is coded: symbols int8 [channels, height, width] in nested groups of channels, at one of several levels."""

    channels: Annotated[int, Meta(ge=1, le=MAX_CHANNELS)]
    height: Annotated[int, Meta(ge=1, le=MAX_SIDE)]
    width: Annotated[int, Meta(ge=1, le=MAX_SIDE)]
    groups: Annotated[int, Meta(ge=1, le=4)]
    # Symbols per unit of the latent, one per level, coarsest first.
    gains: Annotated[tuple[Factor, ...], Meta(min_length=1, max_length=8)]
    # Units of the latent per unit of the head's output: one per channel, so that each fills its 8 bits, or one for all.
    scales: Annotated[tuple[Factor, ...], Meta(min_length=1, max_length=MAX_CHANNELS)] = (1.0,)
    # Mean bytes of a photo's bitstream at each level, on the dev split; none: not measured.
    level_bytes: Annotated[tuple[Annotated[float, Meta(ge=1, le=1e6)], ...], Meta(max_length=8)] = ()
    default_level: Annotated[int, Meta(ge=0, le=7)] = 0  # that boards send if nothing asks for less or more

    def __post_init__(self) -> None:
        """Checks what no single field can say; msgspec reports a ValueError with the field's path."""
        levels = len(self.gains)
        if list(self.gains) != sorted(self.gains) or list(self.level_bytes) != sorted(self.level_bytes):
            raise BundleError("latent: gains and level_bytes must rise from level to level, the coarsest first")
        if len(self.level_bytes) not in (0, levels) or self.default_level >= levels:
            raise BundleError(f"latent: {levels} gains want as many level_bytes and a default_level below {levels}")
        if len(self.scales) not in (1, self.channels):
            raise BundleError(f"latent: {len(self.scales)} scales, want 1 or one for each of {self.channels} channels")


class TargetRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The text decoder of one tier: the fields of models.family.DecoderShape, and the file of its weights."""

    file: FileName
    width: Annotated[int, Meta(ge=1, le=16384)]
    heads: Annotated[int, Meta(ge=1, le=256)]
    encoder_layers: Annotated[int, Meta(ge=0, le=256)]
    decoder_layers: Annotated[int, Meta(ge=1, le=256)]
    label_words: Annotated[int, Meta(ge=0, le=64)] = 0

    @property
    def min_parameters(self) -> int:
        """What its layers have at least: the four projections of an attention, width x width each."""
        return 4 * self.width**2 * (self.encoder_layers + self.decoder_layers)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle holds, and its measured quality."""

    schema: Annotated[int, Meta(ge=SCHEMA, le=SCHEMA)]
    name: BundleName
    files: Annotated[dict[FileName, FileRecord], Meta(max_length=256)]
    pixels: Annotated[int, Meta(ge=32, le=1024)]  # height and width of the head's input: the whole frame, squashed
    latent: LatentRecord
    vocabulary: Annotated[int, Meta(ge=4, le=MAX_TOKEN + 1)]  # tokens
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]  # of a text, its end token included
    targets: Annotated[dict[TierName, TargetRecord], Meta(max_length=2)]
    tail: FileName  # the tail that all targets share
    classes: Annotated[tuple[Label, ...], Meta(max_length=65536)]  # of the classifier; none: no labels
    licences: Annotated[dict[Term, Term], Meta(max_length=64)]  # of weights and of what they were trained on
    training_commit: Annotated[str, Meta(max_length=64)]  # of the recipe that made it
    quality: Annotated[dict[Label, Annotated[float, Meta(ge=-1e9, le=1e9)]], Meta(max_length=256)]  # on the dev split
    # From a draft's confidence to its quality relative to the cloud's text; none: each draft is verified.
    draft_calibration: Annotated[tuple[tuple[Share, Share], ...], Meta(max_length=MAX_POINTS)] = ()
    # By who wrote a text: it is called unsure if its confidence is less. Without an entry, no text is.
    unsure_below: Annotated[dict[AnyTierName, Share], Meta(max_length=3)] = {}
    label_temperature: Annotated[float, Meta(ge=0.01, le=100)] = 1.0  # of the classifier: its logits are divided by it
    class_ids: Annotated[tuple[Label, ...], Meta(max_length=65536)] = ()  # WordNet ids of the classes, if they have any

    def __post_init__(self) -> None:
        """Checks what no single field can say; msgspec reports a ValueError with the field's path."""
        Calibration(self.draft_calibration)
        if len(self.class_ids) not in (0, len(self.classes)):
            raise BundleError(f"class_ids has {len(self.class_ids)} entries, classes {len(self.classes)}: want as many")
        for name in self.files:
            if not re.fullmatch(r"[\w-][\w.-]*", name):
                raise BundleError(f"files has the name {name!r}: files lie in the bundle's own directory")
        for tier, target in self.targets.items():
            if target.width % target.heads:
                raise BundleError(f"targets.{tier}: width {target.width} does not divide into {target.heads} heads")
            file = self.files.get(target.file)
            if file and target.min_parameters > file.bytes:  # a parameter has a byte at least
                raise BundleError(
                    f"targets.{tier}: these layers have {target.min_parameters} parameters or more, too many for the "
                    f"{file.bytes} bytes of {target.file}"
                )

    @property
    def class_names(self) -> dict[str, str]:
        """The names of the classes by their ids; empty if they have none."""
        return dict(zip(self.class_ids, self.classes, strict=False))


class _Versioned(msgspec.Struct):
    """What the manifest of every schema has."""

    schema: int


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Its path is resolved once, so that a link that moves to another version cannot mix two."""

    path: Path
    manifest: Manifest
    id: bytes  # first 8 bytes of the manifest's SHA-256

    def file(self, name: str) -> Path:
        """The path of a file after a check of its size and hash. Raises BundleError."""
        record = self.manifest.files.get(name)
        if record is None:
            raise BundleError(
                f"bundle {self.manifest.name} has no file {name}: it has {', '.join(self.manifest.files)}"
            )
        path = self.path / name
        if not path.is_file():
            raise self._incomplete(of_server=name.endswith(SERVER_SUFFIX))
        try:
            is_same = path.stat().st_size == record.bytes and file_hash(path, record.bytes) == record.sha256
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}: copy the bundle again") from error
        if not is_same:
            raise BundleError(f"{path} is not the file that the manifest names (size or SHA-256): copy it again")
        return path

    def read(self, name: str, max_bytes: int) -> bytes:
        """The content of a small file. Raises BundleError."""
        path = self.file(name)
        if self.manifest.files[name].bytes > max_bytes:
            raise BundleError(f"{path} is larger than {max_bytes} bytes: it cannot be the file that its name says")
        return path.read_bytes()

    def check(self, for_server: bool) -> str:
        """Compares each file with its hash. Returns what was found, for a person. Raises BundleError.

        for_server: whose part must be there; the other's may be missing.
        """
        left_out = self._missing(of_server=not for_server)
        names = [name for name in self.manifest.files if name not in left_out]
        for name in names:
            self.file(name)
        _ = self.tables, self.words  # their content too
        part = f", the {'server' if for_server else 'board'}'s part: without {', '.join(left_out)}" if left_out else ""
        return f"{self.manifest.name}, id {self.id.hex()}, {len(names)} files match{part}"

    def _missing(self, of_server: bool) -> list[str]:
        """The files of the server's or of the board's part that are not there."""
        names = (name for name in self.manifest.files if name.endswith(SERVER_SUFFIX) == of_server)
        return [name for name in names if not (self.path / name).is_file()]

    def _incomplete(self, of_server: bool) -> BundleError:
        advice = "copy the whole bundle again"
        if of_server:
            wheel = "aiflow_edge_server_models-*.whl"
            advice = f"a server needs its part of the bundle: pip install {wheel} of the same release, or {advice}"
        return BundleError(f"{self.path} lacks {', '.join(self._missing(of_server))}: {advice}")

    @cached_property
    def tables(self) -> Tables:
        """The entropy coder's tables. Raises BundleError."""
        tables, latent = self._tables(TABLES), self.manifest.latent
        found = (tables.levels, *tables.shape, tables.groups)
        wanted = (len(latent.gains), latent.channels, latent.height, latent.width, latent.groups)
        if found != wanted:
            names = "levels, channels, height, width and groups"
            raise BundleError(f"{self.path}: tables.bin has {found} {names}, the manifest {wanted}: build it again")
        if tables.is_inter:
            raise BundleError(f"{self.path}: tables.bin has the seven contexts of {INTER_TABLES}: build it again")
        return tables

    @cached_property
    def inter_tables(self) -> Tables | None:
        """Those that code a frame against an earlier one. None: the bundle has none. Raises BundleError."""
        if INTER_TABLES not in self.manifest.files:
            return None
        tables, alone = self._tables(INTER_TABLES), self.tables
        found, wanted = ((t.levels, *t.shape, t.groups, t.set_id) for t in (tables, alone))
        if found != wanted or not tables.is_inter:
            raise BundleError(f"{self.path}: {INTER_TABLES} does not fit tables.bin: build the bundle again")
        return tables

    def _tables(self, name: str) -> Tables:
        try:
            return Tables.from_bytes(self.read(name, MAX_TABLES_BYTES))
        except TablesError as error:
            raise BundleError(f"{self.path / name}: {error}") from error

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The vocabulary: the word of each token id. Raises BundleError."""
        try:
            words = tuple(self.read(VOCABULARY, MAX_VOCABULARY_BYTES).decode().splitlines())
        except UnicodeDecodeError as error:
            raise BundleError(f"{self.path / VOCABULARY} is not UTF-8: build the bundle again") from error
        if len(words) != self.manifest.vocabulary:
            raise BundleError(f"vocabulary.txt has {len(words)} words, the manifest says {self.manifest.vocabulary}")
        if (longest := max(map(len, words))) > MAX_WORD:
            raise BundleError(f"vocabulary.txt has a word of {longest} characters, want at most {MAX_WORD}")
        return words

    def text(self, tokens: list[int]) -> str:
        """Token ids to a text; see detokenise."""
        return detokenise(tokens, self.words)


PAD, BOS, EOS, UNKNOWN = range(4)  # the first words of every vocabulary


def detokenise(tokens: list[int], words: tuple[str, ...]) -> str:
    """The words up to the end token, joined by spaces. Special tokens and ids without a word are left out."""
    kept = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
    return " ".join(words[token] for token in kept if UNKNOWN < token < len(words))


def file_hash(path: Path, max_bytes: int = 1 << 62) -> str:
    """SHA-256 of a file, of at most its first max_bytes + 1 bytes, in hex; in memory is one chunk at a time."""
    digest, left = hashlib.sha256(), max_bytes + 1
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def open_bundle(path: Path) -> Bundle:
    """Reads and checks the manifest; each file is checked when it is asked for. Raises BundleError."""
    path = path.resolve()
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise BundleError(f"{path} holds no {MANIFEST}: name the directory of a bundle, such as models/zoo/<bundle>")
    try:
        data = read_bounded(manifest_path, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise BundleError(f"{manifest_path} cannot be read: {error.strerror}") from error
    return Bundle(path, decode_manifest(data, manifest_path), hashlib.sha256(data).digest()[:8])


def decode_manifest(data: bytes, path: Path) -> Manifest:
    """path: where it is from, for errors. Raises BundleError."""
    try:
        schema = msgspec.json.decode(data, type=_Versioned).schema
        if schema != SCHEMA:
            raise BundleError(f"{path} has schema {schema}, this version reads {SCHEMA}: update the older")
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path}: {error}: copy the bundle again, or build it again") from error
