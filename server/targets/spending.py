"""What calls to somebody else's server cost, and the budget of a day.

What a call costs is known only afterwards. So an estimate, the cost of the most expensive call of the day, is set aside
before each call and replaced by the cost afterwards. The budget is exceeded only by what calls cost more than the
estimate at their start. A call that broke off may have been billed, so its estimate counts as spent, but it says
nothing about later calls. Each day begins with the first guess again, so that one odd call cannot end all later days.
Days are those of UTC. The clock is an argument.

The file is synced after each call that costs something, so that what a power cut takes away is not spent again. The
budget itself bounds how often that is, and with it the wear of an SD card. A second server with the same file would
overwrite the sum of the first one, so the first one holds a lock.
"""

import fcntl
import json
import logging
import os
import threading
import weakref
from datetime import datetime, timezone
from math import isfinite
from pathlib import Path

from edge_runtime.disk import replace_file
from edge_runtime.errors import ConfigError

logger = logging.getLogger(__name__)

DAY_S = 86_400
MAX_FILE = 4096  # bytes


class Spending:
    """Any number of threads. All amounts are in one currency; now: seconds, Unix time."""

    def __init__(self, budget: float | None, estimate: float, file: Path | None = None) -> None:
        """budget: of a day; None: no limit. estimate: of a call's cost, while none of the day is known.

        file: keeps what was spent today over a restart. It is locked as long as this object exists: a call that is cut
        off at the end of a server still writes. Raises ConfigError if it is locked already, or if it cannot be read,
        written or locked.
        """
        self.budget, self._file, self._first_estimate = budget, file, estimate
        self._lock = threading.Lock()  # over all below
        self._day, self._today, self.total = 0, 0.0, 0.0
        self._dearest = 0.0  # cost of the most expensive call of the day; 0: none is known
        self._set_aside = 0.0
        self._is_file_broken = False
        if file:
            weakref.finalize(self, os.close, _locked(file))
            self._day, self._today, self._dearest = _read(file)
            try:
                self._write()
            except OSError as error:
                raise ConfigError(f"spent_file = {file}: cannot be written: {error.strerror}") from error

    def begin(self, now: float) -> float | None:
        """Sets the estimate of one call aside and returns it, for `end`. None: the budget has no room for the call."""
        with self._lock:
            self._start_day(now)
            estimate = self._estimate
            if self.budget is not None and self._today + self._set_aside + estimate > self.budget:
                return None
            self._set_aside += estimate
            return estimate

    def end(self, set_aside: float, cost: float | None, now: float) -> None:
        """A call has ended. set_aside: what `begin` returned; cost: of the call; None: unknown, so its estimate."""
        with self._lock:
            self._start_day(now)
            self._set_aside -= set_aside
            self._dearest = max(self._dearest, cost or 0.0)
            cost = set_aside if cost is None else cost
            self._today += cost
            self.total += cost
            if cost and self._file:
                try:
                    self._write()
                    self._is_file_broken = False
                except OSError as error:
                    if not self._is_file_broken:
                        logger.error("spent_file not written file=%s error=%s", self._file, error.strerror)
                    self._is_file_broken = True

    def today(self, now: float) -> float:
        """What was spent since the day began."""
        with self._lock:
            self._start_day(now)
            return self._today

    def is_spent(self, now: float) -> bool:
        """The budget of the day has no room for one more call, even if none is being made."""
        with self._lock:
            self._start_day(now)
            return self.budget is not None and self._today + self._estimate > self.budget

    @property
    def _estimate(self) -> float:
        """Under the lock."""
        return self._dearest or self._first_estimate

    def _start_day(self, now: float) -> None:
        """Under the lock."""
        day = int(now // DAY_S)
        if self._day - 1 <= day <= self._day:  # a clock that is set back over midnight begins no second day
            return
        self._day, self._today, self._dearest = day, 0.0, 0.0

    def _write(self) -> None:
        """Under the lock. Raises OSError."""
        assert self._file
        content = {"day": self._day, "spent": self._today, "dearest": self._dearest}
        replace_file(self._file, json.dumps(content).encode())


def next_day(now: float) -> str:
    """When the next day begins, for people."""
    return datetime.fromtimestamp((now // DAY_S + 1) * DAY_S, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _locked(file: Path) -> int:
    """A descriptor that holds the lock of this file until it is closed. Raises ConfigError.

    The lock is on a file beside it, since each write puts another file in its place.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file.with_name(f".{file.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"spent_file = {file}: cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            why = "another server uses it: give each server a spent_file of its own"
        else:
            why = f"cannot be locked: {error.strerror}: name a file on a disk of this machine"
        raise ConfigError(f"spent_file = {file}: {why}") from error
    return descriptor


def _read(file: Path) -> tuple[int, float, float]:
    """Day (days of Unix time), amount, and cost of the day's most expensive call. Raises ConfigError.

    A file that is not there says 0, and one without the last says 0 of that.
    """
    try:
        with file.open("rb") as opened:
            content = json.loads(opened.read(MAX_FILE))
        day, spent, dearest = int(content["day"]), float(content["spent"]), float(content.get("dearest", 0.0))
    except FileNotFoundError:
        return 0, 0.0, 0.0
    except OSError as error:
        raise ConfigError(f"spent_file = {file}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"spent_file = {file}: is not one of this program: name another file") from error
    if not (isfinite(spent) and spent >= 0 and isfinite(dearest) and dearest >= 0 and 0 <= day < 1 << 20):
        raise ConfigError(f"spent_file = {file}: is not one of this program: name another file")
    return day, spent, dearest
