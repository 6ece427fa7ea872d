"""Real brokers for the tests: Mosquitto processes on loopback ports that a test may kill, freeze and restart empty."""

import os
import signal
from pathlib import Path
from typing import NoReturn

import pytest

from testbed.broker import KEEP_USER, find_mosquitto, free_port, wait_listening
from testbed.processes import Process

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


class Mosquitto(Process):
    """One broker without persistence: every start is a start with empty state. The port stays the same."""

    def __init__(self, folder: Path, config: str = PLAIN) -> None:
        self.port = free_port()
        settings = folder / f"mosquitto-{self.port}.conf"
        settings.write_text(KEEP_USER + config.format(port=self.port, folder=folder))
        super().__init__([mosquitto_or_skip(), "-v", "-c", str(settings)], folder / f"mosquitto-{self.port}.log")

    def start(self) -> None:
        super().start()
        wait_listening(self.process, self.port, self.log)

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, which a frozen process gets too."""
        self.process.kill()
        self.process.wait()
