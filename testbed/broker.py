"""A broker for the demo and for quick tests: a child process on loopback, with nothing left behind when it stops.

Mosquitto where it is installed, else rumqttd from the `iotcore` wheel. Neither has passwords or TLS here: a broker that
other machines can reach is a service of its own, see docs.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from edge_runtime.errors import AiflowError
from testbed.processes import Process

MAX_PACKET = 1 << 20  # bytes

MOSQUITTO = """
listener {port} 127.0.0.1
allow_anonymous true
persistence false
max_packet_size {max_packet}
set_tcp_nodelay true
log_type error
log_type warning
"""

# A connection section for MQTT 5; what the wheel starts without a file speaks 3.1.1 only.
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


# Started by root, mosquitto becomes another user: which could not read a temporary configuration, and a process that
# changes its user no longer ends with its parent (prctl(2), PR_SET_PDEATHSIG).
KEEP_USER = "user root\n" if os.geteuid() == 0 else ""


class BrokerError(AiflowError, OSError):
    """No broker could be started."""


def find_mosquitto() -> str | None:
    """Debian installs it into /usr/sbin, which a user's PATH lacks."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def start_embedded(port: int = 0, *, mosquitto: str | None = find_mosquitto()) -> Iterator[int]:
    """Yield the port of a broker on 127.0.0.1; 0 takes a free one. mosquitto: its program; None uses iotcore.

    Raises BrokerError when neither can be started.
    """
    port = port or free_port()
    # The broker reads its file once and keeps its log open, so both may go as soon as it listens: then nothing is left
    # behind even when this process is killed.
    with ExitStack() as running:
        with tempfile.TemporaryDirectory(prefix="aiflow-broker-") as folder:
            config = Path(folder) / "broker.toml"  # rumqttd reads it only under this ending; mosquitto does not mind
            config.write_text(
                (KEEP_USER + MOSQUITTO if mosquitto else IOTCORE).format(port=port, max_packet=MAX_PACKET)
            )
            running.enter_context(run_mosquitto(mosquitto, config, port) if mosquitto else run_iotcore(config))
        yield port


@contextmanager
def run_mosquitto(program: str, config: Path, port: int) -> Iterator[None]:
    with Process([program, "-c", str(config)], config.with_suffix(".log")) as broker:
        wait_listening(broker.process, port, broker.log)
        yield


def wait_listening(process: subprocess.Popen[bytes], port: int, log: Path, timeout_s: float = 10.0) -> None:
    """Raises BrokerError with the end of the log when the broker exits or does not listen in time."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)  # nothing to wait on: the listening socket of another process gives no event
    process.kill()
    process.wait()
    raise BrokerError(f"broker does not listen on port {port}: {log.read_text(errors='replace')[-500:]}")


@contextmanager
def run_iotcore(config: Path) -> Iterator[None]:
    try:
        from iotcore import Broker
    except ImportError as error:
        raise BrokerError("no broker found: install mosquitto, or `pip install iotcore`") from error
    broker = Broker(config_path=str(config))
    try:
        broker.start()  # its child ends by itself when this process does
    except (OSError, RuntimeError) as error:
        raise BrokerError(f"iotcore did not start: {error}") from error
    try:
        yield
    finally:
        broker.stop()
