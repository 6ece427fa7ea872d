"""`aiflow setup`: writes a board.toml from five questions, or from flags. `aiflow doctor` then checks that it works."""

import argparse
import json
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_runtime.errors import AiflowError, ConfigError
from models import SHIPPED_BUNDLE

MAX_ANSWER = 2048  # characters


class SetupError(AiflowError, ValueError):
    """The file cannot be written, or an answer is missing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    asked = parser.add_argument_group("asked for if they are left out, on a terminal")
    asked.add_argument("--id", help="of this board: a-z, 0-9 and - (default: from the host's name)")
    asked.add_argument("--camera", metavar="SOURCE", help="an address, /dev/video0, rpicam, watch:FOLDER, mqtt, a path")
    asked.add_argument("--broker", metavar="HOST", help="of the servers (default: 127.0.0.1)")
    asked.add_argument("--username", help="at the broker; empty: none")
    asked.add_argument("--ca-file", metavar="FILE", help="authority of the broker's certificate; empty: the system's")
    parser.add_argument("--site", default="home", help="default: home")
    parser.add_argument("--bundle", type=Path, default=SHIPPED_BUNDLE, metavar="DIR", help="default: the shipped one")
    parser.add_argument("--password-file", metavar="FILE", help="at the broker (default: /etc/aiflow/password)")
    parser.add_argument("--port", type=int, help="of the broker (default: 1883 on this machine, else 8883)")
    parser.add_argument("--camera-username", metavar="NAME", help="if the camera has a login")
    parser.add_argument("--camera-password-file", metavar="FILE", help="with it")
    parser.add_argument("--out", type=Path, default=Path("board.toml"), metavar="FILE", help="default: board.toml")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def run(args: argparse.Namespace) -> None:
    """Raises ConfigError for answers that make no valid configuration, and SetupError if it cannot be written."""
    from edge_runtime.config import RuntimeConfig, load_toml
    from edge_runtime.mqtt.settings import is_loopback

    if args.out.exists() and not args.force:
        raise SetupError(f"{args.out} exists: name another --out, or replace it with --force")
    board_id = _answer(args.id, "id", "Name of this board", _host_id())
    source = _answer(args.camera, "camera", "Camera (address, /dev/video0, rpicam, watch:FOLDER, mqtt)", "/dev/video0")
    host = _answer(args.broker, "broker", "Broker of the servers", "127.0.0.1")
    username = _answer(args.username, "username", "User name at the broker, empty for none", "")
    ca_file = args.ca_file or ""
    if not is_loopback(host):
        ca_file = _answer(args.ca_file, "ca-file", "File of the broker's authority, empty for the system's", "")
    tables = {
        "[board]": {"id": board_id, "site": args.site, "bundle": str(args.bundle)},
        "[mqtt]": {
            "host": host,
            "port": args.port or (1883 if is_loopback(host) and not ca_file else 8883),
            "username": username,
            "password_file": args.password_file or ("/etc/aiflow/password" if username else ""),
            "ca_file": ca_file,
            "tls": not is_loopback(host) and not ca_file,
        },
        "[[cameras]]": {
            "name": "camera",
            "source": source,
            "username": args.camera_username,
            "password_file": args.camera_password_file,
        },
    }
    new = args.out.with_name(f".{args.out.name}.new")
    try:
        new.write_text("\n".join(_table(name, values) for name, values in tables.items()), encoding="utf-8")
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


def _table(header: str, values: Mapping[str, Any]) -> str:
    """A table of TOML without what is empty; a JSON string is a TOML string too."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if value]
    return "\n".join([header, *lines, ""])
