"""Reports of a service to its manager: systemd's sd_notify protocol, without its library.

Each message is a datagram on the AF_UNIX socket that NOTIFY_SOCKET names: man sd_notify(3). Knows nothing of boards and
servers: it is told when there was progress. No thread of its own sends anything, so a program that hangs falls silent,
and systemd starts it again.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, MutableMapping

from edge_runtime.errors import ConfigError
from edge_runtime.logs import is_told, printable

logger = logging.getLogger(__name__)

MAX_ADDRESS = 107  # bytes: sun_path of unix(7) without its end
MAX_STATUS = 256  # characters
# Messages per watchdog timeout; sd_watchdog_enabled(3) recommends two. Progress sends none if the last one was less
# than a tenth of the timeout ago, and systemd counts from that one. So one step may take nine tenths of the timeout.
PINGS = 10
WAIT_S = 5.0  # for room in the manager's queue, for messages that come once


class Notifier:
    """Sends to one socket. Any thread may call any method, and none raises: a manager that is away is not our fault."""

    def __init__(self, address: str = "", watchdog_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        """address: a path, or @NAME for an abstract socket; "": sends nothing. watchdog_s: 0: `progress` sends nothing.

        Raises ConfigError for any other address.
        """
        if address and (address[0] not in "/@" or len(os.fsencode(address)) > MAX_ADDRESS):
            raise ConfigError(
                f"NOTIFY_SOCKET = {printable(address, MAX_STATUS)}: want a path that begins with / or a name that "
                f"begins with @, at most {MAX_ADDRESS} bytes; unset it if no service manager started this"
            )
        self._address = b"\0" + os.fsencode(address[1:]) if address.startswith("@") else os.fsencode(address)
        self._watchdog_s, self._ping_s, self._clock = watchdog_s, watchdog_s / PINGS, clock
        self._next_ping = 0.0
        self.failed = 0  # messages that could not be sent

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str]) -> "Notifier":
        """As the service manager has set it up. Takes the variables out, so that no child speaks in our name.

        Raises ConfigError for values that are none of systemd's.
        """
        address = environment.pop("NOTIFY_SOCKET", "")
        usec, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        if usec and not (usec.isascii() and usec.isdigit() and len(usec) < 20):
            raise ConfigError(
                f"WATCHDOG_USEC = {printable(usec, MAX_STATUS)}: want microseconds, or unset it: WatchdogSec= sets it"
            )
        is_for_us = pid in ("", str(os.getpid()))
        return cls(address, int(usec or 0) / 1e6 if is_for_us else 0.0)

    def starting(self, silent_s: float) -> None:
        """The next step of the start may take `silent_s`: systemd waits longer than its TimeoutStartSec=."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(silent_s * 1e6)}", WAIT_S)

    @property
    def is_heard(self) -> bool:
        """A service manager started this process."""
        return bool(self._address)

    def ready(self) -> None:
        """The start is over: systemd starts what waits for it, and expects `progress` from now on."""
        self._send("READY=1", WAIT_S)

    def stopping(self) -> None:
        """The end has begun: systemd expects no more progress."""
        self._send("STOPPING=1", WAIT_S)

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={printable(text, MAX_STATUS)}")

    def allow(self, silent_s: float) -> None:
        """One piece of work may take so long: systemd waits longer than its WatchdogSec= from now on."""
        if self._watchdog_s and silent_s:
            self._send(f"WATCHDOG_USEC={round((silent_s + self._watchdog_s) * 1e6)}", WAIT_S)

    def progress(self) -> None:
        """A piece of work is done, or none was there to do. Call it as often as you like: most calls send nothing."""
        now = self._clock()
        if self._ping_s and now >= self._next_ping:
            self._next_ping = now + self._ping_s
            self._send("WATCHDOG=1")

    def _send(self, message: str, wait_s: float = 0.0) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(wait_s)
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            self.failed += 1
            if is_told(self.failed):
                logger.warning("service manager not told count=%d message=%s error=%s", self.failed, message, error)
