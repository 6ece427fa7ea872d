"""Frames that the board keeps as files, a folder per camera, so that people can teach a question with them.

`aiflow teach --from-events FOLDER` sorts them. The name of a file is the time of the capture, as events give it.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np

from edge_runtime.config import KeptFramesConfig
from edge_runtime.inference.preprocess import shrunk, to_jpeg
from edge_runtime.reporting.counters import Values

logger = logging.getLogger(__name__)

MAX_SIDE = 1280  # pixels
QUALITY = 90  # of a JPEG
MIN_FREE = 200 << 20  # bytes of the disk that stay free: outbox and updates need them more
OWN_NAME = re.compile(r"\d{8}T\d{9}Z\.jpg")  # other files in the folder are never removed
MILLISECOND = timedelta(milliseconds=1)


class KeptFrames:
    """For the thread that handles frames, except `counts`, which is for any."""

    def __init__(self, config: KeptFramesConfig, on_trouble: Callable[[str], None]) -> None:
        """on_trouble: called with why frames of a camera cannot be kept, and with "" when all can again."""
        self._config, self._on_trouble = config, on_trouble
        self._troubles: dict[str, str] = {}  # by camera
        self._due: dict[str, float] = {}  # by camera, time.monotonic()
        self._names: dict[str, dict[str, None]] = {}  # by camera: of its files, the oldest first
        self._counts = {"kept": 0, "failed": 0}

    def keep(self, camera: str, pixels: np.ndarray, captured_unix: float) -> None:
        """A frame that was handled, uint8 RGB [H, W, 3], is written if its camera's interval is over.

        captured_unix: seconds. Files are not synced: after a power cut, the newest ones may be empty.
        """
        now = time.monotonic()
        if now < self._due.get(camera, now):
            return
        self._due[camera] = now + self._config.every_s
        folder = Path(self._config.folder) / camera
        try:
            self._write(camera, folder, pixels, datetime.fromtimestamp(captured_unix, timezone.utc))
        except OSError as error:
            self._counts["failed"] += 1
            self._names.pop(camera, None)  # the folder may be another one when it works again
            self._tell(camera, f"{folder} takes no frames: {error.strerror or error}")
        else:
            self._counts["kept"] += 1
            self._tell(camera, "")

    def counts(self) -> Values:
        return {"frames_kept": dict(self._counts)}

    def _write(self, camera: str, folder: Path, pixels: np.ndarray, captured: datetime) -> None:
        """Raises OSError."""
        if (names := self._names.get(camera)) is None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = sorted(name for name in os.listdir(folder) if OWN_NAME.fullmatch(name))
            names = self._names[camera] = dict.fromkeys(found)
        if shutil.disk_usage(folder).free < MIN_FREE:
            raise OSError(f"less than {MIN_FREE >> 20} MB are free")
        while (name := _name(captured)) in names:  # files of a watched folder may have one time
            captured += MILLISECOND
        partial = folder / ".new"
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(to_jpeg(shrunk(pixels, MAX_SIDE), QUALITY))
        os.replace(partial, folder / name)
        names[name] = None
        while len(names) > self._config.max_files:
            oldest = next(iter(names))
            (folder / oldest).unlink(missing_ok=True)
            del names[oldest]

    def _tell(self, camera: str, trouble: str) -> None:
        before = self._troubles.get(camera, "")
        if trouble == before:
            return
        if trouble:
            logger.warning("%s", trouble)
            self._troubles[camera] = trouble
        else:
            del self._troubles[camera]
        self._on_trouble(next(iter(self._troubles.values()), ""))


def _name(captured: datetime) -> str:
    return f"{captured:%Y%m%dT%H%M%S}{captured.microsecond // 1000:03}Z.jpg"
