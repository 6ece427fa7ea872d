"""Runs the fuzz targets, one process each, and prints a line for each:

    python -m tests.fuzz.run --inputs 100000 --output fuzz-out

atheris (libFuzzer for Python) chooses the inputs by the code that they reach. If it is not installed, the inputs are
random changes of the corpus. The exit status is 1 if any target raised another exception than its named error, took
more than MAX_SECONDS for an input or more than MAX_MEBIBYTES of memory. In the output folder are, for each target:

- <target>.fault, the input that raised another exception, and <target>.log, its traceback
- <target>.slowest, the slowest input, and <target>.large, one that took more than LARGE_MEBIBYTES
- <target>/, the inputs that reached new code
"""

import argparse
import os
import random
import resource
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz.mutations import words
from tests.fuzz.target import CORPUS, Target, seeds

MAX_SECONDS = 10  # of CPU time
MAX_MEBIBYTES = 1024
LARGE_MEBIBYTES = 32  # for one input
SUBJECTS = ("wire", "manifest", "update", "pictures", "configuration")


def targets(subject: str) -> dict[str, Target]:
    """The targets of a subject, by name."""
    found: dict[str, Target] = import_module(f"tests.fuzz.{subject}").TARGETS
    return found


class Watch:
    """Calls a target. Writes its slowest input, one that took much memory and one that is a fault beside `output`."""

    def __init__(self, target: Target, output: Path) -> None:
        self._target, self._output, self._slowest = target, output, 0.0

    def __call__(self, data: bytes) -> None:
        seconds = self._seconds(data)
        if seconds > self._slowest:
            self._slowest = max(self._slowest, min(seconds, self._seconds(data)))  # again: a first call may import
            self._output.with_suffix(".slowest").write_bytes(data)
            self._output.with_suffix(".milliseconds").write_text(f"{1e3 * self._slowest:.2f}")

    def _seconds(self, data: bytes) -> float:
        before, start = peak_mebibytes(), time.thread_time()
        try:
            self._target.call(data)
        except BaseException:
            self._output.with_suffix(".fault").write_bytes(data)
            raise
        seconds = time.thread_time() - start
        if peak_mebibytes() > before + LARGE_MEBIBYTES:
            self._output.with_suffix(".large").write_bytes(data)
        return seconds


def peak_mebibytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(subject: str, name: str, inputs: int, seed: int, output: Path) -> None:
    """One target, in this process. Raises the first fault."""
    corpus = seeds(name)
    inserts = words(corpus)
    if not find_spec("atheris"):
        target, rng = targets(subject)[name], random.Random(seed)
        watch = Watch(target, output / name)
        for data in corpus:
            watch(data)
        for _ in range(inputs):
            watch(target.mutate(corpus, inserts, rng))
        return
    import atheris

    with atheris.instrument_imports(include=["edge_runtime", "server", "testbed"]):
        target = targets(subject)[name]

    def mutate(data: bytes, max_bytes: int, seed: int) -> bytes:
        return target.change_values(data, random.Random(seed)) or bytes(atheris.Mutate(data, max_bytes))

    (output / name).mkdir(exist_ok=True)
    dictionary = "".join(f'"{word.decode()}"\n' for word in (*inserts, b"1e999"))
    (output / f"{name}.words").write_text(dictionary)
    options = {
        "runs": inputs,
        "seed": seed,
        "max_len": target.max_bytes,
        "timeout": MAX_SECONDS,
        "rss_limit_mb": MAX_MEBIBYTES,
        "dict": output / f"{name}.words",
        "artifact_prefix": f"{output / name}-",
        "reduce_inputs": 0,  # a shorter input that reaches the same lines holds fewer values to change
        "print_final_stats": 1,
    }
    arguments = [sys.argv[0], *(f"-{key}={value}" for key, value in options.items())]
    watch = Watch(target, output / name)
    atheris.Setup([*arguments, str(output / name), str(CORPUS / name)], watch, custom_mutator=mutate)
    atheris.Fuzz()  # ends the process


def run(subject: str, name: str, inputs: int, seed: int, output: Path) -> bool:
    """One target in a process of its own; prints its line. Returns whether nothing was found."""
    command = [sys.executable, "-m", "tests.fuzz.run", "--one", subject, name]
    command += ["--inputs", str(inputs), "--seed", str(seed), "--output", str(output)]
    with (output / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds, mebibytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
    slowest = output / f"{name}.milliseconds"
    milliseconds = float(slowest.read_text()) if slowest.exists() else 0.0
    is_good = process.returncode == 0 and mebibytes < MAX_MEBIBYTES and milliseconds < 1e3 * MAX_SECONDS
    print(
        f"{name:10} {inputs:8} inputs in {seconds:6.1f} CPU s, {inputs / seconds:6.0f} per s, slowest "
        f"{milliseconds:7.2f} ms, {mebibytes:4.0f} MiB: {'good' if is_good else f'FAULT, see {output / name}.log'}",
        flush=True,
    )
    return is_good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("fuzz-out"))
    parser.add_argument("--target", action="append", help="only this one; may be repeated")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # this process is one target's
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.one:
        fuzz(*args.one, args.inputs, args.seed, args.output)
        return
    chosen = [
        (subject, name, target.weight)
        for subject in SUBJECTS
        for name, target in targets(subject).items()
        if not args.target or name in args.target
    ]
    parts = sum(weight for _, _, weight in chosen)
    start = time.monotonic()
    results = [
        run(subject, name, args.inputs * weight // parts, args.seed, args.output) for subject, name, weight in chosen
    ]
    print(f"{args.inputs} inputs in {time.monotonic() - start:.0f} s: {results.count(False)} targets with faults")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
