"""What `make` says at its end."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home in which pyenv has installed Python 3.12; others may be in /usr/bin."""
    python = tmp_path / ".pyenv/versions/3.12.4/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    return tmp_path


def make_test_all(home: Path, of_each: str) -> "subprocess.CompletedProcess[str]":
    """of_each: the command in place of `make test`."""
    command = ["make", "--silent", "--directory", str(ROOT), f"HOME={home}", f"MAKE={of_each}", "test-all"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_tests_with_all_pythons_end_with_those_that_were_tested_and_those_that_were_not_found(home):
    done = make_test_all(home, "true")
    tested, missing = (line.partition(":")[2].split() for line in done.stdout.splitlines()[-2:])
    assert done.returncode == 0
    assert "3.12" in tested
    assert sorted(tested + [version for version in missing if version != "none"]) == PYTHONS


def test_a_failure_with_one_of_the_pythons_names_it(home):
    done = make_test_all(home, "false")
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1].removeprefix("failed with Python: ") in PYTHONS
