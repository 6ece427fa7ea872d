"""`aiflow validate`: find a mistake before anything runs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_runtime.inference.bundle import Bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to check."""
    parser.add_argument("path", type=Path, help="board.toml, server.toml or a bundle's directory")


def run(args: argparse.Namespace) -> None:
    """Prints what was found in order; raises the named error of what is not."""
    if args.path.is_dir():
        _bundle(args.path)
    elif _is_server(args.path):
        from edge_runtime.config import ConfigError, load_toml
        from server.config import Config

        server = load_toml(args.path, Config)
        server.mqtt_settings()
        if server.upstream:
            server.upstream.settings(server.server.id)
        targets = _bundle(Path(server.server.bundle)).manifest.targets
        if server.server.tier not in targets:
            raise ConfigError(f'{args.path}: tier = "{server.server.tier}", but the bundle has {", ".join(targets)}')
        print(f"{args.path}: server {server.server.id} of site {server.server.site} is in order")
    else:
        from edge_runtime.capture import Cameras
        from edge_runtime.config import RuntimeConfig, load_toml

        board = load_toml(args.path, RuntimeConfig)
        for mqtt in filter(None, (board.mqtt, board.local)):
            mqtt.settings(board.board.id)
        _bundle(Path(board.board.bundle))
        for warning in Cameras(board.cameras).check():
            print(f"warning: {warning}")
        print(f"{args.path}: board {board.board.id} with {len(board.cameras)} camera(s) is in order")


def _is_server(path: Path) -> bool:
    import msgspec

    from edge_runtime.config import MAX_CONFIG_BYTES

    try:
        with path.open("rb") as file:
            return "server" in msgspec.toml.decode(file.read(MAX_CONFIG_BYTES))
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False  # the loader says what is wrong


def _bundle(path: Path) -> "Bundle":
    from edge_runtime.inference.bundle import open_bundle

    bundle = open_bundle(path)
    for name in bundle.manifest.files:
        bundle.file(name)
    _ = bundle.tables, bundle.words  # read as they are at a start
    print(f"{path}: bundle {bundle.manifest.name}, id {bundle.id.hex()}, {len(bundle.manifest.files)} files match")
    return bundle
