"""The command `aiflow`: parses arguments and hands over to one module per subcommand.

A subcommand's module is imported only when it is asked for, so that `--help` and the board's commands work where
torch is not installed.
"""

import argparse
import importlib
import logging
import sys

from edge_runtime import __version__
from edge_runtime.shutdown import leave

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h: systemd is told not to restart on it

COMMANDS = {
    "demo": "see the whole chain on this machine: broker, server and board, on real photos",
    "run": "run a board: camera -> head and draft -> MQTT -> events",
    "serve": "run an edge or cloud server",
    "validate": "check a configuration or a bundle without running it",
    "watch": "show live events of a site in the terminal",
    "evaluate": "measure quality and bytes on captioned or labelled photos",
    "link": "put a simulated thin link (NB-IoT to Wi-Fi, outages) before a broker",
    "bench": "measure parts (codec, device, server, gateway), the case study (e2e), faults",
}
MODULES = {"bench": "benchmarks.command", "link": "testbed.link_simulator"}  # the others are firmware_tools.<command>
SERVICES = ("run", "serve")  # their log is their output
EPILOG = """\
a first look:      aiflow demo
a real board:      aiflow validate board.toml && aiflow run board.toml
its server:        aiflow serve server.toml
what they say:     aiflow watch --site home
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script; the process's exit code."""
    parser = argparse.ArgumentParser(
        "aiflow",
        description="Big-model answers from a camera on a small board, over a thin MQTT link.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"aiflow {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((a for a in (sys.argv[1:] if arguments is None else arguments) if a in COMMANDS), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == chosen:
            module = importlib.import_module(MODULES.get(name, f"firmware_tools.{name}"))
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    level = logging.DEBUG if args.verbose else logging.INFO if args.command in SERVICES else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    return leave(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    """Every named error of the project is a ValueError with a sentence that says what to do; the rest is a bug.

    What a board or a server meets after its start comes as a RuntimeError, whatever it was: its traceback goes to the
    log, and exit code 1 lets systemd start it again.
    """
    try:
        code: int = args.run(args) or 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if args.verbose:
            raise
        print(f"aiflow {args.command}: {_sentence(error)}", file=sys.stderr)
        return EXIT_CONFIG if args.command in ("run", "serve", "validate") else EXIT_FAILED
    return code


def _sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed: pip install 'aiflow-edge[test]' brings all"
    return f"{error} ({type(error).__name__})"
