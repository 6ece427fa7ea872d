"""Reads the pictures of a directory, a tar or a single file, one at a time, in the order of their names."""

import bz2
import errno
import gzip
import logging
import lzma
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edge_runtime.logs import printable
from edge_runtime.picture_checks import MAX_PICTURE_BYTES, PictureError

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)  # says nothing of the tar
MAX_TAR_BYTES = 8 << 30  # of a compressed tar, after decompression: about 50,000 photos
# By the first bytes of a file.
OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, slots=True)
class Picture:
    """One encoded picture; `name` is its path inside the directory or tar, with forward slashes.

    `data` is empty if the file cannot be read, and cut after MAX_PICTURE_BYTES + 1 bytes if the file is too large.
    `decode_picture` refuses both, so that one bad file does not end the reading of the others.
    """

    name: str
    data: bytes


def read_pictures(source: Path) -> Iterator[Picture]:
    """Every picture below a directory or in a tar, sorted by name, or the single picture.

    Raises PictureError if the source is none of these, is damaged or holds no picture; OSError if it cannot be read.
    """
    pictures: Iterator[Picture]
    if source.is_dir():
        os.scandir(source).close()  # rglob hides that the directory cannot be read
        paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        pictures = (Picture(path.relative_to(source).as_posix(), _read(path)) for path in paths)
    elif source.suffix.lower() in SUFFIXES and source.is_file():
        pictures = iter([Picture(source.name, _read(source))])
    elif source.is_file():
        pictures = _members(source)
    else:
        raise PictureError(f"{source} does not exist: name a directory, a tar or a picture ({', '.join(SUFFIXES)})")
    first = next(pictures, None)
    if first is None:
        raise PictureError(f"{source} holds no picture ({', '.join(SUFFIXES)})")
    yield first
    yield from pictures


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_PICTURE_BYTES + 1)
    except OSError as error:
        logger.warning("picture cannot be read error=%s", printable(str(error)))
        return b""


def _members(source: Path) -> Iterator[Picture]:
    """The regular files of a tar. Nothing is unpacked, and links are not followed."""
    import tarfile  # here, as most boards need not load it

    try:
        with _plain(source) as plain, tarfile.open(fileobj=plain, mode="r:") as tar:
            members = [m for m in tar.getmembers() if m.isfile() and m.name.lower().endswith(SUFFIXES)]
            for member in sorted(members, key=lambda m: m.name):
                file = tar.extractfile(member)
                assert file is not None  # isfile() above
                yield Picture(member.name.removeprefix("./"), file.read(MAX_PICTURE_BYTES + 1))
    except PictureError:
        raise
    except Exception as error:  # tarfile and the decompressors raise many kinds for damaged files
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise PictureError(f"{source} is no tar, or a damaged one ({error}): copy it again, or name another") from error


@contextmanager
def _plain(source: Path) -> Iterator[IO[bytes]]:
    """The tar without compression. A compressed tar is decompressed once into a temporary file.

    Its members are read in the order of their names; without the temporary file each step back would decompress
    everything again.
    """
    with source.open("rb") as file:
        magic = file.read(6)
        opener = next((opener for start, opener in OPENERS.items() if magic.startswith(start)), None)
        if opener is None:
            file.seek(0)
            yield file
            return
    with tempfile.TemporaryFile() as plain:
        with opener(source) as compressed:
            while data := compressed.read(1 << 20):
                if plain.tell() + len(data) > MAX_TAR_BYTES:
                    raise PictureError(f"{source} has more than {MAX_TAR_BYTES} bytes once decompressed: split it")
                plain.write(data)
        plain.seek(0)
        yield plain
