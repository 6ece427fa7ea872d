"""Faults that must happen inside a process: `python -m benchmarks.faults.fault_injection FAULT run board.toml`.

The runtime itself is the one that ships; a signal lets the fault happen:
- clock: SIGUSR1 sets what time.time() says a year ahead, SIGUSR2 to 1970. Clocks read in C (datetime.now, SQLite, TLS)
  stay right, and so does the monotonic one.
- callbacks: SIGUSR1 makes each of the MQTT client's callbacks raise at its next call, in its place.
- thread: SIGUSR1 raises an exception in every MQTT network thread, wherever it is at that moment.
- names: from the start no host name resolves, addresses do; after SIGUSR1 names do as well.
"""

import ctypes
import ipaddress
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from edge_runtime.mqtt.client import MqttClient
from firmware_tools import cli

YEAR_S = 365 * 86400.0
CALLBACKS = ("_connected", "_subscribed", "_published", "_received", "_disconnected")


class SabotageError(RuntimeError):
    """Raised on purpose."""


def clock() -> None:
    real, offset = time.time, [0.0]

    def jump(number: int, _: object) -> None:
        offset[0] = YEAR_S if number == signal.SIGUSR1 else -real()

    time.time = lambda: real() + offset[0]
    signal.signal(signal.SIGUSR1, jump)
    signal.signal(signal.SIGUSR2, jump)


def callbacks() -> None:
    armed: set[str] = set()
    guard = MqttClient._guard

    def sabotaged(client: MqttClient, function: Callable[..., Any], *arguments: Any) -> Any:
        name = getattr(function, "__name__", "outcome")

        def raises(*_: object) -> None:
            raise SabotageError(f"in {name}")

        if name in armed:
            armed.discard(name)
            function = raises
        return guard(client, function, *arguments)

    setattr(MqttClient, "_guard", sabotaged)  # noqa: B010 - a method is no variable for mypy
    signal.signal(signal.SIGUSR1, lambda *_: armed.update((*CALLBACKS, "outcome")))


def thread() -> None:
    def strike(*_: object) -> None:
        for victim in threading.enumerate():
            if victim.name.startswith("mqtt-") and victim.ident:
                ident, error = ctypes.c_ulong(victim.ident), ctypes.py_object(SabotageError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, error)

    signal.signal(signal.SIGUSR1, strike)


def names() -> None:
    real, fails = socket.getaddrinfo, [True]

    def resolve(host: Any, *arguments: Any, **named: Any) -> Any:
        if fails:
            try:
                ipaddress.ip_address(host)
            except ValueError:
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution") from None
        return real(host, *arguments, **named)

    socket.getaddrinfo = resolve
    signal.signal(signal.SIGUSR1, lambda *_: fails.clear())


if __name__ == "__main__":
    {"clock": clock, "callbacks": callbacks, "thread": thread, "names": names}[sys.argv[1]]()
    sys.exit(cli.main(sys.argv[2:]))
