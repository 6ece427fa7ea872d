"""`aiflow serve server.toml`: an edge or cloud server."""

import argparse
import os
from pathlib import Path

from msgspec.structs import replace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="server.toml; `aiflow validate` checks it, README.md has an example")
    parser.add_argument(
        "--engine", choices=["process", "ray"], help="where the networks run (default: ray if there is a table [ray])"
    )


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM, then finishes the accepted requests. While it loads, they end it at once."""
    from edge_runtime.config import load_toml
    from edge_runtime.sd_notify import Notifier
    from edge_runtime.shutdown import stop_when_told
    from server.app import check, load_target, run_server
    from server.config import Config, RayConfig
    from server.freed_memory import use_one_heap

    use_one_heap()  # torch has threads from the first network on
    config = load_toml(args.config, Config, "server")
    if args.engine:
        config = replace(config, ray=(config.ray or RayConfig()) if args.engine == "ray" else None)
    check(config)
    loaded = load_target(config)
    notifier = Notifier.from_environment(os.environ)
    stop = stop_when_told(config.server.stop_s, reloads=notifier.is_heard)
    run_server(config, stop, notifier, loaded)
    return stop.exit_code
