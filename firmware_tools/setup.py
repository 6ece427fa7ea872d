"""`aiflow setup`: writes a board.toml from five questions, or from flags. `aiflow doctor` then checks that it works."""

import argparse
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import AiflowError, ConfigError

if TYPE_CHECKING:
    from edge_runtime.config import RuntimeConfig

MAX_ANSWER = 2048  # characters


class SetupError(AiflowError, ValueError):
    """The file cannot be written, or an answer is missing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_board_flags(parser, "asked for if they are left out, on a terminal")
    parser.add_argument("--out", type=Path, default=Path("board.toml"), metavar="FILE", help="default: board.toml")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def add_board_flags(parser: argparse.ArgumentParser, title: str) -> None:
    """What `tables` takes. title: of the flags that have no fixed default."""
    asked = parser.add_argument_group(title)
    asked.add_argument("--id", help="of this board: a-z, 0-9 and - (default: from the host's name)")
    asked.add_argument("--camera", metavar="SOURCE", help="an address, /dev/video0, rpicam, watch:FOLDER, mqtt, a path")
    asked.add_argument("--broker", metavar="HOST", help="of the servers (default: 127.0.0.1)")
    asked.add_argument("--username", help="at the broker; empty: none")
    asked.add_argument("--ca-file", metavar="FILE", help="authority of the broker's certificate; empty: the system's")
    parser.add_argument("--site", default="home", help="default: home")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="default: the shipped one")
    parser.add_argument("--password-file", metavar="FILE", help="at the broker (default: /etc/aiflow/password)")
    parser.add_argument("--port", type=int, help="of the broker (default: 8883 with TLS, else 1883)")
    parser.add_argument("--insecure", action="store_true", help="a broker on another machine without TLS")
    parser.add_argument("--camera-username", metavar="NAME", help="if the camera has a login")
    parser.add_argument("--camera-password-file", metavar="FILE", help="with it")


def run(args: argparse.Namespace) -> None:
    """Raises ConfigError for answers that make no valid configuration, and SetupError if it cannot be written."""
    from edge_runtime.config import RuntimeConfig, load_toml

    if args.out.exists() and not args.force:
        raise SetupError(f"{args.out} exists: name another --out, or replace it with --force")
    values = tables(args, _answer)
    new = args.out.with_name(f".{args.out.name}.new")
    try:
        new.write_text("\n".join(_table(name, table) for name, table in values.items()), encoding="utf-8")
        try:
            load_toml(new, RuntimeConfig)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(new), "these answers make no configuration")) from error
        os.replace(new, args.out)
    except OSError as error:
        raise SetupError(f"{args.out} cannot be written: {error.strerror}") from error
    finally:
        new.unlink(missing_ok=True)
    print(f"{args.out} is written. Now: aiflow doctor --config {args.out}")


def config_of_flags(args: argparse.Namespace) -> "RuntimeConfig":
    """The board of the flags alone, with the defaults of the questions. Raises ConfigError."""
    from edge_runtime.config import RuntimeConfig, convert

    values = tables(args, lambda given, _flag, _question, default: default if given is None else given)
    return convert(Path("the command line"), values | {"cameras": [values["cameras"]]}, RuntimeConfig)


def tables(args: argparse.Namespace, answer: Callable[[str | None, str, str, str], str]) -> dict[str, dict[str, Any]]:
    """The tables of board.toml; `cameras` has one. answer: from a flag's value, its name, its question, its default."""
    from edge_runtime.mqtt.settings import is_loopback
    from models import SHIPPED_BUNDLE

    board_id = answer(args.id, "id", "Name of this board", _host_id())
    source = answer(args.camera, "camera", "Camera (address, /dev/video0, rpicam, watch:FOLDER, mqtt)", "/dev/video0")
    host = answer(args.broker, "broker", "Broker of the servers", "127.0.0.1")
    username = answer(args.username, "username", "User name at the broker, empty for none", "")
    ca_file = args.ca_file or ""
    is_plain = is_loopback(host) or args.insecure
    if not is_plain:
        ca_file = answer(args.ca_file, "ca-file", "File of the broker's authority, empty for the system's", "")
    mqtt = {
        "host": host,
        "port": args.port or (1883 if is_plain and not ca_file else 8883),
        "username": username,
        "password_file": args.password_file or ("/etc/aiflow/password" if username else ""),
        "ca_file": ca_file,
        "tls": not is_plain and not ca_file,
        "insecure": args.insecure,
    }
    camera = {
        "name": "camera",
        "source": source,
        "username": args.camera_username,
        "password_file": args.camera_password_file,
    }
    board = {"id": board_id, "site": args.site, "bundle": str(args.bundle or SHIPPED_BUNDLE)}
    found = {"board": board, "mqtt": mqtt, "cameras": camera}
    return {name: {key: value for key, value in table.items() if value} for name, table in found.items()}


def _answer(given: str | None, flag: str, question: str, default: str) -> str:
    """What the flag says, or what a person answers. Raises SetupError if there is nobody to ask."""
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise SetupError(f"--{flag} is missing: name it, or run this on a terminal, where it is asked for")
    hint = f" [{default}]" if default else ""
    try:
        return input(f"{question}{hint}: ")[:MAX_ANSWER].strip() or default
    except EOFError:
        raise SetupError(f"--{flag} has no answer: nothing is written") from None


def _host_id() -> str:
    """The name of this machine as an id."""
    return re.sub("[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")[:32] or "board"


def _table(name: str, values: Mapping[str, Any]) -> str:
    """A table of TOML; a JSON string is a TOML string too."""
    header = "[[cameras]]" if name == "cameras" else f"[{name}]"
    return "\n".join([header, *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""])
