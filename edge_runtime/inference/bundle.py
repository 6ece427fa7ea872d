"""A bundle: one directory with every artefact of one model family, and a manifest that pins each by its hash.

Its id is the hash of the manifest, so that two sides that name the same id hold the same files. Loading checks what
is there; it knows nothing of networks or runtimes.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_runtime.errors import AiflowError
from edge_runtime.wire import MAX_TOKENS, Tables

SCHEMA = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 256 * 1024  # the shipped one is 4 KB


class BundleError(AiflowError, ValueError):
    """A bundle is missing, incomplete, altered or of another schema."""


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the bundle."""

    sha256: str
    bytes: int


class LatentRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is coded: symbols int8 [channels, height, width] in nested groups of channels, at one of several levels."""

    channels: int
    height: int
    width: int
    groups: int
    # Symbols per unit of the head's output, one per level, coarsest first.
    gains: Annotated[tuple[float, ...], Meta(min_length=1, max_length=16)]


class TargetRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tier's text decoder; the fields of models.family.DecoderShape and the file of its weights."""

    file: str
    width: int
    heads: int
    encoder_layers: int
    decoder_layers: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle holds and how good it was measured to be."""

    schema: int
    name: str
    files: dict[str, FileRecord]
    pixels: int  # input height and width of the head, the whole frame squashed
    latent: LatentRecord
    vocabulary: int  # tokens
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]  # of a text, its end token included
    targets: dict[str, TargetRecord]  # by tier, "edge" and "cloud"
    tail: str  # file with the tail that all targets share
    classes: tuple[str, ...]  # labels of the classifier; none: the bundle does not classify
    licences: dict[str, str]  # of weights and of what they were trained on
    training_commit: str  # of the recipe that made it
    quality: dict[str, float]  # as measured on the development split by that recipe
    # A draft's confidence to its worth beside the cloud's text (confidence.py); none: no draft stands alone.
    draft_calibration: Annotated[tuple[tuple[float, float], ...], Meta(max_length=64)] = ()


class _Versioned(msgspec.Struct):
    """What every manifest has, of whatever schema."""

    schema: int


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Paths are resolved once, so that a switch of versions beneath cannot mix two."""

    path: Path
    manifest: Manifest
    id: bytes  # first 8 bytes of the manifest's SHA-256

    def file(self, name: str) -> Path:
        """Path of a file, its size and hash checked. Raises BundleError."""
        record = self.manifest.files.get(name)
        if record is None:
            raise BundleError(
                f"bundle {self.manifest.name} has no file {name}: it has {', '.join(self.manifest.files)}"
            )
        path = self.path / name
        if not path.is_file():
            raise BundleError(f"{path} is missing: copy the whole bundle again")
        size = path.stat().st_size
        if size != record.bytes or file_hash(path) != record.sha256:
            raise BundleError(f"{path} is not the file that the manifest names (size or SHA-256): copy it again")
        return path

    @cached_property
    def tables(self) -> Tables:
        """The entropy coder's tables. Raises BundleError, TablesError."""
        tables = Tables.from_bytes(self.file("tables.bin").read_bytes())
        gains = len(self.manifest.latent.gains)
        if tables.levels != gains:
            raise BundleError(
                f"bundle {self.manifest.name} has {tables.levels} levels of tables and {gains} gains: build it again"
            )
        return tables

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The vocabulary: the word of each token id."""
        words = tuple(self.file("vocabulary.txt").read_text("utf-8").splitlines())
        if len(words) != self.manifest.vocabulary:
            raise BundleError(f"vocabulary.txt has {len(words)} words, the manifest says {self.manifest.vocabulary}")
        return words

    def text(self, tokens: list[int]) -> str:
        """Token ids, as emitted, to a text; stops at the end token and leaves special tokens out."""
        return detokenise(tokens, self.words)


PAD, BOS, EOS, UNKNOWN = range(4)  # the first words of every vocabulary


def detokenise(tokens: list[int], words: tuple[str, ...]) -> str:
    """Joins words with spaces up to the end token; ids without a word, special ones included, are left out."""
    kept = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
    return " ".join(words[token] for token in kept if UNKNOWN < token < len(words))


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_bundle(path: Path) -> Bundle:
    """Reads and checks the manifest; files are checked as they are asked for. Raises BundleError."""
    path = path.resolve()
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise BundleError(f"{path} holds no {MANIFEST}: name a bundle's directory, such as models/zoo/<bundle>")
    if manifest_path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{manifest_path} is larger than {MAX_MANIFEST_BYTES} bytes: this is not a manifest")
    data = manifest_path.read_bytes()
    try:
        schema = msgspec.json.decode(data, type=_Versioned).schema
        if schema != SCHEMA:
            raise BundleError(f"{manifest_path} has schema {schema}, this version reads {SCHEMA}: update the older")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{manifest_path}: {error}: copy the bundle again") from error
    for name in manifest.files:
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise BundleError(f"{manifest_path} names {name!r}: files lie in the bundle's own directory")
    return Bundle(path, manifest, hashlib.sha256(data).digest()[:8])
