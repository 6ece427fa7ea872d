"""A folder into which a camera puts pictures, such as the upload folder of an FTP server: each new file once, in order.

The folder is listed again and again, which also works over NFS and SMB. A file is read when its size and its time have
not changed for STABLE_S, so that nothing is read half-written. A file that is written anew is a new picture.
seen_files.py remembers over a restart what has been read. A drive that does not answer blocks the thread of `frames`,
and `asked_at` tells the other threads so.
"""

import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path

from edge_runtime.capture.frame import CameraError, Counters, Frame
from edge_runtime.capture.picture_files import SUFFIXES
from edge_runtime.capture.seen_files import SeenFiles, Version
from edge_runtime.config import CameraConfig
from edge_runtime.config.camera_source import path_of
from edge_runtime.logs import printable
from edge_runtime.picture_checks import MAX_PICTURE_BYTES, PictureError, decode_picture

logger = logging.getLogger(__name__)

POLL_S = 0.5  # between two listings
SCAN_SHARE = 0.05  # of the time, at most, goes to listing a large folder
MAX_PAUSE_S = 30.0  # between two listings, whatever the share: one may have waited for a drive for hours
STABLE_S = 1.0  # a file that has not changed for this time is complete
MAX_ENTRIES = 50_000  # files and folders; remembering them takes about 10 MB
MAX_DEPTH = 8  # of folders in folders: cameras make one per day or hour

MAX_LINES, MINUTE_S = 10, 60.0  # of the log, for unreadable files, in this time


