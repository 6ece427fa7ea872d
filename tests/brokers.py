"""Real brokers for the tests: Mosquitto processes on loopback ports that a test may kill, freeze and restart empty."""

import os
import signal
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

from firmware_tools.broker import KEEP_USER, find_mosquitto, free_port, wait_listening
from firmware_tools.children import with_parent

PLAIN = """
listener {port} 127.0.0.1
allow_anonymous true
persistence false
set_tcp_nodelay true
"""


def mosquitto_or_skip() -> str:
    """The program; without it the tests are skipped on a developer's machine, but fail in CI: there it must be."""
    return find_mosquitto() or skip("mosquitto is not installed: apt install mosquitto")


def skip(why: str) -> NoReturn:
    """On a developer's machine; in CI it is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


class Mosquitto:
    """One broker without persistence: every start is a start with empty state. The port stays the same."""

    def __init__(self, folder: Path, config: str = PLAIN) -> None:
        self.program = mosquitto_or_skip()
        self.port = free_port()
        self.log = folder / f"mosquitto-{self.port}.log"
        self.config = folder / f"mosquitto-{self.port}.conf"
        self.config.write_text(KEEP_USER + config.format(port=self.port, folder=folder))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Mosquitto":
        with self.log.open("ab") as output:
            command = with_parent(self.program, "-v", "-c", str(self.config))
            self.process = subprocess.Popen(command, stdout=output, stderr=output)
        wait_listening(self.process, self.port, self.log)
        return self

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, which a frozen process gets too."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self) -> "Mosquitto":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
