"""How the programs log: what strangers send must not fill the log, and systemd's journal knows each line's priority,
logger and place in the code.
"""

import logging
import os
import socket
import sys
from contextlib import suppress

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}  # syslog(3)

JOURNAL = "/run/systemd/journal/socket"
JOURNAL_WAIT_S = 1.0  # for room in its queue

ERROR_MARK = f"<{PRIORITIES[logging.ERROR]}>"


class JournalFormatter(logging.Formatter):
    """Begins each line with its priority in angle brackets, which the journal removes: sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        mark = f"<{PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(mark + line for line in super().format(record).splitlines())


class JournalHandler(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 cannot subscript it
    """Sends each record as a datagram with its fields: https://systemd.io/JOURNAL_NATIVE_PROTOCOL.

    What the journal does not take, such as a record that is larger than a datagram, goes to standard error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JournalFormatter(FORMAT))
        self._message = logging.Formatter()  # with the traceback
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(JOURNAL_WAIT_S)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = {
                "MESSAGE": self._message.format(record),
                "PRIORITY": PRIORITIES.get(record.levelno, 6),
                "SYSLOG_IDENTIFIER": "aiflow",
                "LOGGER": record.name,
                "CODE_FILE": record.pathname,
                "CODE_LINE": record.lineno,
                "CODE_FUNC": record.funcName,
            }
            self._socket.sendto(b"".join(_field(name, str(value)) for name, value in fields.items()), JOURNAL)
        except OSError:
            super().emit(record)
        except Exception:
            self.handleError(record)


def _field(name: str, value: str) -> bytes:
    data = value.encode(errors="replace")
    if b"\n" not in data:
        return b"%s=%s\n" % (name.encode(), data)
    return b"%s\n%s%s\n" % (name.encode(), len(data).to_bytes(8, "little"), data)


def log_to_stderr(level: int) -> None:
    """For entry points. If standard error is the journal's, records have their fields there."""
    handlers = [JournalHandler()] if is_journal() else None  # None: one for standard error
    logging.basicConfig(level=level, format=FORMAT, handlers=handlers)


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
