"""How the programs log: what strangers send must not fill the log, and systemd's journal knows each line's priority."""

import logging
import os
import sys
from contextlib import suppress

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}  # syslog(3)

ERROR_MARK = f"<{PRIORITIES[logging.ERROR]}>"


class JournalFormatter(logging.Formatter):
    """Begins each line with its priority in angle brackets, which the journal removes: sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        mark = f"<{PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(mark + line for line in super().format(record).splitlines())


def log_to_stderr(level: int) -> None:
    """For entry points. Lines have priorities if standard error is the journal's."""
    handler = logging.StreamHandler()
    handler.setFormatter(JournalFormatter(FORMAT) if is_journal() else logging.Formatter(FORMAT))
    logging.basicConfig(level=level, handlers=[handler])


def is_journal() -> bool:
    """Whether standard error is the journal's: JOURNAL_STREAM of systemd.exec(5)."""
    with suppress(OSError, ValueError, AttributeError):
        stream = os.fstat(sys.stderr.fileno())
        return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"
    return False


def is_told(count: int) -> bool:
    """Whether the count-th of the same trouble is worth a line: the 1st, 2nd, 4th, 8th, ..."""
    return count & (count - 1) == 0


def printable(text: str, limit: int | None = None) -> str:
    """Text from files or the network without the characters that a terminal would obey, cut after `limit`."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:limit])
