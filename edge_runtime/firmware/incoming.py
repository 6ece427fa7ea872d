"""The files of a bundle on their way into the store: first its manifest, then what is not here yet.

Each file arrives in order, in pieces, and gets its name only when its hash is right, so what is stored is not asked for
again after a restart. It knows nothing of MQTT: `aiflow bundle install` reads the same pieces from a directory, or from
a tar file.
"""

import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.disk import replace_file, sync
from edge_runtime.errors import AiflowError
from edge_runtime.firmware.signature import SIGNATURE, SignatureError, Statement, read_signature
from edge_runtime.inference.bundle import (
    DRAFT_LABELS,
    INTER_TABLES,
    MANIFEST,
    TABLES,
    VOCABULARY,
    Bundle,
    BundleError,
    FileRecord,
    Manifest,
    file_hash,
    open_bundle,
)

logger = logging.getLogger(__name__)

MAX_UPDATE_BYTES = 256 << 20  # of a board's files; the shipped bundle has 14 MB
SPARE_BYTES = 4 << 20  # that stay free on the disk: the outbox and the log need some
PART = ".part"  # of a file that is not complete


class StoreError(AiflowError, OSError):
    """The disk does not take a bundle, or the bundle does not work on this board."""


class WrongHashError(StoreError):
    """A file that has arrived is not the one that the manifest names."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The next bytes that are needed."""

    file: str  # SHA-256 in hex
    name: str
    offset: int  # bytes that are here
    size: int  # bytes of the whole file


def board_files(manifest: Manifest, suffixes: Iterable[str]) -> list[str]:
    """The files that a board needs if it runs the networks of these suffixes; a server needs the others."""
    suffixes = list(suffixes)
    networks = [f"{network}{s}" for s in suffixes for network in ("head", "draft_look", "draft_step")]
    optional = [INTER_TABLES, *(f"labels{s}" for s in suffixes), *([DRAFT_LABELS] if suffixes else [])]
    return [TABLES, VOCABULARY, *networks, *(name for name in optional if name in manifest.files)]


class Incoming:
    """The folder of one bundle that is not complete. Any method may raise OSError for a disk that refuses."""

    def __init__(
        self, folder: Path, statement: Statement, signature: bytes, suffixes: Iterable[str], known: Iterable[Path]
    ) -> None:
        """Goes on with what an earlier run has stored, if it was of the same signed bundle.

        known: folders that may have files of this bundle already.
        """
        self.folder, self.statement = folder, statement
        self._suffixes, self._known = tuple(suffixes), tuple(known)
        self.bundle: Bundle | None = None  # when the manifest is here
        self._records = {MANIFEST: FileRecord(statement.manifest, statement.manifest_bytes)}
        self._resumed = False
        if signature and folder.is_dir() and self._stored_signature() == signature:
            self._resumed = True
        else:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir()
            if signature:
                replace_file(folder / SIGNATURE, signature)

    @property
    def total(self) -> int:
        """Bytes of all files, as far as they are known."""
        return sum(record.bytes for record in self._records.values())

    @property
    def received(self) -> int:
        return sum(self._size(name) for name in self._records)

    def wanted(self) -> Wanted | None:
        """What is needed next. None: all of it is here.

        Raises BundleError for a manifest that no board can use, and StoreError without room for the files.
        """
        for name, record in self._records.items():
            if (self.folder / name).is_file():
                continue
            if self._size(name) >= record.bytes:  # an earlier run ended before it checked the file
                self._complete(Wanted(record.sha256, name, record.bytes, record.bytes))
            if not (self.folder / name).is_file():
                return Wanted(record.sha256, name, self._size(name), record.bytes)
        if self.bundle is not None:
            return None
        self.bundle = self._opened()  # the manifest is here: now the other files are known
        self._take_known()
        return self.wanted()

    def add(self, file: str, offset: int, data: bytes) -> bool:
        """Stores the next bytes of the file that is wanted. False: these are others, which change nothing.

        Raises WrongHashError; the file is wanted again from its start then.
        """
        wanted = self.wanted()
        if wanted is None or not data or (file, offset) != (wanted.file, wanted.offset):
            return False
        if offset + len(data) > wanted.size:
            self._give_up(wanted, f"it has more than the {wanted.size} bytes that were signed")
        part = self._part(wanted.name)
        with part.open("ab") as target:
            target.write(data)
        if offset + len(data) == wanted.size:
            self._complete(wanted)
        return True

    def sync(self) -> None:
        """What has arrived is on the medium."""
        if (wanted := self.wanted()) and wanted.offset:
            sync(self._part(wanted.name))

    def _stored_signature(self) -> bytes:
        """b"" if it is missing or damaged: then the bundle comes from its start."""
        try:
            return read_signature(self.folder)
        except SignatureError:
            return b""

    def _complete(self, wanted: Wanted) -> None:
        part = self._part(wanted.name)
        sync(part)
        if file_hash(part, wanted.size) != wanted.file:
            if not self._resumed:
                self._give_up(wanted, "its hash is another one than was signed")
            self._resumed = False  # a power cut may have left a hole in it: once more from the start
            logger.warning("bundle file damaged, wanted again name=%s", wanted.name)
            part.unlink()
            return
        os.replace(part, self.folder / wanted.name)
        sync(self.folder)

    def _give_up(self, wanted: Wanted, why: str) -> None:
        self._part(wanted.name).unlink(missing_ok=True)
        raise WrongHashError(f"{wanted.name} has arrived, but {why}: send it again, and look at who sends it")

    def _opened(self) -> Bundle:
        bundle, statement = open_bundle(self.folder), self.statement
        if bundle.manifest.name != statement.name:
            raise BundleError(f"{statement.name} was signed, and its manifest says {bundle.manifest.name}: sign again")
        files = bundle.manifest.files
        names = board_files(bundle.manifest, self._suffixes)
        if missing := [name for name in names if name not in files or not files[name].bytes]:
            raise BundleError(f"bundle {statement.name} has no {', '.join(missing)}, which this board needs")
        self._records |= {name: files[name] for name in names}
        if self.total > MAX_UPDATE_BYTES:
            raise BundleError(f"a board's files of {statement.name} have {self.total} bytes, want {MAX_UPDATE_BYTES}")
        needed, free = self.total - self.received, shutil.disk_usage(self.folder).free
        if needed + SPARE_BYTES > free:
            raise StoreError(
                f"{self.folder} has {free >> 20} MB free, the bundle needs {(needed + SPARE_BYTES) >> 20}: make room"
            )
        return bundle

    def _take_known(self) -> None:
        """Copies files that another bundle has. They are not linked: damage to a file must not hit both bundles."""
        for name, record in self._records.items():
            if (self.folder / name).exists():
                continue
            part = self._part(name)
            for source in (folder / name for folder in self._known):
                with suppress(OSError):  # a damaged source: the file arrives like the others
                    if source.stat().st_size == record.bytes and file_hash(source, record.bytes) == record.sha256:
                        shutil.copyfile(source, part)
                        sync(part)
                        os.replace(part, self.folder / name)
                        break
        sync(self.folder)

    def _part(self, name: str) -> Path:
        return self.folder / f"{name}{PART}"

    def _size(self, name: str) -> int:
        for path in (self.folder / name, self._part(name)):
            if path.is_file():
                return path.stat().st_size
        return 0
