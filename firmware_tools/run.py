"""`aiflow run board.toml`: a board."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration's path."""
    parser.add_argument("config", type=Path, help="board.toml; `aiflow validate` checks it, README.md has an example")


def run(args: argparse.Namespace) -> int:
    """Runs until the sources end, SIGINT or SIGTERM."""
    from edge_runtime.app import STOP_S, run_board
    from edge_runtime.config import RuntimeConfig, load_toml
    from edge_runtime.shutdown import stop_when_told

    config = load_toml(args.config, RuntimeConfig)
    stop = stop_when_told(STOP_S)
    run_board(config, stop)
    return stop.exit_code
