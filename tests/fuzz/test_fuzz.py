"""A short run of each fuzz target; `make fuzz` runs them long."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.mutations import words
from tests.fuzz.run import SUBJECTS, targets
from tests.fuzz.target import CORPUS, Target, seeds

ROOT = Path(__file__).parents[2]
TARGETS = {name: target for subject in SUBJECTS for name, target in targets(subject).items()}
INPUTS = 1000
MAX_CORPUS_BYTES = 512 * 1024


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_read_or_refused_by_name(name):
    target, corpus, rng = TARGETS[name], seeds(name), random.Random(name)
    inserts = words(corpus)
    for data in corpus:
        target.call(data)
    for number in range(INPUTS):
        data = target.mutate(corpus, inserts, rng)
        try:
            target.call(data)
        except Exception as error:
            pytest.fail(f"input {number} raised {error!r}: {data!r}")


def test_the_corpus_is_small_without_doubles_and_each_part_has_a_target():
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.glob("*/*")) < MAX_CORPUS_BYTES
    assert [name for name in TARGETS if len(set(seeds(name))) < len(seeds(name))] == []


def test_another_error_than_the_named_one_is_a_fault():
    def read(data: bytes) -> None:
        raise KeyError if data else ValueError

    target = Target(read, ValueError, 1)
    target.call(b"")
    with pytest.raises(KeyError):
        target.call(b"x")


def test_the_runner_reports_each_target_and_keeps_its_slowest_input(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz.run", "--target", "picture", "--inputs", "500", "--output", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("picture         500 inputs")
    assert (tmp_path / "picture.slowest").exists()
