"""`aiflow serve` before it serves."""

import signal
import subprocess
import sys

import pytest

# Stands for a start test, which takes up to a minute and cannot be interrupted between its steps.
LOADING = """
import signal, sys, time
import server.app
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs this test may ignore it
def load_target(config):
    print("loading", flush=True)
    time.sleep(600)
server.app.load_target = load_target
from firmware_tools.cli import main
sys.exit(main(["serve", sys.argv[1]]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_a_server_that_still_loads_at_once_and_without_a_traceback(tmp_path, number, code):
    config = tmp_path / "server.toml"
    config.write_text('[server]\nid = "s1"\nbundle = "unused"\n')
    command = [sys.executable, "-c", LOADING, str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "loading\n"
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code
    assert "Traceback" not in errors
