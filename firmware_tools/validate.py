"""`aiflow validate`: finds mistakes before anything runs."""

import argparse
import logging
import socket
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from edge_runtime.errors import AiflowError, ConfigError
from firmware_tools.host_checks import check_packages, check_place
from firmware_tools.probes import Subscription, ask, board_subscriptions, listed_model, missing_prompts, seen

if TYPE_CHECKING:
    from edge_runtime.config import MetricsConfig, RuntimeConfig
    from edge_runtime.inference.bundle import Bundle
    from edge_runtime.mqtt.settings import MqttSettings
    from server.config import Config

Check = tuple[str, Callable[[], str]]  # what is checked; a function that returns what it found or raises AiflowError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="board.toml, server.toml or the directory of a bundle")
    parser.add_argument(
        "--connect",
        action="store_true",
        help="also connect to the brokers and to an address in target, and read a frame from each camera",
    )


def run(args: argparse.Namespace) -> None:
    """Prints a line per check. Raises ConfigError for a mistake, and AiflowError if a connection or a camera fails."""
    from edge_runtime.config import RuntimeConfig, load_toml, read_toml

    if args.path.is_dir():
        _check_bundle(args.path, for_server=False)
        return
    if "server" in read_toml(args.path):
        from server.config import Config

        checks = _check_server(args.path, load_toml(args.path, Config))
    else:
        checks = _check_board(args.path, load_toml(args.path, RuntimeConfig))
    if args.connect:
        _connect(checks)


def _check_server(path: Path, config: "Config") -> list[Check]:
    """Returns the checks that need a connection."""
    from edge_runtime.wire import topics
    from server.app import check

    server = config.server
    if found := check(config):
        print(found)
    spent, cache = config.openai and config.openai.spent_file, config.lm.cache
    _warn([check_place("spent_file in [openai]", Path(spent), is_file=True)] if spent else [])
    _warn([check_place("cache in [lm]", Path(cache), is_file=False)] if cache else [])
    _warn([config.hidden_frames(), config.short_stop()])
    _warn(_metrics(config.metrics))
    print(f"{path}: server {server.id} of site {server.site} is in order")
    # Not the share of requests: a member that does not answer would take some of them from the running servers.
    checks = [_broker("mqtt", config.mqtt_settings(), [Subscription(topics.reply(server.site, server.id))])]
    if config.upstream:
        above = config.upstream.settings(server.id)
        checks.append(_broker("upstream.mqtt", above, [Subscription(topics.reply(config.upstream.site, server.id))]))
    if openai := config.openai:
        url = server.target.partition(":")[2]
        checks.append((f"[openai] {url}", lambda: _with_warnings(*listed_model(url, openai))))
    return checks


def _check_board(path: Path, config: "RuntimeConfig") -> list[Check]:
    """Returns the checks that need a connection."""
    board = config.board
    packages = check_packages(board)
    if packages.status == "failure":
        raise ConfigError(f"the packages of a board: {packages.found}: {packages.advice}")
    # Now that OpenCV does not end this process.
    from edge_runtime.capture import Cameras
    from edge_runtime.firmware.updates import store_of

    near = config.near_broker
    settings = config.mqtt.settings(board.id)
    near_settings = near.settings(board.id) if near else None
    config.frigate.check_files()
    bundle = _check_bundle(Path(board.bundle), for_server=False)
    config.sampling(bundle.words)
    if (store := store_of(config)) is not None:
        print(f"{store.folder}: {len(store.entries())} installed bundle(s), {len(store.trust)} trusted key(s)")
    _warn([f"packages: {packages.found}: {packages.advice}"] if packages.status == "warning" else [])
    _warn(Cameras(config.cameras).check())
    manifest = bundle.manifest
    _warn(config.bundle_warnings(manifest.class_names, manifest.classes, manifest.latent.level_bytes))
    if config.outbox:
        _warn([check_place("file in [outbox]", Path(config.outbox.file), is_file=True)])
    if config.updates:
        _warn([check_place("folder in [updates]", Path(config.updates.folder), is_file=False)])
    if config.kept_frames:
        _warn([check_place("folder in [kept_frames]", Path(config.kept_frames.folder), is_file=False)])
    if below := urlsplit(config.frigate.url or "").path.strip("/"):
        _warn([f"url in [frigate] has the path /{below}: remove it, unless a proxy has Frigate there"])
    _warn(_metrics(config.metrics))
    print(f"{path}: board {board.id} with {len(config.cameras)} camera(s) is in order")
    for_servers, for_users = board_subscriptions(config)
    prompts = {camera.name: camera.prompt for camera in config.cameras if camera.prompt}
    missing = partial(missing_prompts, settings, board.site, prompts) if prompts else list
    checks = [_broker("mqtt", settings, for_servers if near else for_servers + for_users, missing)]
    if near_settings:
        checks.append(_broker("local", near_settings, for_users))
    return checks + [(f"camera {camera.name}", lambda camera=camera: seen(camera)) for camera in config.cameras]


def _check_bundle(path: Path, for_server: bool) -> "Bundle":
    from edge_runtime.inference.bundle import open_bundle

    bundle = open_bundle(path)
    print(f"{path}: bundle {bundle.check(for_server)}")
    return bundle


def _warn(warnings: Iterable[str]) -> None:
    for warning in filter(None, warnings):
        print(f"warning: {warning}")


def _metrics(config: "MetricsConfig | None") -> list[str]:
    """A warning if the host is no address of this machine now. Its port may be that of the program that runs."""
    if config is None:
        return []
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError as error:
        why = error.strerror or error
        return [f"host in [metrics] = {config.host}: {why}: want an address of this machine; until it is, no metrics"]
    return []


def _connect(checks: list[Check]) -> None:
    """Prints a line per check, good or bad. Raises AiflowError if one fails."""
    logging.getLogger("edge_runtime").setLevel(logging.CRITICAL)  # each failure is in its line
    failed = [name for name, check in checks if not _passes(name, check)]
    if failed:
        raise AiflowError(f"{len(failed)} of {len(checks)} connections failed: {', '.join(failed)}")


def _passes(name: str, check: Callable[[], str]) -> bool:
    try:
        print(f"OK      {name}: {check()}", flush=True)
    except AiflowError as error:
        print(f"FAILED  {name}: {error}", flush=True)
        return False
    return True


def _broker(
    table: str,
    settings: "MqttSettings",
    subscriptions: list[Subscription],
    more: Callable[[], list[str]] = list,
) -> Check:
    """more: finds further warnings, once there was a connection."""

    def check() -> str:
        answer = ask(settings, subscriptions)
        return _with_warnings(answer.found, [*answer.warnings, *more()])

    return f"[{table}] {settings.host}:{settings.port}", check


def _with_warnings(found: str, warnings: list[str]) -> str:
    return "\n".join([found, *(f"warning: {warning}" for warning in warnings)])
