"""What the log says of a target that fails: the first failure of each kind, then some of them, and when it has ended.

Boards are told each failure in their replies. The operator of the server reads its log. The clock is the caller's.
"""

import logging
import re
import threading

from edge_runtime.logs import is_told, printable

logger = logging.getLogger(__name__)

NEW_AFTER_S = 600.0  # without a failure of its kind, the next one is news again
MAX_KINDS = 32  # of failures that are counted; the texts come from a few places, so more are a fault
MAX_ERROR = 256  # characters of a failure's text


class TargetFailures:
    """Any number of threads."""

    def __init__(self, target: str) -> None:
        """target: its name for the log."""
        self._target, self._lock = target, threading.Lock()  # over all below
        self._counts: dict[str, tuple[int, float]] = {}  # by kind: how many, and when the last one was
        self._since_answer, self._is_told = 0, False  # failures since it was said to answer; whether the log has one

    def failed(self, kind: str, error: str, now: float) -> None:
        """kind: one word. error: its text, without anything secret. now: seconds, time.monotonic().

        Failures whose texts differ in numbers only, such as a duration, are of one kind.
        """
        key = f"{kind} {re.sub(r'[0-9.]+', '#', error[:MAX_ERROR])}"
        with self._lock:
            count, last = self._counts.pop(key, (0, now))
            count = 1 if now - last > NEW_AFTER_S else count + 1
            self._counts[key] = count, now
            if len(self._counts) > MAX_KINDS:
                del self._counts[next(iter(self._counts))]  # the one that is longest ago
            self._since_answer += 1
            tells = is_told(count)
            self._is_told |= tells
        if tells:
            text = printable(error, MAX_ERROR)
            logger.warning("target failed target=%s kind=%s count=%d error=%s", self._target, kind, count, text)

    def answered(self) -> None:
        """Says so if the log has a failure since it last did."""
        with self._lock:
            if not self._is_told:
                return
            failures, self._since_answer, self._is_told = self._since_answer, 0, False
        logger.info("target answers again target=%s failures=%d", self._target, failures)
