"""Boards and servers as child processes with generated configurations, for the demo, the benchmarks and the tests.

A child process ends with its `with` block, or when the process that started it ends. Its output goes to a log file, so
that an error can quote its last lines.
"""

import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from edge_runtime.errors import AiflowError
from edge_runtime.mqtt import Message, MqttClient, MqttConfig
from edge_runtime.wire import EnvelopeError, Event, decode_event, topics
from testbed.statuses import StatusFields, read_status

logger = logging.getLogger(__name__)

START_S = 300.0  # a slow or busy machine takes minutes to load torch
STOP_S = 25.0  # a board or server that hangs logs where, and ends, within 20 s
END_S = 60.0  # for the end of a process after a signal, on a busy machine
LOG_LINES = 12
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that end a demo or a benchmark

P = TypeVar("P", bound="Process")


class ProcessError(AiflowError, ValueError):
    """A child process did not start, or ended when it should not have."""


class Process:
    """A child process with a log file. It can be started again; `with` starts and stops it."""

    def __init__(self, command: Sequence[str], log: Path, name: str) -> None:
        """name: how errors call it."""
        self.command, self.log, self.name = list(command), log, name
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
        """Raises ProcessError if there is no such program."""
        if not shutil.which(self.command[0]):
            raise ProcessError(f"{self.command[0]} is not a program: use the Python that has aiflow-edge installed")
        with _postponed_interrupts(), self.log.open("ab") as output:
            # In a new session, so that Ctrl-C in a terminal does not end all children at once.
            # Python looks for modules in the working directory first; the log's directory contains none.
            self._process = subprocess.Popen(
                _ending_with_parent(self.command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.log.parent,
                env=same_code(),
                start_new_session=True,
            )

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process, f"{self.name} was not started"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        """Sends SIGTERM, and SIGKILL if that is not enough. It may be frozen, or have ended already."""
        if self._process is None:
            return
        for number in (signal.SIGCONT, signal.SIGTERM):
            with suppress(ProcessLookupError):
                self._process.send_signal(number)
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        finally:  # nothing is left behind, even if the wait is interrupted
            self.kill()

    def kill(self) -> None:
        """SIGKILL, which also ends a frozen process."""
        self.process.kill()
        self.process.wait()

    def signal(self, number: int) -> None:
        """After SIGTERM and SIGKILL it waits for the end. Raises ProcessError if the process does not end."""
        self.process.send_signal(number)
        if number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                raise ProcessError(f"{self.name} still runs {END_S:.0f} s after signal {number}") from None

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def has_ended(self) -> bool:
        """True after exit code 0. Raises ProcessError with the end of its log after any other."""
        if code := self.process.poll():
            raise ProcessError(self._last_words(code))
        return code == 0

    def check_running(self) -> None:
        """Raises ProcessError if it has ended."""
        if self.has_ended():
            raise ProcessError(self._last_words(0))

    def wait_for(self, is_so: Callable[[], bool], patience_s: float) -> None:
        """Raises ProcessError if it has ended, or if it has not done after so many seconds what is waited for."""
        deadline = time.monotonic() + patience_s
        while not is_so():
            self.check_running()
            if time.monotonic() > deadline:
                raise ProcessError(f"{self.name} did not respond as expected within {patience_s:.0f} s")
            time.sleep(0.05)  # there is no event for what another process has done

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _last_words(self, code: int) -> str:
        lines = self.said().splitlines()[-LOG_LINES:]
        return "\n  ".join([f"`{self.name}` ended with exit code {code}; it said last:", *lines])


class AiflowProcess(Process):
    """One `aiflow` subcommand with a generated TOML file."""

    def __init__(
        self, command: str, tables: dict[str, Any], folder: Path, name: str = "", through: Sequence[str] = ()
    ) -> None:
        """name: of its files, default: the command. through: a module, with arguments, that runs the command."""
        config = folder / f"{name or command}.toml"
        config.write_text(tomli_w.dumps(tables))
        module = [sys.executable, "-m", *through, "firmware_tools"]
        super().__init__([*module, command, str(config)], config.with_suffix(".log"), f"aiflow {command}")


def same_code() -> dict[str, str]:
    """The environment for a child process that runs the code of this one, wherever the child is started.

    A checkout that was started from its own directory may not be the one that is installed.
    """
    root = Path(__file__).resolve().parents[1]
    if root == Path(sysconfig.get_path("purelib")).resolve():  # installed as a wheel: the child finds it by itself
        return dict(os.environ)
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _ending_with_parent(command: list[str]) -> list[str]:
    """The command, run so that it ends with the thread that starts it, if util-linux is installed."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", *command] if setpriv else command


@contextmanager
def _postponed_interrupts() -> Iterator[None]:
    """Delivers interrupting signals after the block. During Popen they would leave a process that is never stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread only
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in INTERRUPTS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in received:
            signal.raise_signal(late)


@contextmanager
def interrupted_once() -> Iterator[None]:
    """The first signal raises KeyboardInterrupt. Later ones are ignored, so that they do not cut the cleanup short."""

    def interrupt(*_: object) -> None:
        for number in INTERRUPTS:
            signal.signal(number, lambda *_: None)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_event(payload: bytes) -> Event | None:
    """None, and a line in the log, if this is not an event."""
    try:
        return decode_event(payload)
    except EnvelopeError as error:
        logger.warning("event ignored error=%s", error)
        return None


def wait_serving(server: Process, port: int, site: str, name: str) -> None:
    """Waits until a server's status says that requests reach it. Raises ProcessError."""
    _wait_for_status(server, port, topics.server_status(site, name), lambda status: status.share_proven)


def wait_online(board: Process, port: int, site: str, name: str) -> None:
    """Waits for a board's status, which it sends after it has subscribed: frames reach it then. Raises ProcessError."""
    _wait_for_status(board, port, topics.status(site, name), lambda status: status.state == "online")


def _wait_for_status(process: Process, port: int, topic: str, is_ready: Callable[[StatusFields], bool]) -> None:
    statuses: queue.Queue[Message] = queue.Queue()
    settings = MqttConfig(port=port).settings(f"waits-for-{process.pid}")
    deadline = time.monotonic() + START_S
    with MqttClient(settings, subscriptions=[(topic, 1)], on_message=statuses.put):
        while time.monotonic() < deadline:
            process.check_running()
            with suppress(queue.Empty):
                if is_ready(read_status(statuses.get(timeout=0.2).payload)):
                    return
    raise ProcessError(
        f"`{process.name}` did not start within {START_S:.0f} s: try again when the machine is less busy"
    )
