"""Files that are whole after a power cut: written and synced first, then renamed, then their folder is synced.

fsync of the folder is what makes a rename last: man fsync(2).
"""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """A file or a folder is on the medium. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """The file has the old content or the new one, whatever happens. Raises OSError."""
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync(path.parent)
