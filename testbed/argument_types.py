"""Types of command-line arguments."""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

PHOTOS: dict[str, Any] = {"type": Path, "nargs": "+", "metavar": "DIR_OR_TAR"}  # of an argument that names photos


def number(text: str) -> int:
    """An argument's type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, want a whole number from 1")
    return int(text)


def share(text: str) -> float:
    """An argument's type: a number from 0 to 1."""
    with suppress(ValueError):
        if 0 <= (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text!r}, want a number from 0 to 1")


def hf_model(text: str) -> str:
    """An argument's type: the model of a target that transformers runs."""
    kind, _, name = text.partition(":")
    if kind != "hf" or not 1 <= len(name) <= 512:
        raise argparse.ArgumentTypeError(f"{text!r}, want hf:FOLDER, or hf:NAME with a name on the hub")
    return name


def new_file(text: str) -> Path:
    """An argument's type: a file to write at the end. Its directory is checked now, before anything runs."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no such directory to write to: create it first")
    return path
