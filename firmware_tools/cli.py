"""The command `aiflow`: parses the arguments and calls the module of the subcommand.

Only the module of the given subcommand is imported, so that `--help` and the board's commands work without torch.
"""

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Collection

from edge_runtime import __version__
from edge_runtime.decoder_stderr import DECODER_STDERR
from edge_runtime.errors import AiflowError, ConfigError, RestartError
from edge_runtime.logs import ERROR_MARK, is_journal, log_to_stderr
from edge_runtime.packages import package_error, refuse_32_bit
from edge_runtime.shutdown import leave

logger = logging.getLogger(__name__)

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
EXIT_RESTART = 75  # EX_TEMPFAIL of sysexits.h: the units start the service again
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h; the systemd units do not restart a service on it

COMMANDS = {
    "demo": "see the whole chain on this machine: broker, server and board, on real photos",
    "run": "run a board: camera -> head and draft -> MQTT -> events",
    "serve": "run an edge or cloud server",
    "validate": "check a configuration or a bundle without running it",
    "setup": "write a board.toml, from a few questions or from flags",
    "doctor": "look at a board: system, cameras, brokers, bundle, speed, and what to do",
    "service": "install a board or a server as a service of systemd, see how it is, remove it",
    "broker": "write the configuration of a site's broker: accounts, rights, certificates",
    "bundle": "sign bundles, install them on a board or send them to one, go back",
    "watch": "show live events of a site in the terminal",
    "ui": "serve a live page of a site: boards, servers, texts to search in",
    "teach": "teach a question with a few photos, such as whether a gate is open",
    "distil": "let a vision-language model of your own read the features of boards, from photos alone",
    "evaluate": "measure quality and bytes on captioned or labelled photos",
    "link": "put a simulated thin link (NB-IoT to Wi-Fi, outages) before a broker",
    "completion": "print what completes commands, options and files in bash, zsh or fish",
    "bench": "measure parts (codec, device, server, gateway), quality over bytes (rate), the case study (e2e), faults",
}
SERVICES = ("run", "serve")  # these log at INFO
CONFIGURED = (*SERVICES, "validate", "setup", "service", "ui")  # these exit with 78 if a configuration cannot work
EPILOG = """\
a first look:      aiflow demo
a first try:       aiflow run --camera /dev/video0 --broker HOST
a real board:      aiflow setup; aiflow doctor --config board.toml; aiflow run board.toml
as a service:      aiflow service install board.toml
its server:        aiflow serve server.toml
what they say:     aiflow watch --site home; aiflow ui
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code of the process.

    A named error becomes one line on standard error. Any other exception is a bug: its traceback is shown, the exit
    code is 1, and systemd starts the service again.
    """
    return leave(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    command, args = next((argument for argument in arguments if argument in COMMANDS), ""), argparse.Namespace()
    try:
        if command == "run":  # until `stop_when_told`, there is nothing to end in order
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(os.EX_OK))
        refuse_32_bit()
        args = parser_with({command}).parse_args(arguments)
        if command == "run":  # a board decodes the pictures of cameras in this process
            DECODER_STDERR.separate()
        level = logging.DEBUG if args.verbose else logging.INFO if command in SERVICES else logging.WARNING
        log_to_stderr(level)
        code: int = args.run(args) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in Python's buffer
        return EXIT_FAILED
    except AiflowError as error:
        return _report(error, command, args)
    except ImportError as error:
        if (named := package_error(error)) is None:
            raise
        return _report(named, command, args)


def whole_parser() -> argparse.ArgumentParser:
    """With the arguments of every command whose packages are installed: for completion and for the manual page."""
    return parser_with(set(filter(_can_be_imported, COMMANDS)))


def _can_be_imported(command: str) -> bool:
    try:
        importlib.import_module(f"firmware_tools.{command}")
    except ImportError as error:
        if package_error(error) is None:
            raise
        return False
    return True


def parser_with(commands: Collection[str]) -> argparse.ArgumentParser:
    """All commands, but only these with their arguments, since that imports their modules."""
    parser = argparse.ArgumentParser(
        "aiflow",
        description="Big-model answers from a camera on a small board, over a thin MQTT link.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"aiflow {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in commands:
            module = importlib.import_module(f"firmware_tools.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def _report(error: AiflowError, command: str, args: argparse.Namespace) -> int:
    """A mistake in a configuration begins with the file's path."""
    logger.debug("traceback of the error", exc_info=error)
    file = str(getattr(args, "config", None) or getattr(args, "path", None) or "")
    where = f"{file}: " if isinstance(error, ConfigError) and file not in str(error) else ""
    mark = ERROR_MARK if is_journal() else ""
    print(f"{mark}aiflow {command}: {where}{error}", file=sys.stderr)
    if isinstance(error, RestartError):
        return EXIT_RESTART
    return EXIT_CONFIG if isinstance(error, ConfigError) and command in CONFIGURED else EXIT_FAILED
