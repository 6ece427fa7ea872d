"""`aiflow run` as systemd sees it: ready, progress while frames come and while none is due, silence when it hangs."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import MqttClient, MqttConfig
from edge_runtime.wire import topics
from firmware_tools.cli import EXIT_RESTART
from tests import runtimes
from tests.brokers import Mosquitto
from tests.edge_runtime.capture.helpers import jpeg, write_photos
from tests.listener import PATIENCE_S, Listener
from tests.service_manager import ServiceManager, at

CONFIG = """
[board]
id = "b1"
bundle = "{bundle}"
paradigm = "device"
backend = "onnx"
[mqtt]
port = {port}
[[cameras]]
name = "door"
source = "{source}"
interval_s = 0
"""
RUN = "import sys; from firmware_tools.cli import main; sys.exit(main(sys.argv[1:]))"
# Before the command: something that hangs as soon as the board works, and says so.
FRAME_THREAD_HANGS = """
import threading
from edge_runtime.pipeline import Pipeline
def hang(*_):
    print("hangs", flush=True)
    threading.Event().wait()
Pipeline.answer = hang
"""
REQUESTS_HANG = """
import threading
from edge_runtime.requests import thread
from edge_runtime.requests.lifecycle import RequestLifecycle
thread.HANG_S = 0.5
def hang(*_, **__):
    print("hangs", flush=True)
    threading.Event().wait()
RequestLifecycle.on_time = hang
"""
CONNECTION_HANGS = """
import threading
from edge_runtime.mqtt import client
client.HANG_S = 0.5
def hang(*_):
    print("hangs", flush=True)
    threading.Event().wait()
client.MqttClient._watch = hang
"""

TOLD_DURING_IMPORTS = """
import os, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "edge_runtime.app":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    with at(tmp_path) as manager:
        yield manager


@pytest.fixture
def start(
    tmp_path: Path, board_bundle: Bundle, broker: Mosquitto, manager: ServiceManager
) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """A function that starts `aiflow run` under the manager with a camera of this source."""
    with ExitStack() as stack:

        def start(source: str, before: str = "") -> "subprocess.Popen[str]":
            config = tmp_path / "board.toml"
            config.write_text(CONFIG.format(bundle=board_bundle.path, port=broker.port, source=source))
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", before + RUN, "run", "--no-show", str(config)],
                    env=os.environ | manager.environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process

        yield start


def test_a_board_is_ready_makes_progress_without_and_with_frames_and_says_that_it_stops(
    start: Callable[..., "subprocess.Popen[str]"], manager: ServiceManager, broker: Mosquitto
) -> None:
    process = start("mqtt")
    manager.wait_for("READY=1")
    for _ in range(3):  # no frame is due
        manager.wait_for("WATCHDOG=1")
    with (
        Listener(broker.port, topics.event("home", "b1")) as events,
        MqttClient(MqttConfig(port=broker.port).settings("camera")) as camera,
    ):
        for shade in range(3):
            assert camera.wait_online(PATIENCE_S)
            camera.publish(topics.frame("home", "b1", "door"), jpeg(40 * shade), qos=1)
            assert events.next()
            manager.wait_for("WATCHDOG=1")
    process.send_signal(signal.SIGTERM)
    manager.wait_for("STOPPING=1")
    assert process.wait(PATIENCE_S) == 0
    assert "WATCHDOG=1" not in manager.pending()


def test_a_board_with_a_frame_at_any_moment_makes_progress(
    start: Callable[..., "subprocess.Popen[str]"], manager: ServiceManager, tmp_path: Path
) -> None:
    process = start(write_photos(tmp_path / "photos", *range(0, 250, 2)))
    manager.wait_for("READY=1")
    manager.wait_for("WATCHDOG=1")
    manager.wait_for("STOPPING=1")  # the photos have ended
    assert process.wait(PATIENCE_S) == 0


def test_a_board_is_ready_without_its_broker_and_its_status_says_what_is_wrong(
    start: Callable[..., "subprocess.Popen[str]"], manager: ServiceManager, broker: Mosquitto
) -> None:
    broker.stop()
    start("mqtt")
    seen = {manager.next()}
    while not {"READY=1", "WATCHDOG=1"} <= seen or not any("backoff" in message for message in seen):
        seen.add(manager.next())
    assert any(message.startswith(f"STATUS=broker 127.0.0.1:{broker.port} backoff: ") for message in seen)


@pytest.mark.parametrize("before", [FRAME_THREAD_HANGS, REQUESTS_HANG, CONNECTION_HANGS])
def test_a_board_that_hangs_falls_silent(
    start: Callable[..., "subprocess.Popen[str]"], manager: ServiceManager, tmp_path: Path, before: str
) -> None:
    process = start(write_photos(tmp_path / "photos", 10) if before is FRAME_THREAD_HANGS else "mqtt", before)
    manager.wait_for("READY=1")
    assert process.stdout
    assert process.stdout.readline() == "hangs\n"
    if before is FRAME_THREAD_HANGS:
        assert manager.is_silent()
    else:
        assert manager.hears_the_last_ping()


def test_a_board_that_is_stopped_by_a_signal_falls_silent_and_goes_on(
    start: Callable[..., "subprocess.Popen[str]"], manager: ServiceManager
) -> None:
    process = start("mqtt")
    manager.wait_for("WATCHDOG=1")
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert manager.is_silent()
    process.send_signal(signal.SIGCONT)
    manager.wait_for("WATCHDOG=1")


def test_a_hangup_ends_a_board_in_order_to_be_started_again(
    start: Callable[..., "subprocess.Popen[str]"], manager: ServiceManager
) -> None:
    process = start("mqtt")
    manager.wait_for("READY=1")
    process.send_signal(signal.SIGHUP)
    manager.wait_for("STOPPING=1")
    assert process.wait(PATIENCE_S) == EXIT_RESTART


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, os.EX_OK), (signal.SIGHUP, EXIT_RESTART)])
def test_a_board_that_is_told_to_stop_while_it_tries_a_backend_ends_in_order(
    start: Callable[..., "subprocess.Popen[str]"],
    manager: ServiceManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    runtimes.install(tmp_path / "packages", monkeypatch, "onnxruntime", runtimes.HANGS)
    process = start("mqtt")
    manager.wait_for("EXTEND_TIMEOUT_USEC=")
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, os.EX_OK), (signal.SIGHUP, EXIT_RESTART)])
def test_a_board_that_is_told_to_stop_while_its_libraries_load_ends_in_order(
    start: Callable[..., "subprocess.Popen[str]"], number: int, code: int
) -> None:
    assert start("mqtt", TOLD_DURING_IMPORTS.format(number=int(number))).wait(PATIENCE_S) == code


def test_a_board_that_is_told_to_stop_before_it_has_read_its_configuration_exits_with_0(tmp_path: Path) -> None:
    os.mkfifo(config := tmp_path / "board.toml")
    command = [sys.executable, "-m", "firmware_tools", "run", str(config)]
    with subprocess.Popen(command) as process, config.open("w"):  # opened: the board reads, and waits for what comes
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == os.EX_OK


def test_programs_that_a_board_starts_do_not_speak_to_the_manager(manager: ServiceManager) -> None:
    code = (
        "import os; from edge_runtime.sd_notify import Notifier; Notifier.from_environment(os.environ)\n"
        "os.execvp('env', ['env'])"
    )
    environment = os.environ | manager.environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "PATH=" in done.stdout
    assert "NOTIFY_SOCKET" not in done.stdout
    assert "WATCHDOG_USEC" not in done.stdout