class WatchedFolder:
    """The folder of one camera, and which of its files have been read. Links are followed."""

    def __init__(
        self,
        camera: CameraConfig,
        counters: Counters,
        on_listed: Callable[[str], None] = lambda _: None,
        state: Path | None = None,
    ) -> None:
        """on_listed: called on the thread of `frames` whenever the folder could be listed, with what it waits for.

        state: a folder for a file that remembers over a restart what has been read; None: nothing is remembered.
        """
        self._on_listed = on_listed
        self._camera, self._counters, self.folder = camera, counters, Path(path_of(camera.source))
        # A camera whose folder is another one now has not seen it before.
        name = f"{camera.name}-{hashlib.blake2b(os.fsencode(self.folder), digest_size=8).hexdigest()}"
        self._seen = SeenFiles(state / name if state else None)
        self.asked_at = inf  # when the drive was asked for what is waited for now, time.monotonic(); inf: for nothing
        self._at_hand: tuple[str, Version] | None = None  # the file of the last frame, until that has been handled
        self._is_first = True  # the next listing is the first one
        self._read: dict[str, Version] = {}  # path -> the version that was read or refused
        self._growing: dict[str, tuple[Version, float]] = {}  # path -> its version, and since when it has that
        self._refused: set[str] = set()  # paths that have been reported
        self._lines, self._lines_since = 0, -inf  # of the log, in this minute

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """New pictures until `stop`. Raises CameraError if the folder cannot be listed or has too many files."""
        due = -inf
        while not stop.is_set():
            started = time.monotonic()
            try:
                ready = self._ready(started)
            finally:
                self.asked_at = inf
            empty = f"{self.folder} has no new picture (old ones: {len(self._read)}): put one there"
            self._on_listed("" if ready or self._growing else empty)
            pause_s = max(POLL_S, min(MAX_PAUSE_S, (time.monotonic() - started) / SCAN_SHARE))
            for path, version in ready:
                if stop.wait(max(0.0, due - time.monotonic())):
                    return
                self._seen.add(path, version)
                self._at_hand = path, version
                if (frame := self._picture(path, version)) is not None:
                    due = time.monotonic() + self._camera.min_interval_s
                    yield frame
                    del frame  # see Frame
                    if stop.is_set():  # it may not have been handled; `handled` knows
                        return
                self.handled()
            stop.wait(pause_s)

    def handled(self) -> None:
        """The last frame has been handled, or is none. Any thread, while `frames` waits."""
        at_hand, self._at_hand = self._at_hand, None
        if at_hand:
            self._seen.add(*at_hand)

    def _ready(self, now: float) -> list[tuple[str, Version]]:
        """Files that are complete and not read yet, the oldest first."""
        growing, ready, found = self._growing, [], set()
        is_unknown = self._is_first and not self._camera.existing and not self._seen.is_known
        self._growing = {}
        for path, status in self._files():
            version = (status.st_size, status.st_mtime_ns)
            found.add(path)
            if self._read.get(path) == version:
                continue
            if is_unknown or self._seen.done_before(path, version):
                self._read[path] = version
            elif status.st_size > MAX_PICTURE_BYTES:
                self._read[path] = version
                self._refuse(path, f"it has {status.st_size} bytes, at most {MAX_PICTURE_BYTES} are read")
            else:
                before, since = growing.get(path, (None, now))
                since = since if before == version else now
                if status.st_size and now - since >= STABLE_S:
                    ready.append((version[1], path, version))
                else:
                    self._growing[path] = version, since
        if is_unknown and self._read:
            self._counters.skipped += len(self._read)
            logger.info(
                "pictures that were there before are not answered camera=%s count=%d",
                self._camera.name,
                len(self._read),
            )
        if len(self._refused) > MAX_ENTRIES:
            self._refused.clear()
        if len(self._read) > MAX_ENTRIES:  # not sooner: what a lost mount hides comes back and is not new
            self._read = {path: version for path, version in self._read.items() if path in found}
        if (self._is_first and not self._seen.is_known) or self._seen.is_long:
            self._seen.rewrite(self._read.items())
        self._is_first = False
        return [(path, version) for _, path, version in sorted(ready)]

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Pictures in the folder and the folders in it, without hidden ones."""
        pending, visited, entries_left = [(str(self.folder), 0)], set[tuple[int, int]](), MAX_ENTRIES
        while pending:
            self.asked_at = time.monotonic()
            folder, depth = pending.pop()
            try:
                entries = os.scandir(folder)
            except OSError as error:
                if not depth:
                    raise CameraError(f"{self.folder} cannot be listed: {error.strerror}") from error
                self._refuse(folder, f"it cannot be listed: {error.strerror}")
                continue
            with entries:
                for entry in entries:
                    self.asked_at = time.monotonic()
                    entries_left -= 1
                    if entries_left < 0:
                        raise CameraError(
                            f"{self.folder} has more than {MAX_ENTRIES} files: delete old ones, for example with "
                            "find FOLDER -type f -mtime +7 -delete"
                        )
                    if entry.name.startswith("."):
                        continue
                    try:
                        status = entry.stat()
                    except OSError as error:
                        if entry.is_symlink():
                            self._refuse(entry.path, f"the link cannot be followed: {error.strerror}")
                        continue  # it has been deleted since
                    if stat.S_ISREG(status.st_mode) and entry.name.lower().endswith(SUFFIXES):
                        yield entry.path, status
                    elif stat.S_ISDIR(status.st_mode) and (status.st_dev, status.st_ino) not in visited:
                        visited.add((status.st_dev, status.st_ino))  # a link may lead back
                        if depth < MAX_DEPTH:
                            pending.append((entry.path, depth + 1))
                        else:
                            self._refuse(entry.path, f"it is more than {MAX_DEPTH} folders deep")

    def _picture(self, path: str, version: Version) -> Frame | None:
        """A file's frame. None if it has changed or vanished since, or is no picture."""
        self.asked_at = time.monotonic()
        try:
            # Not blocking: the file may have been exchanged for a named pipe.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                data = file.read(MAX_PICTURE_BYTES + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
                status = os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        except OSError as error:
            self._read[path] = version
            self._unreadable(path, error.strerror or str(error))
            return None
        finally:
            self.asked_at = inf
        if (status.st_size, status.st_mtime_ns) != version:
            return None  # the next listing finds its new version
        self._read[path] = version
        try:
            pixels = decode_picture(data)
        except PictureError as error:
            self._unreadable(path, str(error))
            return None
        name = os.path.relpath(path, self.folder)
        captured_unix = min(time.time(), status.st_mtime)
        return Frame(self._camera.name, pixels, captured_unix, time.monotonic(), name, data)

    def _refuse(self, path: str, why: str) -> None:
        """Once."""
        if path not in self._refused:
            self._refused.add(path)
            self._unreadable(path, why)

    def _unreadable(self, path: str, why: str) -> None:
        """Each file is another mistake and has a line of its own, but a full folder of them must not fill the log."""
        self._counters.unreadable += 1
        if (now := time.monotonic()) - self._lines_since >= MINUTE_S:
            self._lines, self._lines_since = 0, now
        self._lines += 1
        if self._lines > MAX_LINES:
            return
        logger.warning(
            "picture unreadable camera=%s count=%d name=%s error=%s",
            self._camera.name,
            self._counters.unreadable,
            printable(os.path.relpath(path, self.folder), 256),
            printable(why, 256),
        )
        if self._lines == MAX_LINES:
            logger.warning("more unreadable pictures are only counted for a minute camera=%s", self._camera.name)
