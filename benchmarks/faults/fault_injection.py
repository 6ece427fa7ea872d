"""Faults inside a process: `python -m benchmarks.faults.fault_injection FAULT MODULE ...` runs a module with a fault.

The module's code is unchanged. A signal causes the fault:
- clock: SIGUSR1 sets time.time() a year ahead, SIGUSR2 to 1970. Clocks that C code reads (datetime.now, SQLite, TLS)
  and the monotonic clock stay right.
- callbacks: after SIGUSR1, each callback of the MQTT client raises once instead of running.
- thread: SIGUSR1 raises an exception in every MQTT network thread, wherever it is.
- names: no host name resolves, only addresses do; SIGUSR1 ends this.
"""

import ctypes
import ipaddress
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from edge_runtime.mqtt import MqttClient

YEAR_S = 365 * 86400.0
CALLBACKS = ("_connected", "_subscribed", "_published", "_received", "_disconnected")


class InjectedFaultError(RuntimeError):
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

    def failing_guard(client: MqttClient, function: Callable[..., Any], *arguments: Any) -> Any:
        name = getattr(function, "__name__", "outcome")

        def raises(*_: object) -> None:
            raise InjectedFaultError(f"in {name}")

        if name in armed:
            armed.discard(name)
            function = raises
        return guard(client, function, *arguments)

    setattr(MqttClient, "_guard", failing_guard)  # noqa: B010 - mypy refuses an assignment to a method
    signal.signal(signal.SIGUSR1, lambda *_: armed.update((*CALLBACKS, "outcome")))


def thread() -> None:
    def interrupt(*_: object) -> None:
        for network_thread in threading.enumerate():
            if network_thread.name.startswith("mqtt-") and network_thread.ident:
                ident, error = ctypes.c_ulong(network_thread.ident), ctypes.py_object(InjectedFaultError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, error)

    signal.signal(signal.SIGUSR1, interrupt)


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
    _, fault, module, *arguments = sys.argv
    {"clock": clock, "callbacks": callbacks, "thread": thread, "names": names}[fault]()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
