"""Which backend runs the networks, and with how many threads: tried in child processes, measured once, and kept.

A wheel that was built for another processor ends its process by SIGILL, a driver may hang: in a child process, neither
stops the board. The result is kept in a file of the user's cache, named by everything that it depends on. So a board
whose packages, processor and bundle are still the same starts no child. Knows nothing of what the networks compute.
"""

import hashlib
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from edge_runtime import __version__
from edge_runtime.cores import usable_cores
from edge_runtime.errors import RestartError, StoppedError
from edge_runtime.inference.backends import RUNTIMES, SUFFIXES, BackendError, cache_folder, hint, installed
from edge_runtime.inference.bundle import Bundle
from edge_runtime.logs import printable

logger = logging.getLogger(__name__)

PROBE_S = 60.0  # a slow SD card takes long to read a runtime
POLL_S = 0.2  # how often a trial looks whether the board is to stop
BUILD_S = 1200.0  # TensorRT compiles each network, which takes minutes on a Jetson
THREADS = (1, 2, 4)  # that are measured, as far as there are cores
WORTH = 0.7  # twice the threads must take at most this fraction of the time: they also cost power and heat
MAX_KEPT_BYTES = 16384
MAX_WHY = 300  # characters of a child's last words
HANGS = "hangs: no result within"
STOPPED = ("SIGHUP", "SIGINT", "SIGTERM")  # of a terminal's children, when it ends the board
CPU_INFO = re.compile(r"(?m)^(?:model name|flags|Features|CPU implementer|CPU part|Model)\s*:.*$")


class Setup(Struct, frozen=True):
    """How the networks are run."""

    backend: str  # of SUFFIXES
    threads: Annotated[int, Meta(ge=1, le=16)]
    providers: tuple[str, ...] = ()  # of onnxruntime, before the CPU


class _Kept(Struct, frozen=True):
    """A file of the cache."""

    key: dict[str, str]  # what the choice depends on
    setup: Setup
    why: str


def choose(
    bundle: Bundle,
    backend: str = "auto",
    threads: int | None = None,
    providers: Sequence[str] = (),
    tell: Callable[[float], None] = lambda _: None,
    stop: threading.Event | None = None,
    again: bool = False,
) -> Setup:
    """The setup that was kept; else the fastest of those that work, which is kept.

    backend: one of SUFFIXES, or "auto" for all that are installed. threads: None: measured. providers: of onnxruntime;
    if they work they are used, without a comparison. tell: gets the seconds that the next child may take. stop: ends
    the trials as soon as it is set. again: what was kept does not load.
    Raises BundleError, BackendError if nothing works, RestartError if nothing has worked in time, and StoppedError.
    """
    names = installed(backend)
    asked = {"backend": backend, "threads": str(threads), "providers": " ".join(providers)}
    key = {**asked, **_circumstances(names), "bundle": bundle.id.hex()}
    path = cache_folder() / f"{hashlib.sha256(msgspec.json.encode(key, order='sorted')).hexdigest()[:16]}.json"
    if again or (kept := _read(path, key)) is None:
        kept = _Kept(key, *_measured(bundle, names, threads, providers, tell, stop or threading.Event()))
        _keep(path, kept)
    setup = kept.setup
    if setup.providers:
        tell(BUILD_S)  # the cache of compiled networks may be gone
    used = " ".join(["", *setup.providers])
    logger.info("backend=%s%s threads=%d kept=%s why=%s", setup.backend, used, setup.threads, path, kept.why)
    return setup


