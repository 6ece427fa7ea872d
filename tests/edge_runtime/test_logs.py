"""The log in systemd's journal."""

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import logging
import sys
from edge_runtime import logs

logs.JOURNAL = sys.argv[1]
logs.log_to_stderr(logging.INFO)
logging.info("camera live")
try:
    1 / 0
except ZeroDivisionError:
    logging.exception("it broke")
"""


def says(arguments: list[str], is_journal: bool) -> list[str]:
    """The lines of Python's standard error, which is the journal's or not."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 20)
    stream = os.fstat(writing)
    environment = {**os.environ, "JOURNAL_STREAM": f"{stream.st_dev}:{stream.st_ino if is_journal else 1}"}
    subprocess.run([sys.executable, *arguments], stderr=writing, env=environment, check=False)
    os.close(writing)
    with open(reading) as log:
        return log.read().splitlines()


@pytest.mark.parametrize("is_journal", [True, False])
def test_without_the_journal_s_socket_each_line_has_its_priority_there_and_no_line_elsewhere(
    is_journal: bool, tmp_path: Path
) -> None:
    info, *error = says(["-c", CODE, str(tmp_path / "none")], is_journal)
    assert len(error) > 3
    assert info.endswith("INFO root camera live")
    assert info.startswith("<6>") == is_journal
    assert {line.startswith("<3>") for line in error} == {is_journal}


@pytest.mark.parametrize("is_journal", [True, False])
def test_what_ends_a_service_is_an_error_in_the_journal(is_journal: bool, tmp_path: Path) -> None:
    (line,) = says(["-m", "firmware_tools", "run", str(tmp_path / "no.toml")], is_journal)
    assert line.startswith("<3>aiflow run: " if is_journal else "aiflow run: ")


def entry(data: bytes) -> dict[str, str]:
    """The fields of a datagram in the journal's native protocol."""
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, is_line, value = line.partition(b"=")
        if not is_line:
            size = int.from_bytes(data[:8], "little")
            value, end, data = data[8 : 8 + size], data[8 + size : 9 + size], data[9 + size :]
            assert end == b"\n"
        fields[name.decode()] = value.decode()
    return fields


def test_in_the_journal_each_record_has_its_fields_and_one_that_is_too_large_goes_to_standard_error(
    tmp_path: Path,
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        journal.settimeout(10)
        (line,) = says(["-c", f"{CODE}\nlogging.warning('x' * 500_000)", str(tmp_path / "journal")], True)
        info, error = (entry(journal.recv(1 << 16)) for _ in range(2))
    assert line.startswith("<4>")
    assert line.endswith("xxx")
    place = {"LOGGER": "root", "SYSLOG_IDENTIFIER": "aiflow", "CODE_FILE": "<string>", "CODE_FUNC": "<module>"}
    assert info == {"MESSAGE": "camera live", "PRIORITY": "6", "CODE_LINE": "8", **place}
    lines = error["MESSAGE"].splitlines()
    assert (lines[0], lines[-1]) == ("it broke", "ZeroDivisionError: division by zero")
    assert (error["PRIORITY"], error["CODE_LINE"]) == ("3", "12")
