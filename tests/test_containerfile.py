"""The container file of a server: what it says without being built."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.config import MetricsConfig
from edge_runtime.reporting.metrics import exported
from server.counters import SERVER

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Containerfile").read_text()


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not installed")
def test_a_linter_finds_nothing() -> None:
    subprocess.run(["hadolint", str(ROOT / "Containerfile")], check=True)


def test_what_runs_is_not_root() -> None:
    last = TEXT.rpartition("\nFROM ")[2]
    assert [user for user in re.findall(r"(?m)^USER (\d+):\d+$", last) if user != "0"]
    assert last.index("\nUSER ") < last.index("\nENTRYPOINT ")


@pytest.mark.parametrize(("values", "code"), [({"accepting": 1}, 0), ({"accepting": 0}, 1), ({"waiting": 1}, 1)])
def test_it_is_healthy_while_the_server_takes_requests(values: dict[str, int], code: int) -> None:
    (found,) = re.findall(r"(?m)^HEALTHCHECK .* CMD (\[.*\])$", TEXT)
    program, *arguments = json.loads(found)
    assert program == "/opt/aiflow/bin/python3"
    with exported(MetricsConfig(port=0), "server", SERVER, lambda: values) as port:
        here = [argument.replace(":9464/", f":{port}/") for argument in arguments]
        assert subprocess.run([sys.executable, *here], check=False).returncode == code


def test_it_is_unhealthy_when_nothing_answers() -> None:
    (found,) = re.findall(r"(?m)^HEALTHCHECK .* CMD (\[.*\])$", TEXT)
    here = [argument.replace(":9464/", ":1/") for argument in json.loads(found)[1:]]
    assert subprocess.run([sys.executable, *here], check=False, stderr=subprocess.DEVNULL).returncode == 1
