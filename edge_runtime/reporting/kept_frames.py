"""Frames that the board keeps as files, a folder per camera, so that people can teach a question with them.

`aiflow teach --from-events FOLDER` sorts them. The name of a file is the time of the capture, as events give it.
"""

import logging
import os
import re
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from edge_runtime.config import KeptFramesConfig
from edge_runtime.inference.preprocess import shrunk, to_jpeg
from edge_runtime.reporting.counters import Values

logger = logging.getLogger(__name__)

MAX_SIDE = 1280  # pixels
QUALITY = 90  # of a JPEG
OWN_NAME = re.compile(r"\d{8}T\d{9}Z\.jpg")  # other files in the folder are never removed


class KeptFrames:
    """For the thread that handles frames, except `counts`, which is for any."""

    def __init__(self, config: KeptFramesConfig, on_trouble: Callable[[str], None]) -> None:
        """on_trouble: called with why no frame can be kept, and with "" when they can again."""
        self._config, self._on_trouble, self._trouble = config, on_trouble, ""
        self._due: dict[str, float] = {}  # by camera, time.monotonic()
        self._names: dict[str, dict[str, None]] = {}  # by camera: of its files, the oldest first
        self._counts = {"kept": 0, "failed": 0}

    def keep(self, camera: str, pixels: np.ndarray, captured_unix: float) -> None:
        """A frame that was handled, uint8 RGB [H, W, 3], is written if its camera's interval is over.

        captured_unix: seconds. A file is whole or not there.
        """
        now = time.monotonic()
        if now < self._due.get(camera, now):
            return
        self._due[camera] = now + self._config.every_s
        captured = datetime.fromtimestamp(captured_unix, timezone.utc)
        name = f"{captured:%Y%m%dT%H%M%S}{captured.microsecond // 1000:03}Z.jpg"
        try:
            self._write(camera, name, to_jpeg(shrunk(pixels, MAX_SIDE), QUALITY))
        except OSError as error:
            self._counts["failed"] += 1
            self._names.pop(camera, None)  # the folder may be another one when it works again
            self._tell(f"{self._config.folder} takes no frames: {error.strerror or error}")
        else:
            self._counts["kept"] += 1
            self._tell("")

    def counts(self) -> Values:
        return {"frames_kept": dict(self._counts)}

    def _write(self, camera: str, name: str, jpeg: bytes) -> None:
        """Raises OSError."""
        folder = Path(self._config.folder) / camera
        names = self._names.get(camera)
        if names is None:
            folder.mkdir(parents=True, exist_ok=True)
            found = sorted(each for each in os.listdir(folder) if OWN_NAME.fullmatch(each))
            names = self._names[camera] = dict.fromkeys(found)
        partial = folder / ".new"
        partial.write_bytes(jpeg)
        os.replace(partial, folder / name)
        names.pop(name, None)
        names[name] = None
        while len(names) > self._config.max_files:
            oldest = next(iter(names))
            (folder / oldest).unlink(missing_ok=True)
            del names[oldest]

    def _tell(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            if trouble:
                logger.warning("%s", trouble)
            self._on_trouble(trouble)