def _measured(
    bundle: Bundle,
    names: Sequence[str],
    threads: int | None,
    providers: Sequence[str],
    tell: Callable[[float], None],
    stop: threading.Event,
) -> tuple[Setup, str]:
    """The best setup, and why. Raises BundleError, BackendError, RestartError, StoppedError."""
    for name in names:  # a bundle that lacks files says nothing about a runtime
        for network in ("head", "draft_look", "draft_step"):
            bundle.file(f"{network}{SUFFIXES[name]}")
    counts = [threads] if threads else [count for count in THREADS if count <= usable_cores()]
    found: dict[float, tuple[Setup, str]] = {}  # by milliseconds
    failed, may_work = [], False
    for name, given in _variants(names, providers):
        title = " with ".join([name, *([" and ".join(given)] if given else [])])
        tell((BUILD_S if given else PROBE_S) + PROBE_S)  # and then the board loads them
        arguments = [str(bundle.path), name, ",".join(map(str, counts)), ",".join(given)]
        took = _probe(arguments, BUILD_S if given else PROBE_S, stop)
        if isinstance(took, str):
            logger.warning("backend=%s does not work: %s", title, took)
            failed.append(f"{title} {took}")
            may_work |= took.startswith(HANGS)
            continue
        best = counts[0]
        for count in counts[1:]:
            best = count if took[count] <= WORTH * took[best] else best
        measured = ", ".join(f"{took[count]:.2f} ms with {count} thread(s)" for count in counts)
        found[took[best]] = Setup(name, best, given), f"{title}: {measured}"
        if given:
            break
    if not found and may_work:
        raise RestartError(
            f"no runtime for the networks was ready in time: {'; '.join(failed)}: a board that is busy needs another "
            "start; if it is not busy, see what `aiflow doctor` says of them"
        )
    if not found:
        install = " or ".join(hint(name) for name in names)
        raise BackendError(
            f"no runtime for the networks works on this board: {'; '.join(failed)}: install another version of one "
            f"({install}), and see what `aiflow doctor` says of them"
        )
    return found[min(found)][0], "; ".join([*(found[ms][1] for ms in sorted(found)), *failed])


def _variants(names: Sequence[str], providers: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """The candidates, in this order: onnxruntime with all providers, without the first of them, ..., the CPU alone."""
    first = [("onnx", tuple(providers[start:])) for start in range(len(providers))] if "onnx" in names else []
    return [*first, *((name, ()) for name in names)]


def _probe(arguments: Sequence[str], limit_s: float, stop: threading.Event) -> dict[int, float] | str:
    """Milliseconds per frame by number of threads, as probe.py prints them; or what went wrong. Raises StoppedError."""
    command = [sys.executable, "-m", "edge_runtime.inference.probe", *arguments]
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return f"cannot be tried: {error.strerror}"
    until, output, errors = time.monotonic() + limit_s, "", ""
    with child:
        try:
            while not stop.is_set() and child.returncode is None and time.monotonic() < until:
                with suppress(subprocess.TimeoutExpired):
                    output, errors = child.communicate(timeout=POLL_S)
        finally:
            has_ended = child.returncode is not None
            child.kill()
    if stop.is_set():
        raise StoppedError(f"told to stop during the trial of {arguments[1]}")
    if not has_ended:
        return f"{HANGS} {limit_s:g} s"
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        if name in STOPPED:  # says nothing of the runtime
            raise BackendError(f"the trial of {arguments[1]} was ended by {name}: start again")
        return f"was ended by {name}" + (": it was built for another processor" if name == "SIGILL" else "")
    if child.returncode:
        said = errors.strip() or f"ended with exit code {child.returncode}"
        return f"fails: {printable(said.splitlines()[-1], MAX_WHY)}"
    try:
        return msgspec.json.decode(output.splitlines()[-1], type=dict[int, float])
    except (IndexError, msgspec.MsgspecError):
        return "fails: it ended before it was measured"


def _circumstances(names: Sequence[str]) -> dict[str, str]:
    """Everything that may change the speed of a backend, or whether it works."""
    cpu_info = Path("/proc/cpuinfo")
    lines = sorted(set(CPU_INFO.findall(cpu_info.read_text()))) if cpu_info.is_file() else []
    runtimes = {runtime: _version(runtime) for name in names for runtime in RUNTIMES[name]}
    return {
        "aiflow": __version__,
        "numpy": _version("numpy"),
        **runtimes,
        "cpu": f"{platform.machine()} {hashlib.sha256(''.join(lines).encode()).hexdigest()[:16]}",
        "cores": str(usable_cores()),
    }


def _version(module: str) -> str:
    """A package's folder, version and time of installation. Reading its metadata would take long. "": not installed."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    origin = Path(spec.origin)
    versions = sorted(path.name for path in origin.parents[1].glob(f"{module}*-info"))
    return " ".join([str(origin.parent), *versions, str(origin.stat().st_mtime_ns)])


def _read(path: Path, key: dict[str, str]) -> _Kept | None:
    """None if there is no such file, or a damaged one."""
    try:
        with path.open("rb") as file:
            kept = msgspec.json.decode(file.read(MAX_KEPT_BYTES), type=_Kept)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return kept if kept.key == key and kept.setup.backend in SUFFIXES else None


def _keep(path: Path, kept: _Kept) -> None:
    """Not synchronised: a file that a power cut damages is written again."""
    new = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(msgspec.json.format(msgspec.json.encode(kept)))
        os.replace(new, path)
    except OSError as error:
        logger.warning("the choice of a backend is not kept, each start measures: path=%s error=%s", path, error)
