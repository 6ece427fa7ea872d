"""`aiflow doctor`: looks at a board and says what is in order, what is not, and what to do."""

import argparse
import json
import logging
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.errors import AiflowError
from firmware_tools import host_checks, probes
from firmware_tools.host_checks import Finding, Status, ok
from firmware_tools.service import System

if TYPE_CHECKING:
    from edge_runtime.config import CameraConfig, RuntimeConfig

SCHEMA = 1  # of --json; new keys do not change it
FRAMES = 20  # of the self-test
CAMERA_FRAMES = 5  # of each camera
LIMIT_S = 20.0  # for a check
LONG_S = 300.0  # for one that loads large libraries from a slow SD card
EXIT_CODES: dict[Status, int] = {"ok": 0, "warning": 1, "failure": 2}  # as monitoring plugins do (Nagios, Icinga)
UNTRIED = Finding("failure", "not tried", "repair the packages first, then run `aiflow doctor` again")
EPILOG = """\
Exit codes: 0 all is in order, 1 warnings only, 2 at least one failure.
Stop the board's service first if its camera or its broker's account allows one user only.
"""


@dataclass(frozen=True, slots=True)
class Check:
    """A named check; `run` may also raise AiflowError, which is a failure."""

    name: str
    run: Callable[[], Finding]
    limit_s: float = LIMIT_S
    loads_packages: bool = False  # into this process, which a broken one would end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="BOARD_TOML", help="also check this board's bundle, brokers, cameras"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Prints a line per check as it ends, a table on a terminal, or JSON. Returns the exit code."""
    from testbed.terminal import is_terminal, print_rows, track

    logging.getLogger("edge_runtime").setLevel(logging.CRITICAL)  # each failure is in the result
    checks = host(None) if args.config is None else _with_config(args.config)
    findings: dict[str, Finding] = {}
    as_table = not args.json and is_terminal()
    for check in track(checks, "checking") if as_table else checks:
        is_safe = not check.loads_packages or findings["packages"].status != "failure"
        findings[check.name] = finding = bounded(check) if is_safe else UNTRIED
        if not args.json and not as_table:
            print(f"{finding.status.upper():8} {check.name}: {finding.found}{_advice(finding)}", flush=True)
    worst = max((finding.status for finding in findings.values()), key=lambda status: EXIT_CODES[status])
    if args.json:
        listed = [{"name": name, **asdict(finding)} for name, finding in findings.items()]
        print(json.dumps({"schema": SCHEMA, "status": worst, "checks": listed}, indent=2))
    elif as_table:
        rows = [(finding.status.upper(), name, finding.found, finding.advice) for name, finding in findings.items()]
        print_rows(("", "check", "found", "what to do"), rows)
    return EXIT_CODES[worst]


def _advice(finding: Finding) -> str:
    return f" -> {finding.advice}" if finding.advice else ""


def bounded(check: Check) -> Finding:
    """The finding of a check. One that hangs is a failure after its limit, and its thread is left behind."""
    result: queue.Queue[Finding | Exception] = queue.Queue()

    def work() -> None:
        try:
            result.put(check.run())
        except Exception as error:
            result.put(error)

    threading.Thread(target=work, name=f"check-{check.name}", daemon=True).start()
    try:
        found = result.get(timeout=check.limit_s)
    except queue.Empty:
        return Finding(
            "failure", f"no result within {check.limit_s:g} s", "it hangs: look at its cable, disk or network"
        )
    if isinstance(found, (AiflowError, OSError)):
        return Finding("failure", str(found))  # the message of ours says what to do
    if isinstance(found, Exception):
        raise found  # a bug
    return found


def host(config: "RuntimeConfig | None", path: Path | None = None) -> list[Check]:
    """The checks of the system; with a configuration and its file, of what that board needs."""
    return [
        Check("python", host_checks.check_python),
        Check("packages", partial(host_checks.check_packages, config.board if config else None), LONG_S),
        Check("cpu", host_checks.check_cpu),
        Check("memory", host_checks.check_memory),
        Check("temperature", host_checks.check_temperature),
        Check("power", host_checks.check_power),
        Check("disk", partial(_disk, config, System().state_of(path) if path else None)),
        Check("clock", host_checks.check_clock),
    ]


def _disk(config: "RuntimeConfig | None", state: Path | None) -> Finding:
    """The worst of the places where the board keeps files. state: where its service runs; None: it is no service."""
    from edge_runtime.config.camera_source import kind_of
    from edge_runtime.inference.backends import cache_folder

    base, found = state or Path.cwd(), list[Finding]()
    if config and config.outbox:
        found.append(host_checks.check_disk((base / config.outbox.file).parent, "the outbox", True))
    if config and config.updates:
        found.append(host_checks.check_disk(base / config.updates.folder, "installed bundles", True))
    if config and config.kept_frames:
        found.append(host_checks.check_disk(base / config.kept_frames.folder, "kept frames", False))
    if config and state and any(kind_of(camera.source) == "watch" for camera in config.cameras):
        found.append(host_checks.check_disk(state, "what was read of watched folders, over a restart", False))
    if config is None or config.board.paradigm != "offload":
        found.append(host_checks.check_disk(state or cache_folder(), "the choice of a backend, over a restart", False))
    return max(found or [ok("this board keeps nothing")], key=lambda finding: EXIT_CODES[finding.status])


