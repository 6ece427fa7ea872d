"""An MQTT broker on 127.0.0.1 as a child process, for the demo, the benchmarks and the tests.

Mosquitto if it is installed, else rumqttd from the `iotcore` wheel. By default it has no passwords and no TLS, since
only this machine can reach it; docs/DEPLOY.md has the configuration of a real site.
"""

import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from edge_runtime.errors import AiflowError
from testbed.processes import Process

MAX_PACKET = 1 << 20  # bytes
START_S = 10.0

# {port} and {folder} are filled in.
PLAIN = """
listener {port} 127.0.0.1
allow_anonymous true
persistence false
set_tcp_nodelay true
"""
QUIET = f"{PLAIN}max_packet_size {MAX_PACKET}\nlog_type error\nlog_type warning\n"

# This file enables MQTT 5; without a file, the wheel's broker only speaks 3.1.1.
IOTCORE = """
id = 0
[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = 10485760
max_segment_count = 4
[v5.1]
name = "v5"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 5000
max_payload_size = {max_packet}
max_inflight_count = 100
"""

# When root starts Mosquitto, it changes its user. That user cannot read a temporary configuration file, and a process
# that changes its user no longer ends together with its parent (prctl(2), PR_SET_PDEATHSIG).
KEEP_USER = "user root\n" if os.geteuid() == 0 else ""

_given_ports: set[int] = set()


class BrokerError(AiflowError, OSError):
    """No broker could be started."""


def find_mosquitto() -> str | None:
    """The program's path. Debian installs it into /usr/sbin, which is not on a user's PATH."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")


def free_port() -> int:
    """A TCP port that is free now and was not returned before by this process."""
    while True:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = int(sock.getsockname()[1])
        if port not in _given_ports:
            _given_ports.add(port)
            return port


class Mosquitto(Process):
    """A Mosquitto broker without persistence. It keeps its port, and every start begins with empty state."""

    def __init__(
        self, folder: Path, config: str = PLAIN, *, port: int = 0, program: str | None = None, verbose: bool = False
    ) -> None:
        """folder: for its configuration and log. port: 0 takes a free one. program: default: the installed one.

        Raises BrokerError if Mosquitto is not installed.
        """
        program = program or find_mosquitto()
        if program is None:
            raise BrokerError("mosquitto is not installed: apt install mosquitto")
        self.port = port or free_port()
        self._settings = folder / f"mosquitto-{self.port}.conf"
        self.configure(config)
        arguments = ["-v"] * verbose + ["-c", str(self._settings)]
        super().__init__([program, *arguments], self._settings.with_suffix(".log"), "mosquitto")

    def configure(self, config: str) -> None:
        """Replaces the configuration, for the next start."""
        self._settings.write_text(KEEP_USER + config.format(port=self.port, folder=self._settings.parent))

    def start(self) -> None:
        """Returns when it listens. Raises BrokerError with the end of its log if it does not."""
        super().start()
        deadline = time.monotonic() + START_S
        while self.is_running() and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)  # there is no event for the listening socket of another process
        self.kill()
        raise BrokerError(f"broker does not listen on port {self.port}: {self.said()[-500:]}")

    def freeze(self) -> None:
        """Stops it without closing its connections, until `thaw`."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)


@contextmanager
def start_embedded(port: int = 0, *, mosquitto: str | None = find_mosquitto()) -> Iterator[int]:
    """Runs a broker during the `with` block and yields its port. port: 0 takes a free one.

    mosquitto: its program; None starts iotcore. Raises BrokerError if no broker can be started.
    """
    port = port or free_port()
    with ExitStack() as running:
        # The broker reads its file once and keeps its log open. Deleting both as soon as it listens leaves nothing
        # behind, even if this process is killed.
        with tempfile.TemporaryDirectory(prefix="aiflow-broker-") as folder:
            if mosquitto:
                running.enter_context(Mosquitto(Path(folder), QUIET, port=port, program=mosquitto))
            else:
                running.enter_context(_run_iotcore(Path(folder), port))
        yield port


@contextmanager
def _run_iotcore(folder: Path, port: int) -> Iterator[None]:
    try:
        from iotcore import Broker
    except ImportError as error:
        raise BrokerError("no broker found: apt install mosquitto, or pip install iotcore") from error
    config = folder / "broker.toml"  # rumqttd only reads a file with this suffix
    config.write_text(IOTCORE.format(port=port, max_packet=MAX_PACKET))
    broker = Broker(config_path=str(config))
    try:
        broker.start()  # its process ends by itself when this one does
    except (OSError, RuntimeError) as error:
        raise BrokerError(f"iotcore did not start: {error}") from error
    try:
        yield
    finally:
        broker.stop()
