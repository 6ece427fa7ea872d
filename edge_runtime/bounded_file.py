"""Reads files that somebody else may have written: no more of them than they may have."""

import errno
from pathlib import Path


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The content of a file. Raises OSError, also for a file of more bytes: its `strerror` says so."""
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"is larger than {max_bytes} bytes", str(path))
    return data
