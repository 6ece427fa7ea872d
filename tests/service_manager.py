"""A service manager's end of sd_notify: the socket that systemd would listen on."""

import socket
import time
from pathlib import Path

from tests.listener import PATIENCE_S

WATCHDOG_S = 0.4  # a ping is due every 0.1 s
SILENCE_S = 2.0  # in which a thread that only keeps time would have sent twenty


class ServiceManager:
    """Use it with `with`."""

    def __init__(self, address: str) -> None:
        """address: a path, or @NAME for an abstract socket."""
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)

    def __enter__(self) -> "ServiceManager":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def environment(self) -> dict[str, str]:
        """What systemd gives to a service of Type=notify with a watchdog."""
        return {"NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": str(round(WATCHDOG_S * 1e6))}

    def next(self, timeout_s: float = PATIENCE_S) -> str:
        """The next message. Raises TimeoutError."""
        self._socket.settimeout(timeout_s)
        return self._socket.recv(4096).decode()

    def wait_for(self, start: str) -> str:
        """The next message that begins so; those before it are dropped."""
        while not (message := self.next()).startswith(start):
            pass
        return message

    def pending(self) -> list[str]:
        """The messages that have arrived already."""
        self._socket.setblocking(False)
        messages = []
        try:
            while True:
                messages.append(self._socket.recv(4096).decode())
        except BlockingIOError:
            return messages

    def hears_the_last_ping(self) -> bool:
        """Pings end, after some more."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            if self.is_silent():
                return True
        return False

    def is_silent(self) -> bool:
        """No ping comes from now on."""
        self.pending()
        try:
            while self.next(SILENCE_S) != "WATCHDOG=1":
                pass
        except TimeoutError:
            return True
        return False


def at(folder: Path) -> ServiceManager:
    return ServiceManager(str(folder / "notify"))
