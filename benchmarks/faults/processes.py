"""The real processes that faults happen to: brokers, servers and boards, started, killed and frozen by their number.

A process that somebody killed on purpose is no error here; one that ends by itself is.
"""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from testbed.broker import KEEP_USER, BrokerError, find_mosquitto, free_port, wait_listening
from testbed.processes import ChildError, Process, toml

PLAIN = """
listener {port} 127.0.0.1
allow_anonymous true
persistence false
set_tcp_nodelay true
"""
# For the broker that brings the events: what is counted must not be dropped there.
UNBOUNDED = PLAIN + "max_queued_messages 0\nmax_inflight_messages 0\n"

END_S = 60.0  # for a process to end on a busy machine; one that hangs says where within 20 s, and ends


class Victim(Process):
    """A process that faults happen to."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: int) -> None:
        """Also waits for the end where the signal is one that ends. Raises ChildError where none comes."""
        self.process.send_signal(number)
        if number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                raise ChildError(f"{self.log.stem} is there {END_S:.0f} s after signal {number}") from None

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def check(self) -> None:
        """Raises ChildError for a process that has ended."""
        if (code := self.process.poll()) is not None:
            raise ChildError(f"{self.log.stem} ended with exit code {code}; it said last: {self.said()[-1500:]}")


class Broker(Victim):
    """Mosquitto without persistence: each start is one with empty state, on the same port."""

    def __init__(self, folder: Path, name: str, config: str = PLAIN) -> None:
        program = find_mosquitto()
        if program is None:
            raise BrokerError("mosquitto is needed, since it is killed and frozen here: apt install mosquitto")
        self.port, self.path = free_port(), folder / f"{name}.conf"
        self.configure(config)
        super().__init__([program, "-c", str(self.path)], folder / f"{name}.log")

    def configure(self, config: str) -> None:
        """For the next start."""
        self.path.write_text(KEEP_USER + config.format(port=self.port))

    def start(self) -> None:
        super().start()
        wait_listening(self.process, self.port, self.log)


class Aiflow(Victim):
    """`aiflow run` or `aiflow serve` with a configuration; sabotage: a fault from `saboteur` inside of it."""

    def __init__(
        self, command: str, tables: dict[str, Any], folder: Path, name: str, sabotage: str | None = None
    ) -> None:
        config = folder / f"{name}.toml"
        config.write_text(toml(tables))
        module = ["benchmarks.faults.fault_injection", sabotage] if sabotage else ["firmware_tools"]
        super().__init__([sys.executable, "-m", *module, command, str(config)], folder / f"{name}.log")

    def start(self) -> None:
        if not shutil.which(self.command[0]):
            raise ChildError(f"{self.command[0]} is no program: run this with the Python that has aiflow installed")
        super().start()

    def summary(self) -> dict[str, int]:
        """What a board that stopped in good order counted; empty before, and where it was killed."""
        lines = [line for line in self.said().splitlines() if "board stopped " in line]
        return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", lines[-1])} if lines else {}
