"""A process that is told to stop does so, or ends saying where it hangs."""

import signal
import subprocess
import sys

import pytest

HANGS = """
import threading
import time
from edge_runtime import signals
signals.SLACK_S = 0.2
stop = signals.stop_on_signals(orderly_s=0.1)
print("ready", flush=True)
def in_a_driver():
    while not stop.is_set():
        time.sleep(0.01)
    print("told", flush=True)
    threading.Event().wait()
in_a_driver()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_hangs_while_it_stops_says_where_and_ends(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        out, said = process.communicate(timeout=60)
    assert out == b"told\n"
    assert process.returncode == 1
    assert b"in in_a_driver" in said
