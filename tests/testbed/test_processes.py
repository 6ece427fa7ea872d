"""Child processes: what they leave behind, and what an error says about them."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from testbed.processes import AiflowProcess, Process, ProcessError
from testbed.statuses import StatusFields, read_status

PATIENCE_S = 240  # on a machine that may be busy


def test_the_error_of_a_failed_process_quotes_its_log(tmp_path: Path) -> None:
    with AiflowProcess("validate", {"board": {"id": "b"}}, tmp_path) as process:
        process.process.wait(PATIENCE_S)
        with pytest.raises(ProcessError, match=r"(?s)exit code 78.*required key `bundle` is missing"):
            process.has_ended()


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
