"""Passwords and tokens come from files: a configuration, an address and the log never contain one."""

import re
from pathlib import Path

from edge_runtime.errors import ConfigError

MAX_PASSWORD_BYTES = 4096


def read_password(path: str, owner: str, key: str = "password_file") -> str:
    """The first line of a file, without a byte order mark.

    owner, key: whose password it is, and the setting that names the file, for messages.

    Raises ConfigError, which never shows it.
    """
    try:
        with Path(path).open("rb") as file:
            lines = file.read(MAX_PASSWORD_BYTES).removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise ConfigError(f"{owner} {key} = {path}: cannot be read: {error.strerror}") from error
    if not lines or not lines[0]:
        raise ConfigError(f"{owner} {key} = {path}: its first line is empty, want the secret")
    try:
        return lines[0].decode()
    except UnicodeDecodeError:  # its text would show a part of the password
        raise ConfigError(f"{owner} {key} = {path}: not UTF-8, save it as plain text") from None


def read_token(path: str, owner: str, key: str) -> str:
    """The same for a secret that goes into a header of HTTP. Raises ConfigError."""
    token = read_password(path, owner, key).strip()
    if not re.fullmatch("[!-~]+", token):
        raise ConfigError(f"{owner} {key} = {path}: its first line is no key, want ASCII without spaces")
    return token
