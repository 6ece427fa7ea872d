"""`aiflow validate`: finds mistakes before anything runs."""

import argparse
import queue
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.errors import AiflowError, ConfigError

if TYPE_CHECKING:
    from edge_runtime.config import CameraConfig, RuntimeConfig
    from edge_runtime.inference.bundle import Bundle
    from edge_runtime.mqtt.settings import MqttSettings
    from server.config import Config

CONNECT_S = 15.0  # for a connection with TLS and its subscriptions over a slow link
FRAME_S = 12.0  # for a camera's first frame; opening a stream alone may take 5

Check = tuple[str, Callable[[], str]]  # what is checked; a function that returns what it found or raises AiflowError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="board.toml, server.toml or the directory of a bundle")
    parser.add_argument(
        "--connect", action="store_true", help="also connect to the brokers and read a frame from each camera"
    )


def run(args: argparse.Namespace) -> None:
    """Prints a line per check. Raises ConfigError for a mistake, and AiflowError if a connection or a camera fails."""
    from edge_runtime.config import RuntimeConfig, load_toml, read_toml

    if args.path.is_dir():
        _check_bundle(args.path)
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

    server = config.server
    settings = config.mqtt_settings()
    config.check_target()
    above = config.upstream.settings(server.id) if config.upstream else None
    if server.bundle:
        bundle = _check_bundle(Path(server.bundle))
        targets = bundle.manifest.targets
        if server.target == "bundle" and server.tier not in targets:
            raise ConfigError(f'{path}: tier = "{server.tier}", but the bundle has {", ".join(targets)}')
        if config.questions:
            from server.questions import Questions

            Questions(bundle, config.questions)
    print(f"{path}: server {server.id} of site {server.site} is in order")
    # Not the share of requests: a member that does not answer would take some of them from the running servers.
    checks = [_broker("mqtt", settings, [topics.reply(server.site, server.id)])]
    if config.upstream and above:
        checks.append(_broker("upstream.mqtt", above, [topics.reply(config.upstream.site, server.id)]))
    return checks


def _check_board(path: Path, config: "RuntimeConfig") -> list[Check]:
    """Returns the checks that need a connection."""
    from edge_runtime.capture import Cameras
    from edge_runtime.capture.picture_checks import PictureError
    from edge_runtime.inference.backends import installed
    from edge_runtime.wire import topics

    board = config.board
    near = config.near_broker
    settings = config.mqtt.settings(board.id)
    near_settings = near.settings(board.id) if near else None
    _check_bundle(Path(board.bundle))
    if board.paradigm != "offload":
        installed(board.backend)
    try:
        for warning in Cameras(config.cameras).check():
            print(f"warning: {warning}")
    except PictureError as error:
        raise ConfigError(str(error)) from error
    print(f"{path}: board {board.id} with {len(config.cameras)} camera(s) is in order")
    for_servers = [topics.reply(board.site, board.id), topics.server_statuses(board.site)]
    for_users = [topics.settings(board.site, board.id)]
    if any(camera.source == "mqtt" for camera in config.cameras):
        for_users.append(topics.frames(board.site, board.id))
    checks = [_broker("mqtt", settings, for_servers if near else for_servers + for_users)]
    if near_settings:
        checks.append(_broker("local", near_settings, for_users))
    return checks + [(f"camera {camera.name}", lambda camera=camera: _first_frame(camera)) for camera in config.cameras]


def _check_bundle(path: Path) -> "Bundle":
    from edge_runtime.inference.bundle import open_bundle

    bundle = open_bundle(path)
    for name in bundle.manifest.files:
        bundle.file(name)
    _ = bundle.tables, bundle.words  # their content too
    print(f"{path}: bundle {bundle.manifest.name}, id {bundle.id.hex()}, {len(bundle.manifest.files)} files match")
    return bundle


def _connect(checks: list[Check]) -> None:
    """Prints a line per check, good or bad. Raises AiflowError if one fails."""
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


def _broker(table: str, settings: "MqttSettings", subscriptions: list[str]) -> Check:
    return f"[{table}] {settings.host}:{settings.port}", lambda: _subscribed(settings, subscriptions)


def _subscribed(settings: "MqttSettings", subscriptions: list[str]) -> str:
    """Connects as the program does, but with another client id, so that a running program keeps its connection.

    A broker that uses the account's name as the client id disconnects the running program all the same.
    """
    import msgspec

    from edge_runtime.mqtt import MqttClient, State

    settings = msgspec.structs.replace(settings, client_id=f"{settings.client_id}-validate")
    states: queue.SimpleQueue[tuple[State, str]] = queue.SimpleQueue()
    client = MqttClient(
        settings,
        subscriptions=[(topic, 1) for topic in subscriptions],
        on_state=lambda state, reason: states.put((state, reason)),
    )
    with client:
        while True:
            try:
                state, reason = states.get(timeout=CONNECT_S)
            except queue.Empty:
                raise AiflowError(f"no answer within {CONNECT_S:.0f} s: is this the address of the broker?") from None
            if state is State.ONLINE:
                kind = "over TLS" if settings.uses_tls else "in plain text"
                who = f"as {settings.username}" if settings.username else "without a login"
                return f"connected {kind}, {who}; {len(subscriptions)} subscription(s) granted"
            if state is State.BACKOFF:
                raise AiflowError(reason)


def _first_frame(camera: "CameraConfig") -> str:
    import msgspec

    from edge_runtime.capture import Cameras
    from edge_runtime.config import MotionConfig

    if camera.source == "mqtt":
        return "waits for pictures over MQTT, which are not checked"
    stop = threading.Event()
    cameras = Cameras([msgspec.structs.replace(camera, motion=MotionConfig())])
    timer = threading.Timer(FRAME_S, stop.set)
    timer.start()
    try:
        with closing(cameras.frames(stop)) as frames:  # type: ignore[type-var]
            for frame in frames:
                height, width = frame.pixels.shape[:2]
                return f"a frame of {width} x {height} pixels"
    finally:
        timer.cancel()
    state = cameras.states()[camera.name]
    raise AiflowError(f"no frame within {FRAME_S:.0f} s: {state.why or state.state}")
