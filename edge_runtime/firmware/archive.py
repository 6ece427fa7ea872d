"""A bundle in a tar file, as it comes on a USB stick: read where it is, and never unpacked.

So no member decides where a file is written. The extensions of tar are not read, since their headers may ask for any
amount of memory, and may contradict each other: there are plain files and directories, or the archive is refused.
"""

import tarfile
from datetime import date
from pathlib import Path, PurePosixPath
from types import TracebackType

from edge_runtime.firmware.signature import MAX_SIGNATURE_BYTES, SIGNATURE, SignatureError, Statement, statement_about
from edge_runtime.inference.bundle import MANIFEST, MAX_MANIFEST_BYTES, BundleError, decode_manifest

MAX_MEMBERS = 512  # a manifest names 256 files at most
FILES, DIRECTORY = (tarfile.REGTYPE, tarfile.AREGTYPE), tarfile.DIRTYPE
ADVICE = "pack the bundle with: tar --format=ustar -cf BUNDLE.tar -C DIRECTORY ."


class Archive:
    """An opened tar file with one bundle. `with` closes it."""

    def __init__(self, path: Path) -> None:
        """Raises BundleError for what is no bundle or has other members than its manifest names, and OSError."""
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}  # of each file: where its bytes begin, and how many there are
        self._file = path.open("rb")
        try:
            self._find_members()
            self.manifest_bytes = self._small(MANIFEST, MAX_MANIFEST_BYTES)
            self.manifest = decode_manifest(self.manifest_bytes, path / MANIFEST)
            self._compare()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def signature(self) -> bytes:
        """The content of its bundle.sig. Raises SignatureError if it has none."""
        if SIGNATURE not in self._places:
            raise SignatureError(f"{self.path} is unsigned, it has no {SIGNATURE}: sign the bundle, and pack it again")
        return self._small(SIGNATURE, MAX_SIGNATURE_BYTES)

    def statement(self, version: int, expires: date) -> Statement:
        """About the bundle as it is, whoever has signed it."""
        return statement_about(self.manifest.name, self.manifest_bytes, version, expires)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes of a file, from an offset, at most `size`. Raises BundleError and OSError."""
        if name not in self._places:
            raise BundleError(f"{self.path} has no {name}: {ADVICE}")
        start, whole = self._places[name]
        self._file.seek(start + offset)
        return self._file.read(max(0, min(size, whole - offset)))

    def _small(self, name: str, max_bytes: int) -> bytes:
        data = self.read(name, 0, max_bytes + 1)
        if len(data) > max_bytes:
            raise BundleError(f"{self.path}: {name} is larger than {max_bytes} bytes: {ADVICE}")
        return data

    def _find_members(self) -> None:
        end, folders = self.path.stat().st_size, set[PurePosixPath]()
        for _ in range(MAX_MEMBERS):
            block = self._file.read(tarfile.BLOCKSIZE)
            if not any(block):  # of zeros, or the end of the file
                return
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
            except (tarfile.TarError, ValueError) as error:
                raise BundleError(f"{self.path} is no tar file, or a compressed or damaged one: {ADVICE}") from error
            path, start = PurePosixPath(header.name), self._file.tell()
            if header.type not in (FILES if header.size else (*FILES, DIRECTORY)) or header.size < 0:
                raise self._refused(header, "is no plain file or directory")
            if path.is_absolute() or ".." in path.parts:
                raise self._refused(header, "leaves the archive's own directory")
            if start + header.size > end:
                raise self._refused(header, "goes on behind the end of the file, which was cut")
            if header.type in FILES:
                folders.add(path.parent)
                if path.name in self._places or len(folders) > 1:
                    raise self._refused(header, "is there twice, or in another directory than the others")
                self._places[path.name] = start, header.size
            self._file.seek(start + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        raise BundleError(f"{self.path} has more than {MAX_MEMBERS} members: {ADVICE}")

    def _refused(self, header: tarfile.TarInfo, why: str) -> BundleError:
        return BundleError(f"{self.path}: the member {header.name!r} {why}: {ADVICE}")

    def _compare(self) -> None:
        """The files have the names and the sizes of the manifest; some may be missing, which a board does not need."""
        for name, (_, size) in self._places.items():
            record = self.manifest.files.get(name)
            if name not in (MANIFEST, SIGNATURE) and (record is None or record.bytes != size):
                raise BundleError(f"{self.path}: the manifest names no {name[:128]!r} of {size} bytes: {ADVICE}")
