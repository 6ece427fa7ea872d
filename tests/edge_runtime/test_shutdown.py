"""A process that is told to stop does so, or ends saying where it hangs; one with a dead thread ends as well."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import PIPE

import pytest

HANGS = """
import threading
import time
from edge_runtime import shutdown
shutdown.SLACK_S = 3.0  # for `told` to be said on a busy machine
stop = shutdown.stop_when_told(orderly_s=0.1)
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
from edge_runtime import shutdown
stop = shutdown.stop_when_told(orderly_s=60)
def work():
    {ending}
thread = threading.Thread(target=work, name="worker")
thread.start()
thread.join()
print(stop.is_set(), flush=True)
sys.exit(stop.exit_code)
"""
IGNORES = """
import sys
import time
from edge_runtime import shutdown
shutdown.REPEAT_S = {repeat_s}
stop = shutdown.stop_when_told(orderly_s=60, reloads={reloads})
print("ready", flush=True)
while not stop.is_set():
    time.sleep(0.01)
print("told", flush=True)
sys.stdin.readline()  # an orderly end that takes its time
print("ended", flush=True)
sys.exit(shutdown.leave(lambda: stop.exit_code))
"""
IN_A_DRIVER = """
import atexit
import sys
import threading
from edge_runtime.shutdown import DriverThread, leave
atexit.register(print, "finalised", flush=True)
def main():
    {kind}(threading.Event().wait).start()
    sys.stdout.write("buffered, ")
    return 3
sys.exit(leave(main))
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
EVERY_SIGNAL = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])


@contextmanager
def python(code: str) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Returns when the process has heard of the signal."""
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == b"told\n"


@EVERY_SIGNAL
def test_a_signal_ends_a_process_in_order_and_with_success(number: signal.Signals) -> None:
    with python(IGNORES.format(repeat_s=0, reloads=False)) as process:
        told(process, number)
        out, said = process.communicate(b"\n", timeout=60)
    assert (process.returncode, out, said) == (os.EX_OK, b"ended\n", b"")


@EVERY_SIGNAL
def test_a_second_signal_ends_it_at_once_and_the_exit_status_says_so(number: signal.Signals) -> None:
    with python(IGNORES.format(repeat_s=0, reloads=False)) as process:
        told(process, signal.SIGTERM)
        process.send_signal(number)
        assert process.wait(timeout=60) == -number


def test_one_wish_that_comes_as_two_signals_is_one() -> None:
    with python(IGNORES.format(repeat_s=60, reloads=False)) as process:
        told(process, signal.SIGHUP)
        process.send_signal(signal.SIGHUP)  # a closing terminal: from the kernel, and from the shell
        out, said = process.communicate(b"\n", timeout=60)
    assert (process.returncode, out, said) == (os.EX_OK, b"ended\n", b"")


def test_a_hangup_that_was_ignored_at_start_stays_so() -> None:
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + IGNORES.format(repeat_s=0, reloads=False)
    with python(code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)  # the first one that counts: as a second one it would end it at once
        assert process.stdout.readline() == b"told\n"
        process.communicate(b"\n", timeout=60)
    assert process.returncode == os.EX_OK


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGHUP], os.EX_TEMPFAIL),
        ([signal.SIGHUP, signal.SIGHUP], os.EX_TEMPFAIL),
        ([signal.SIGHUP, signal.SIGTERM], os.EX_OK),
        ([signal.SIGTERM, signal.SIGHUP], os.EX_OK),
    ],
)
def test_a_hangup_asks_a_service_to_start_again_unless_it_is_told_to_end(
    numbers: list[signal.Signals], code: int
) -> None:
    with python(IGNORES.format(repeat_s=0, reloads=True)) as process:
        told(process, numbers[0])
        for number in numbers[1:]:
            process.send_signal(number)
        process.communicate(b"\n", timeout=60)
    assert process.returncode == code


@pytest.mark.parametrize(
    ("kind", "out"),
    [("DriverThread", b"buffered, "), ("(lambda f: threading.Thread(None, f, daemon=True))", b"buffered, finalised\n")],
)
def test_only_a_thread_in_a_driver_keeps_the_interpreter_from_finalising(kind: str, out: bytes) -> None:
    with python(IN_A_DRIVER.format(kind=kind)) as process:
        assert process.communicate(timeout=60)[0] == out
    assert process.returncode == 3


@EVERY_SIGNAL
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
