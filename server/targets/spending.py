"""What calls to somebody else's server cost, and the budget of a day.

What a call costs is known only afterwards. So an estimate, the dearest call so far, is set aside before each call and
replaced by the cost afterwards: the budget is not exceeded by more than calls that are dearer than all before. A call
that broke off may have been billed, so its estimate counts as spent. Days are those of UTC. The clock is an argument.

The file is synced after each call that costs something, so that what a power cut takes away is not spent again. The
budget itself bounds how often that is, and with it the wear of an SD card.
"""

import json
import logging
import threading
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
        """budget: of a day; None: no limit. estimate: of a call's cost, before there was one.

        file: keeps what was spent today over a restart. Raises ConfigError if it can be neither read nor written.
        """
        self.budget, self._file = budget, file
        self._first_estimate = self._estimate = estimate
        self._lock = threading.Lock()  # over all below
        self._day, self._today, self.total = 0, 0.0, 0.0
        self._set_aside = 0.0
        self._is_file_broken = False
        if file:
            self._day, self._today = _read(file)
            try:
                self._write()
            except OSError as error:
                raise ConfigError(f"spent_file = {file}: cannot be written: {error.strerror}") from error

    def begin(self, now: float) -> float | None:
        """Sets the estimate of one call aside and returns it, for `end`. None: the budget has no room for the call."""
        with self._lock:
            self._start_day(now)
            if self.budget is not None and self._today + self._set_aside + self._estimate > self.budget:
                return None
            self._set_aside += self._estimate
            return self._estimate

    def end(self, set_aside: float, cost: float, now: float) -> None:
        """A call has ended. set_aside: what `begin` returned; cost: of the call, its estimate if that is not known."""
        with self._lock:
            self._start_day(now)
            self._set_aside -= set_aside
            self._today += cost
            self.total += cost
            self._estimate = max(self._estimate, cost)
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

    def _start_day(self, now: float) -> None:
        """Under the lock."""
        day = int(now // DAY_S)
        if self._day - 1 <= day <= self._day:  # a clock that is set back over midnight begins no second day
            return
        self._day, self._today, self._estimate = day, 0.0, self._first_estimate

    def _write(self) -> None:
        """Under the lock. Raises OSError."""
        assert self._file
        self._file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._file, json.dumps({"day": self._day, "spent": self._today}).encode())


def next_day(now: float) -> str:
    """When the next day begins, for people."""
    return datetime.fromtimestamp((now // DAY_S + 1) * DAY_S, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _read(file: Path) -> tuple[int, float]:
    """Day (days of Unix time) and amount; a file that is not there says 0. Raises ConfigError."""
    try:
        with file.open("rb") as opened:
            content = json.loads(opened.read(MAX_FILE))
        day, spent = int(content["day"]), float(content["spent"])
    except FileNotFoundError:
        return 0, 0.0
    except OSError as error:
        raise ConfigError(f"spent_file = {file}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ConfigError(f"spent_file = {file}: is not one of this program: name another file") from error
    if not (isfinite(spent) and spent >= 0 and 0 <= day < 1 << 20):
        raise ConfigError(f"spent_file = {file}: is not one of this program: name another file")
    return day, spent
