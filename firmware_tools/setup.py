"""`aiflow setup`: writes a board.toml from questions, or from flags. `aiflow doctor` then checks that it works."""

import argparse
import json
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import AiflowError, ConfigError
from firmware_tools.broker_arguments import LOCAL, add_broker_arguments, mqtt_table

if TYPE_CHECKING:
    from edge_runtime.config import RuntimeConfig

MAX_ANSWER = 2048  # characters
CAMERA = "/dev/video0"
PASSWORD = "/etc/aiflow/password"
QUESTIONS = {  # by the option's name in the parsed arguments
    "id": "Name of this board",
    "camera": "Camera (address, /dev/video0, rpicam, watch:FOLDER, mqtt)",
    "broker": "Broker of the servers",
    "username": "User name at the broker, empty for none",
    "password_file": f"File whose first line is its password, empty for {PASSWORD}",
    "ca_file": "File of the broker's authority, empty for the system's",
}
SECRET = (
    " Write the password into its first line. The service's account must be able to read it, and nobody else: "
    "chgrp aiflow FILE; chmod 640 FILE"
)
# Options that are checked together, by the one that an error names.
CHECKED = {
    "id": (),
    "site": (),
    "bundle": (),
    "homeassistant": (),
    "camera": ("camera_username", "camera_password_file"),
    "broker_port": (),
    "broker": ("username", "password_file", "tls", "ca_file", "cert_file", "key_file", "insecure"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_board_flags(parser)
    parser.epilog = (
        "On a terminal, it asks for id, camera, broker, username, password-file and ca-file if they are left out. "
        "Elsewhere, id, camera and broker are needed."
    )
    parser.add_argument("--out", type=Path, default=Path("board.toml"), metavar="FILE", help="default: board.toml")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def add_board_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tables`."""
    board = parser.add_argument_group("board")
    board.add_argument("--id", help="a-z, 0-9 and - (default: from the host's name)")
    board.add_argument("--camera", metavar="SOURCE", help="an address, /dev/video0, rpicam, watch:FOLDER, mqtt, a path")
    board.add_argument("--camera-username", metavar="NAME", help="user name at the camera, if it has a login")
    board.add_argument("--camera-password-file", metavar="FILE", help="its password; with --camera-username")
    board.add_argument("--bundle", type=Path, metavar="DIR", help="default: the shipped one")
    board.add_argument(
        "--homeassistant", action="store_true", help="appear in the Home Assistant that uses this broker"
    )
    add_broker_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Raises ConfigError for an impossible flag, and AiflowError if something is not answered or not written."""
    from firmware_tools.systemd_units import service_of

    if args.out.exists() and not args.force:
        raise AiflowError(f"{args.out} exists: name another --out, or replace it with --force")
    config_of_flags(args)
    ask(args)
    _make_absolute(args)
    new = args.out.with_name(f".{args.out.name}.new")
    try:
        new.write_text("\n".join(_table(name, table) for name, table in tables(args).items()), encoding="utf-8")
        os.replace(new, args.out)
    except OSError as error:
        raise AiflowError(f"{args.out} cannot be written: {error.strerror}") from error
    except UnicodeEncodeError as error:  # an argument with other bytes
        raise AiflowError("a name in the answers is not UTF-8: rename the file or folder") from error
    finally:
        new.unlink(missing_ok=True)
    for what, path in service_of(args.out, Path("aiflow")).files:
        if _is_missing(path):
            print(f"{path} ({what}) does not exist yet.{SECRET if what.endswith('password_file') else ''}")
    print(f"{args.out} is written. Now: aiflow doctor --config {args.out}")


def ask(args: argparse.Namespace) -> None:
    """Asks a person for the QUESTIONS that no flag answers; again after an impossible answer. Raises AiflowError."""
    defaults = {"id": _host_id(), "camera": CAMERA, "broker": LOCAL}
    for flag, question in QUESTIONS.items():
        if flag == "ca_file" and not mqtt_table(args).get("tls"):
            continue
        if flag == "password_file" and not args.username:
            continue
        if flag not in defaults and not sys.stdin.isatty():
            continue  # no answer is an answer to these
        while getattr(args, flag) is None:
            answer = _answer(flag.replace("_", "-"), question, defaults.get(flag, ""))
            try:
                config_of_flags(argparse.Namespace(**{**vars(args), flag: answer}))
            except ConfigError as error:
                print(error, file=sys.stderr)
            else:
                setattr(args, flag, answer)


def _make_absolute(args: argparse.Namespace) -> None:
    """A service runs in another directory. Only after the checks: a path that begins with / may contain : and @."""
    from edge_runtime.config.camera_source import WATCH, kind_of

    for name in ("bundle", "password_file", "ca_file", "cert_file", "key_file", "camera_password_file"):
        if path := getattr(args, name):
            setattr(args, name, _absolute(path))
    kind = kind_of(args.camera)
    if kind == "watch":
        args.camera = WATCH + _absolute(args.camera.removeprefix(WATCH))
    elif kind in ("video", "pictures") and not args.camera.isdecimal():  # the number of a device
        args.camera = _absolute(args.camera)


def _is_missing(path: str) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        return isinstance(error, FileNotFoundError)  # else nobody may look there but root
    return False


def _absolute(path: str | Path) -> str:
    return os.path.abspath(os.path.expanduser(path))


def has_flags(args: argparse.Namespace) -> bool:
    """Whether one of the options of board and broker is there."""
    names = [name for flag, others in CHECKED.items() for name in (flag, *others) if name != "site"]
    return args.site != "home" or any(getattr(args, name) not in (None, False) for name in names)


def config_of_flags(args: argparse.Namespace) -> "RuntimeConfig":
    """The board of the flags alone, with defaults for what is left out. Raises ConfigError, which names the flag."""
    from edge_runtime.config import RuntimeConfig, convert
    from edge_runtime.mqtt.settings import checked_host

    so_far = argparse.Namespace(**dict.fromkeys(vars(args)))
    for flag, others in CHECKED.items():
        vars(so_far).update({name: getattr(args, name) for name in (flag, *others)})
        values = tables(so_far)
        path = Path(f"--{flag.replace('_', '-')}")
        config = convert(path, values | {"cameras": [values["cameras"]]}, RuntimeConfig)
        try:
            checked_host(config.mqtt.host)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return config


def tables(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The tables of board.toml; `cameras` has one, `homeassistant` is empty."""
    from models import SHIPPED_BUNDLE

    camera = {
        "name": "camera",
        "source": args.camera or CAMERA,
        "username": args.camera_username,
        "password_file": args.camera_password_file,
    }
    board = {"id": args.id or _host_id(), "site": args.site or "home", "bundle": str(args.bundle or SHIPPED_BUNDLE)}
    mqtt = mqtt_table(args)
    if "username" in mqtt:
        mqtt.setdefault("password_file", PASSWORD)
    found = {"board": board, "mqtt": mqtt, "cameras": {key: value for key, value in camera.items() if value}}
    return found | ({"homeassistant": {}} if args.homeassistant else {})


def _answer(flag: str, question: str, default: str) -> str:
    """The answer of a person. Raises AiflowError if there is nobody to ask."""
    if not sys.stdin.isatty():
        raise AiflowError(f"--{flag} is missing: name it, or run this on a terminal, where it is asked for")
    hint = f" [{default}]" if default else ""
    try:
        return input(f"{question}{hint}: ")[:MAX_ANSWER].strip() or default
    except EOFError:
        raise AiflowError(f"--{flag} has no answer: nothing is written") from None


def _host_id() -> str:
    """The name of this machine as an id."""
    return re.sub("[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")[:32] or "board"


def _table(name: str, values: Mapping[str, Any]) -> str:
    """A table of TOML. tomli-w would write the camera as an inline table, to which nobody can add `[[cameras]]`."""
    header = "[[cameras]]" if name == "cameras" else f"[{name}]"
    return "\n".join([header, *(f"{key} = {_value(value)}" for key, value in values.items()), ""])


def _value(value: Any) -> str:
    """A JSON string is a TOML string too, unless it has halves of characters (\\ud83d) or the character 127."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")
