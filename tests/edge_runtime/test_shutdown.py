"""A process that is told to stop does so, or ends saying where it hangs; one with a dead thread ends as well."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

HANGS = """
import threading
import time
from edge_runtime import shutdown as signals
signals.SLACK_S = 3.0  # for `told` to be said on a busy machine
stop = signals.stop_when_told(orderly_s=0.1)
print("ready", flush=True)
def in_a_driver():
    while not stop.is_set():
        time.sleep(0.01)
    print("told", flush=True)
    threading.Event().wait()
in_a_driver()
"""
DIES = """
import sys
import threading
from edge_runtime import shutdown as signals
stop = signals.stop_when_told(orderly_s=60)
def work():
    {ending}
thread = threading.Thread(target=work, name="worker")
thread.start()
thread.join()
print(stop.is_set(), flush=True)
sys.exit(stop.exit_code)
"""
LEAVES = """
import sys
import threading
from edge_runtime.shutdown import DriverThread, leave
def main():
    DriverThread(threading.Event().wait, name="driver").start()
    {ending}
print("unflushed")
sys.exit(leave(main))
"""


@contextmanager
def python(code: str) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_hangs_while_it_stops_says_where_and_ends(number: signal.Signals) -> None:
    with python(HANGS) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        out, said = process.communicate(timeout=60)
    assert out == b"told\n"
    assert process.returncode == 1
    assert b"in in_a_driver" in said


def test_a_process_whose_thread_dies_of_an_error_ends_and_is_to_be_restarted() -> None:
    with python(DIES.format(ending="raise KeyError('bug')")) as process:
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (os.EX_SOFTWARE, b"True\n")
    assert b"thread died name=worker" in said
    assert b"KeyError: 'bug'" in said


def test_a_thread_that_ends_on_purpose_ends_nothing_else() -> None:
    with python(DIES.format(ending="sys.exit(3)")) as process:
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said) == (0, b"False\n", b"")


@pytest.mark.parametrize(
    ("ending", "code", "said"), [("return 3", 3, b"names=driver"), ("raise KeyError('bug')", 1, b"KeyError: 'bug'")]
)
def test_a_process_with_a_thread_in_a_driver_leaves_with_its_exit_code_and_its_output(
    ending: str, code: int, said: bytes
) -> None:
    with python(LEAVES.format(ending=ending)) as process:
        out, log = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, b"unflushed\n")
    assert said in log
