"""Boards and servers as child processes with generated configurations, for the demo and the benchmarks.

A child ends with `with`, or with the process that started it; what it logs is kept, so that its own words tell why it
failed.
"""

import json
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from edge_runtime.config import MqttConfig
from edge_runtime.errors import AiflowError
from edge_runtime.mqtt.client import Message, MqttClient
from edge_runtime.wire import topics

START_S = 300.0  # a slow or busy machine takes a while to load torch
STOP_S = 25.0  # a server or a board that hangs says where, and ends, within 20 s
LOG_LINES = 12
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what ends a demo or a benchmark


P = TypeVar("P", bound="Process")


class ChildError(AiflowError, ValueError):
    """A child process ended when it should not have, or did not start."""


class Process:
    """A child process with a log of its own, which may be started again; `with` starts and stops it."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.command, self.log = command, log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self: P) -> P:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        with undisturbed(), self.log.open("ab") as output:
            # A session of its own: Ctrl-C in a terminal must not end all children at once, but in their order.
            # Python finds modules in the working folder first, and there are none in ours.
            self._process = subprocess.Popen(
                with_parent(*self.command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.log.parent,
                start_new_session=True,
            )

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """Raises ChildError for one that was not started."""
        if self._process is None:
            raise ChildError(f"{self.command[0]} was not started: this is a fault of the benchmark")
        return self._process

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for what does not obey; also for what was frozen, or has ended."""
        if self._process is None:
            return
        for number in (signal.SIGCONT, signal.SIGTERM):
            with suppress(ProcessLookupError):
                self._process.send_signal(number)
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        finally:  # whatever interrupts the wait, nothing is left behind
            self._process.kill()
            self._process.wait()

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def with_parent(*command: str) -> list[str]:
    """A command that ends with the thread that starts it, where util-linux is there to arrange that."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", *command] if setpriv else list(command)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals that interrupt come behind it: amid Popen they would leave a process that nobody knows of."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers in the main thread only
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in INTERRUPTS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda received, _: came.append(received))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for received in came:
            signal.raise_signal(received)


class Child(Process):
    """One `aiflow` subcommand with a TOML file of its own."""

    def __init__(self, name: str, tables: dict[str, Any], folder: Path) -> None:
        self.name, config = name, folder / f"{name}.toml"
        config.write_text(toml(tables))
        super().__init__([sys.executable, "-m", "firmware_tools", name, str(config)], folder / f"{name}.log")

    def has_ended(self) -> bool:
        """True: with success. Raises ChildError with the end of its log for anything else."""
        code = self.process.poll()
        if code:
            log = self.said().splitlines()[-LOG_LINES:]
            raise ChildError("\n  ".join([f"`aiflow {self.name}` ended with exit code {code}; it said last:", *log]))
        return code == 0


def wait_serving(server: Child, port: int, site: str, name: str) -> None:
    """Until a server's status says that requests reach it. Raises ChildError."""
    statuses: queue.SimpleQueue[Message] = queue.SimpleQueue()
    topic = topics.server_status(site, name)
    settings = MqttConfig(port=port).settings(f"waits-for-{name}")
    until = time.monotonic() + START_S
    with MqttClient(settings, subscriptions=[(topic, 1)], on_message=statuses.put):
        while time.monotonic() < until:
            server.has_ended()
            with suppress(queue.Empty):
                if json.loads(statuses.get(timeout=0.2).payload).get("share_proven"):
                    return
    raise ChildError(f"the server did not start within {START_S:.0f} s: try again when the machine is less busy")


def toml(tables: dict[str, Any]) -> str:
    """Tables of plain values, and lists of such tables. JSON's strings, numbers and booleans are TOML's too."""
    lines: list[str] = []
    for name, table in tables.items():
        for entry in table if isinstance(table, list) else [table]:
            lines.append(f"[[{name}]]" if isinstance(table, list) else f"[{name}]")
            lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in entry.items()]
    return "\n".join(lines) + "\n"
