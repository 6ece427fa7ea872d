"""Pictures in files: a directory, a tar or a single file, read one at a time in a fixed order."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.preprocess import MAX_PICTURE_BYTES, PictureError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, slots=True)
class Picture:
    """One encoded picture; `name` is its path inside the directory or tar, with forward slashes."""

    name: str
    data: bytes


def read_pictures(source: Path) -> Iterator[Picture]:
    """Every picture below a directory, inside a tar, or the file itself, sorted by name. Raises PictureError."""
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES):
            yield Picture(path.relative_to(source).as_posix(), _read(path))
    elif source.suffix.lower() in SUFFIXES:
        yield Picture(source.name, _read(source))
    elif source.is_file() and tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            members = [m for m in tar.getmembers() if m.isfile() and m.name.lower().endswith(SUFFIXES)]
            for member in sorted(members, key=lambda m: m.name):
                if member.size > MAX_PICTURE_BYTES:
                    raise PictureError(f"{source}: {member.name} has {member.size} bytes, at most {MAX_PICTURE_BYTES}")
                file = tar.extractfile(member)
                assert file is not None  # it is a file, as asked above
                yield Picture(member.name.removeprefix("./"), file.read())
    else:
        raise PictureError(f"{source} is not a directory, a tar or a picture ({', '.join(SUFFIXES)})")


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_PICTURE_BYTES:
        raise PictureError(f"{path} has {path.stat().st_size} bytes, at most {MAX_PICTURE_BYTES} are read")
    return path.read_bytes()
