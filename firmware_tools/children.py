"""Boards and servers as child processes with generated configurations, for the demo and the benchmarks.

A child ends with `with`, or with the process that started it; what it logs is kept, so that its own words tell why it
failed.
"""

import json
import queue
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_runtime.config import MqttConfig
from edge_runtime.mqtt import Message, MqttClient
from edge_runtime.wire import topics
from firmware_tools.broker import with_parent

START_S = 300.0  # a slow or busy machine takes a while to load torch
STOP_S = 15.0  # a server finishes what it accepted, at most 10 s by its default
LOG_LINES = 12


class ChildError(ValueError):
    """A child process ended when it should not have, or did not start."""


class Child:
    """One `aiflow` subcommand with a TOML file of its own."""

    def __init__(self, command: str, tables: dict[str, Any], folder: Path) -> None:
        self.command = command
        self._log, self._config, self._folder = folder / f"{command}.log", folder / f"{command}.toml", folder
        self._config.write_text(toml(tables))

    def __enter__(self) -> "Child":
        run = [sys.executable, "-m", "firmware_tools", self.command, str(self._config)]
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C in a terminal must not end all children at once, but in their order.
            # Python finds modules in the working folder first, and there are none in ours.
            self.process = subprocess.Popen(
                with_parent(*run),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        finally:  # whatever interrupts the wait, nothing is left behind
            self.process.kill()
            self.process.wait()

    def has_ended(self) -> bool:
        """True: with success. Raises ChildError with the end of its log for anything else."""
        code = self.process.poll()
        if code:
            log = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            raise ChildError("\n  ".join([f"`aiflow {self.command}` ended with exit code {code}; it said last:", *log]))
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
