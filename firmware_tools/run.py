"""`aiflow run board.toml`: a board. Or without a file: `aiflow run --camera SOURCE --broker HOST`."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.errors import ConfigError
from firmware_tools.setup import add_board_flags, config_of_flags, has_flags

if TYPE_CHECKING:
    from edge_runtime.reporting import Values
    from edge_runtime.wire import Event


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", help="board.toml; `aiflow validate` checks it")
    add_board_flags(parser)
    parser.epilog = "The options of board and broker are for a board without a file; they are those of `aiflow setup`."
    parser.add_argument(
        "--show",
        action=argparse.BooleanOptionalAction,
        help="print each event to standard output, as `aiflow watch` does (default: if that is a terminal)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs until the sources end, SIGINT or SIGTERM. Then prints every counter that is not zero."""
    from edge_runtime.config import RuntimeConfig, load_toml
    from edge_runtime.sd_notify import Notifier
    from edge_runtime.shutdown import BOARD_STOP_S, stop_when_told

    if (args.config is None) != has_flags(args):
        raise ConfigError(
            "want either a board.toml, or options of board and broker, such as --camera /dev/video0 --broker HOST"
        )
    config = load_toml(args.config, RuntimeConfig, "board") if args.config else config_of_flags(args)
    notifier = Notifier.from_environment(os.environ)
    # StateDirectory= of systemd.exec(5), which may name several.
    state = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    state_folder = Path(state) if state else None
    stop = stop_when_told(BOARD_STOP_S, reloads=notifier.is_heard)
    from edge_runtime.app import run_board  # loads OpenCV, which takes seconds from an SD card: a signal may come

    if stop.is_set():
        return stop.exit_code
    if not (sys.stdout.isatty() if args.show is None else args.show):
        run_board(config, stop, notifier=notifier, state_folder=state_folder)
        return stop.exit_code

    from firmware_tools.watch import Lines, line  # needs rich, 4 MB that a service saves

    def show(event: "Event") -> None:
        lines.put(line(config.board.id, event))

    with Lines() as lines:  # prints on a separate thread: a terminal that stops must not stop the board
        summary = run_board(config, stop, show, notifier, state_folder)
        lines.put(closing_line(summary))
    return stop.exit_code


def closing_line(summary: "Values") -> str:
    from edge_runtime.reporting import kinds

    flat: list[tuple[str, float]] = []
    for name, value in summary.items():
        if name == "answer_seconds":
            numbers = dict(kinds(value))
            flat.append(("s to an answer on average", round(numbers["sum",] / max(1, numbers["count",]), 3)))
        else:
            flat += [(" ".join((name, *labels)), number) for labels, number in kinds(value)]
    counts = ", ".join(f"{count:.15g} {name.replace('_', ' ')}" for name, count in flat if count)
    return f"the board has stopped: {counts or 'nothing happened'}"
