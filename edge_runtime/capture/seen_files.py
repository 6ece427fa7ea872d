"""Which files of a watched folder have been read, kept over a restart of the board.

The file has an entry of 8 bytes for each attempt to read a version of a file: a hash of its path, size and time. One is
added before the version is read, and one after it has been handled. So a version with two entries is done, and a
picture that ends the board is tried twice at most, and not at each start for ever. Times alone would not do: an upload
may keep an older time of its file.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from edge_runtime.bounded_file import read_bounded
from edge_runtime.disk import replace_file

logger = logging.getLogger(__name__)

ENTRY_BYTES = 8
DONE = 2  # entries
LONG = 150_000  # entries: more than the most files of a folder need
MAX_BYTES = 4 << 20  # one listing may add 100,000 entries

Version = tuple[int, int]  # a file's size in bytes and its time of modification in nanoseconds


class SeenFiles:
    """The versions of a folder's files that earlier starts have read. Without a place to keep them, there are none."""

    def __init__(self, path: Path | None) -> None:
        """path: of the file that keeps them; its folder is created. None: nothing is kept."""
        self._path, self._is_told, self._length = path, False, 0
        self._before = Counter[bytes]()
        self.is_known = False  # an earlier start has listed the folder
        if path is None:
            return
        try:
            data = read_bounded(path, MAX_BYTES)
            self._length = len(data) // ENTRY_BYTES
            entries = (data[at : at + ENTRY_BYTES] for at in range(0, self._length * ENTRY_BYTES, ENTRY_BYTES))
            self._before, self.is_known = Counter(entries), True
            if len(data) % ENTRY_BYTES:  # a power cut has left a part of an entry
                os.truncate(path, self._length * ENTRY_BYTES)
        except FileNotFoundError:
            return
        except OSError as error:
            self._tell(error)

    @property
    def is_long(self) -> bool:
        """`rewrite` it, so that it stays bounded."""
        return self._length >= LONG

    def done_before(self, path: str, version: Version) -> bool:
        """At an earlier start."""
        return bool(self._before) and self._before[_entry(path, version)] >= DONE

    def add(self, path: str, version: Version) -> None:
        """The version is about to be read, or has been handled. Not synced: after a power cut it may be read again."""
        if self._path is None:
            return
        self._length += 1
        try:
            with self._path.open("ab") as file:
                file.write(_entry(path, version))
        except OSError as error:
            self._tell(error)

    def rewrite(self, done: Iterable[tuple[str, Version]]) -> None:
        """The folder has been listed, and these versions in it need not be read."""
        if self._path is None:
            return
        entries = [_entry(path, version) for path, version in done for _ in range(DONE)]
        self._length = len(entries)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, b"".join(entries))
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        """Once: a full disk must not fill the log."""
        if not self._is_told:
            self._is_told = True
            logger.warning(
                "which pictures have been read is not kept, after a restart some may be read again or left out: "
                "path=%s error=%s",
                self._path,
                error.strerror,
            )


def _entry(path: str, version: Version) -> bytes:
    text = f"{version[0]} {version[1]} {path}"
    return hashlib.blake2b(os.fsencode(text), digest_size=ENTRY_BYTES).digest()
