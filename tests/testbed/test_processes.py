"""Child processes: what they leave behind, and what an error says about them."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from testbed.processes import AiflowProcess, Process, ProcessError
from testbed.statuses import StatusFields, read_status

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240  # on a machine that may be busy


def test_the_error_of_a_failed_process_quotes_its_log(tmp_path: Path) -> None:
    with AiflowProcess("validate", {"board": {"id": "b"}}, tmp_path) as process:
        process.process.wait(PATIENCE_S)
        with pytest.raises(ProcessError, match=r"(?s)exit code 78.*required key `bundle` is missing"):
            process.has_ended()


def test_a_child_runs_the_checkout_of_its_parent_and_not_the_installed_one(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for package in ("testbed", "edge_runtime"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    child = "import testbed; print(testbed.__file__)"
    parent = (
        "import sys; from pathlib import Path; from testbed.processes import Process\n"
        f"with Process([sys.executable, '-c', {child!r}], Path({str(tmp_path / 'log')!r}), 'child') as process:\n"
        f"    process.process.wait({PATIENCE_S})"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", parent], cwd=checkout, env=environment, check=True)
    assert (tmp_path / "log").read_text().strip() == str(checkout / "testbed/__init__.py")


def test_an_interrupt_while_a_process_starts_leaves_none(tmp_path: Path) -> None:
    heard: list[int] = []

    def interrupt(number: int, _: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    def start_interrupted(after_s: float) -> None:
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT)).start()
        with Process(["sleep", "600"], tmp_path / "log", "sleep"):
            while not heard:  # Python drops an exception that is raised in a destructor
                time.sleep(0.01)

    others, passed_on = psutil.Process().children(), 0
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        for moment in range(30):  # before Popen, within and behind it
            heard.clear()
            try:
                start_interrupted(moment * 2e-4)
            except KeyboardInterrupt:
                passed_on += 1
            assert heard == [signal.SIGINT]
            assert psutil.Process().children() == others
    finally:
        signal.signal(signal.SIGINT, before)
    assert passed_on >= 29


def test_a_status_that_is_none_says_nothing() -> None:
    for payload in (b"", b"\xff", b"[1]", b'{"state": 3}', b"[" * 100_000):
        assert read_status(payload) == StatusFields()
    assert read_status(b'{"server": "s", "share_proven": true, "queue": {}}') == StatusFields("", "s", True)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="/nowhere/python is not a program"):
        Process(["/nowhere/python"], tmp_path / "log", "none").start()
