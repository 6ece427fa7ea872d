"""The taught questions of a server: files that its configuration names, or that a message names while it runs.

A message names files in one folder, never weights: whoever may write files there decides what can be asked. All of its
files are read and checked, then the new questions replace the old ones at once; if one file is wrong, nothing changes.
"""

import logging
import re
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from edge_runtime.config import QUESTION, QuestionName
from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.logs import printable
from models.questions import Question, QuestionError, read_question

logger = logging.getLogger(__name__)

MAX_FILES = 64  # of a server: 64 files of 584 KB
MAX_MESSAGE = 16 * 1024  # bytes
MAX_REASON = 300  # characters in the status


class Questions:
    """`known` may be read on any thread; `message_arrived` never waits; `load` is for one thread."""

    def __init__(self, bundle: Bundle, files: Mapping[str, str] | None = None, folder: str | None = None) -> None:
        """files: by name. folder: of the files that a message may name; None: none. Raises ConfigError."""
        self._bundle, self._folder = bundle, folder
        self._newest: deque[bytes] = deque(maxlen=1)  # the message that has not been read
        self.error = ""  # what was wrong with the last message; empty: nothing
        self.known = _read({name: Path(file) for name, file in (files or {}).items()}, bundle)

    def message_arrived(self, payload: bytes) -> None:
        """A message on the server's topic `set/questions`: JSON, name to file name. It is read by `load`."""
        self._newest.append(payload)

    def load(self) -> bool | None:
        """Reads the newest message. None: there is none; False: it was refused, and nothing has changed."""
        if not self._newest:
            return None
        try:
            self.known = _read(self._files(self._newest.pop()), self._bundle)
        except ConfigError as error:
            self.error = printable(str(error), MAX_REASON)
            logger.warning("questions refused reason=%s", self.error)
            return False
        self.error = ""
        logger.info("questions changed names=%s", ",".join(self.known))
        return True

    def status(self) -> dict[str, Any]:
        accuracies = {name: round(question.record.accuracy, 4) for name, question in self.known.items()}
        return {"questions": accuracies, "questions_error": self.error}

    def _files(self, payload: bytes) -> dict[str, Path]:
        """Raises ConfigError."""
        if self._folder is None:
            raise ConfigError("this server takes no questions over MQTT: set questions_folder in its [server]")
        if len(payload) > MAX_MESSAGE:
            raise ConfigError(f"message of {len(payload)} bytes, at most {MAX_MESSAGE} are read")
        try:
            files = msgspec.json.decode(payload, type=dict[QuestionName, str])
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise ConfigError(f'message is not as {{"gate": "gate.safetensors"}}: {error}') from error
        for name, file in files.items():
            # One file of the folder itself: no path leads out of it.
            if not re.fullmatch(r"[\w-][\w.-]{0,127}", file):
                raise ConfigError(f"{name}: {file[:64]!r} is no name of a file in questions_folder, without slashes")
        return {name: Path(self._folder, file) for name, file in files.items()}


def _read(files: Mapping[str, Path], bundle: Bundle) -> Mapping[str, Question]:
    """All of them, or ConfigError."""
    if len(files) > MAX_FILES:
        raise ConfigError(f"{len(files)} questions, want at most {MAX_FILES}")
    questions = {}
    for name, file in files.items():
        if not re.fullmatch(QUESTION, name):
            raise ConfigError(
                f"question {name[:64]!r}: want a name of 1 to 32 of the characters A-Z, a-z, 0-9, _ and -"
            )
        try:
            questions[name] = read_question(file, bundle)
        except QuestionError as error:
            raise ConfigError(f"question {name}: {error}") from error
    return MappingProxyType(questions)
