"""sd_notify against a real datagram socket: every message arrives whole, and a manager that is away harms nothing."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.sd_notify import MAX_STATUS, Notifier
from tests.service_manager import ServiceManager, at


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_every_message_arrives_at_a_socket_of_either_kind(tmp_path: Path, kind: str) -> None:
    with at(tmp_path) if kind == "path" else ServiceManager(f"@aiflow-test-{os.getpid()}") as manager:
        notifier = Notifier(manager.address, watchdog_s=1)
        notifier.starting(60)
        notifier.ready()
        notifier.status("broker broker.lan:8883 online")
        notifier.progress()
        notifier.stopping()
        told = ["READY=1", "STATUS=broker broker.lan:8883 online", "WATCHDOG=1", "STOPPING=1"]
        assert manager.pending() == ["EXTEND_TIMEOUT_USEC=60000000", *told]


def test_without_a_service_manager_nothing_is_sent_and_nothing_fails() -> None:
    notifier = Notifier.from_environment({})
    notifier.ready()
    notifier.progress()
    assert notifier.failed == 0


def test_progress_sends_ten_messages_per_timeout_however_often_it_is_called(tmp_path: Path) -> None:
    clock = itertools.count(100.0, 0.125)
    with at(tmp_path) as manager:
        notifier = Notifier(manager.address, watchdog_s=20, clock=lambda: next(clock))
        for _ in range(8 * 20):
            notifier.progress()
        assert manager.pending() == ["WATCHDOG=1"] * 10


def test_work_that_may_take_long_makes_systemd_wait_longer(tmp_path: Path) -> None:
    with at(tmp_path) as manager:
        Notifier(manager.address, watchdog_s=20).allow(300)
        Notifier(manager.address, watchdog_s=20).allow(0)
        Notifier(manager.address).allow(300)  # without a watchdog there is nothing to change
        assert manager.pending() == ["WATCHDOG_USEC=320000000"]


@pytest.mark.parametrize(
    ("more", "pings"),
    [
        ({"WATCHDOG_USEC": "1000000"}, 1),
        ({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}, 1),
        ({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}, 0),
        ({}, 0),
    ],
)
def test_only_the_process_that_the_watchdog_watches_pings(tmp_path: Path, more: dict[str, str], pings: int) -> None:
    with at(tmp_path) as manager:
        environment = {"NOTIFY_SOCKET": manager.address, "HOME": "/", **more}
        Notifier.from_environment(environment).progress()
        assert manager.pending() == ["WATCHDOG=1"] * pings
        assert environment == {"HOME": "/"}  # children inherit none of it


@pytest.mark.parametrize(
    "environment",
    [
        {"NOTIFY_SOCKET": "vsock:2:1234"},
        {"NOTIFY_SOCKET": "relative"},
        {"NOTIFY_SOCKET": "/" + "x" * 107},
        {"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "9" * 20},
    ],
)
def test_an_environment_that_is_not_systemd_s_is_named(environment: dict[str, str]) -> None:
    name = list(environment)[-1]
    with pytest.raises(ConfigError, match=name):
        Notifier.from_environment(environment)


def test_a_status_is_one_bounded_line(tmp_path: Path) -> None:
    with at(tmp_path) as manager:
        Notifier(manager.address).status("a\nREADY=1\n" + "x" * 10_000)
        (message,) = manager.pending()
    assert "\n" not in message
    assert len(message) == len("STATUS=") + MAX_STATUS


def test_a_manager_that_is_gone_or_does_not_read_is_logged_and_neither_blocks_nor_raises(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with at(tmp_path) as manager:
        notifier = Notifier(manager.address)
        while not notifier.failed:  # until the queue of the socket is full
            notifier.status("x" * 100)
    gone = Notifier(str(tmp_path / "none"), watchdog_s=1)
    gone.ready()
    gone.progress()
    assert gone.failed == 2
    assert "message=READY=1 error=" in caplog.text


def test_it_needs_no_library() -> None:
    code = "import sys, edge_runtime.sd_notify; print(sorted({'numpy', 'systemd', 'sdnotify'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
