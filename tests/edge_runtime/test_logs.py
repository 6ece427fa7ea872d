"""The log in systemd's journal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import logging
from edge_runtime.logs import log_to_stderr

log_to_stderr(logging.INFO)
logging.info("camera live")
try:
    1 / 0
except ZeroDivisionError:
    logging.exception("it broke")
"""


def says(arguments: list[str], is_journal: bool) -> list[str]:
    """The lines of Python's standard error, which is the journal's or not."""
    reading, writing = os.pipe()
    stream = os.fstat(writing)
    environment = {**os.environ, "JOURNAL_STREAM": f"{stream.st_dev}:{stream.st_ino if is_journal else 1}"}
    subprocess.run([sys.executable, *arguments], stderr=writing, env=environment, check=False)
    os.close(writing)
    with open(reading) as log:
        return log.read().splitlines()


@pytest.mark.parametrize("is_journal", [True, False])
def test_each_line_in_the_journal_has_its_priority_and_no_line_elsewhere(is_journal: bool) -> None:
    info, *error = says(["-c", CODE], is_journal)
    assert len(error) > 3
    assert info.endswith("INFO root camera live")
    assert info.startswith("<6>") == is_journal
    assert {line.startswith("<3>") for line in error} == {is_journal}


@pytest.mark.parametrize("is_journal", [True, False])
def test_what_ends_a_service_is_an_error_in_the_journal(is_journal: bool, tmp_path: Path) -> None:
    (line,) = says(["-m", "firmware_tools", "run", str(tmp_path / "no.toml")], is_journal)
    assert line.startswith("<3>aiflow run: " if is_journal else "aiflow run: ")