def _with_config(path: Path) -> list[Check]:
    """A configuration that cannot be read is a failure, and the board itself is checked all the same."""
    from edge_runtime.config import RuntimeConfig, load_toml

    try:
        config = load_toml(path, RuntimeConfig, "board")
    except AiflowError as error:
        finding = Finding("failure", str(error))
        return [*host(None), Check("configuration", lambda: finding)]
    return [*host(config, path), *_of_board(path, config)]


def _of_board(path: Path, config: "RuntimeConfig") -> Iterator[Check]:
    board = config.board
    yield Check("configuration", lambda: ok(f"{path}: board {board.id} of site {board.site} is in order"))
    yield Check("bundle", lambda: _bundle(config), LONG_S)
    if config.updates:
        yield Check("updates", lambda: _updates(config))
    for_servers, for_users = probes.board_subscriptions(config)
    near = config.near_broker
    yield _broker(path, config, "mqtt", for_servers if near else for_servers + for_users)
    if near:
        yield _broker(path, config, "local", for_users)
    for camera in config.cameras:
        limit_s = probes.FRAME_S + LIMIT_S
        yield Check(f"camera {camera.name}", lambda camera=camera: _camera(camera), limit_s, True)  # type: ignore[misc]
    if board.paradigm != "offload":
        yield Check("self-test", lambda: _self_test(config), LONG_S, True)


def _in_use(config: "RuntimeConfig") -> Path:
    """The folder of the bundle that the board's next start runs, if it is in order."""
    from edge_runtime.firmware.updates import store_of

    store = store_of(config)
    current = store.state().current if store else ""
    return store.folder / current if store and current else Path(config.board.bundle)


def _bundle(config: "RuntimeConfig") -> Finding:
    from edge_runtime.inference.bundle import open_bundle

    bundle = open_bundle(_in_use(config))
    found = f"{bundle.path}: {bundle.check(for_server=False)}"
    config.sampling(bundle.words)
    manifest = bundle.manifest
    if warnings := config.bundle_warnings(manifest.class_names, manifest.classes, manifest.latent.level_bytes):
        return Finding("warning", found, "; ".join(warnings))
    return ok(found)


def _updates(config: "RuntimeConfig") -> Finding:
    from edge_runtime.firmware.updates import store_of, today

    store = store_of(config)
    assert store is not None
    state = store.state()
    if state.current:
        store.installed(state.current)  # the board would go back to the one before
    found = f"{state.current or store.factory} is in use, {len(store.trust)} trusted key(s)"
    if state.starts is not None:
        return Finding(
            "warning", f"{found}, on trial after {state.starts} start(s)", "wait until it has handled frames"
        )
    if state.why:
        return Finding("warning", f"{found}; {state.failed} was given up: {state.why}", "sign a newer version")
    if why := store.fault(_in_use(config), today()):
        return Finding("warning", found, f"it runs all the same: {why}")
    return ok(found)


def _broker(path: Path, config: "RuntimeConfig", table: str, subscriptions: list[probes.Subscription]) -> Check:
    from edge_runtime.wire import topics

    mqtt = config.mqtt if table == "mqtt" else config.near_broker
    assert mqtt is not None

    def check() -> Finding:
        board = config.board
        status = topics.status(board.site, board.id) if table == "mqtt" else ""
        answer = probes.ask(mqtt.settings(board.id), subscriptions, status)
        found, advice = f"{mqtt.host}:{mqtt.port}: {answer.found}", answer.warnings
        if answer.has_board:
            found += f"; a board with the id {board.id} is running"
        if answer.has_board and not host_checks.runs_here(path):
            advice.append(f"no process here runs {path}: if another board has this id, give one of them another id")
        if mqtt.insecure and not mqtt.ca_file:
            advice.append("use TLS (ca_file) on a network that others use too")
        return Finding("warning" if advice else "ok", found, "; ".join(advice))

    return Check(f"broker {table}", check, probes.CONNECT_S + LIMIT_S)


def _camera(camera: "CameraConfig") -> Finding:
    from edge_runtime.capture.readers import check_source

    if error := check_source(camera)[0]:  # a warning may pass while the camera is read
        raise AiflowError(error)
    return ok(probes.seen(camera, CAMERA_FRAMES))


def _self_test(config: "RuntimeConfig") -> Finding:
    """Head and draft on FRAMES frames of noise, which is no worse for their speed than photos."""
    import numpy as np

    from edge_runtime.inference.bundle import open_bundle
    from edge_runtime.inference.choice import choose
    from edge_runtime.inference.networks import load_networks
    from edge_runtime.inference.preprocess import PIXELS

    board = config.board
    bundle = open_bundle(_in_use(config))
    setup = choose(bundle, board.backend, config.threads, board.providers)
    head, draft, _ = load_networks(bundle, setup, has_labels=False)
    assert head
    assert draft
    rng, head_ms, draft_ms = np.random.default_rng(0), list[float](), list[float]()
    for _ in range(FRAMES):
        pixels = rng.integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)
        started = time.perf_counter()
        symbols = head.symbols(pixels)
        between = time.perf_counter()
        draft.write(symbols)
        head_ms.append(1e3 * (between - started))
        draft_ms.append(1e3 * (time.perf_counter() - between))
    head_median, draft_median = statistics.median(head_ms), statistics.median(draft_ms)
    used = " ".join([setup.backend, *setup.providers])
    return ok(
        f"{FRAMES} frames: head {head_median:.1f} ms, draft {draft_median:.1f} ms (medians, {used}, "
        f"{setup.threads} thread(s))"
    )
