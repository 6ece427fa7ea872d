"""What `source` of a camera may be, and which keys go with it. Opens nothing; the rules are functions of values.

edge_runtime/capture/ has a reader for each kind.
"""

import os
import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

from edge_runtime.errors import ConfigError

Kind = Literal["mqtt", "frigate", "watch", "rpicam", "nvargus", "device", "address", "video", "pictures"]

WATCH = "watch:"  # before the path of a folder
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")
HTTP = ("http", "https")
SCHEMES = (*HTTP, "mms", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp")
WITH_LOGIN = (*HTTP, "rtsp", "rtsps")
# What cameras call the password in the query of an address.
PASSWORD_KEYS = {"password", "passwd", "passwort", "pass", "pwd", "loginpas", "psw"}
PLACEHOLDERS = "{username}", "{password}"  # stand for the login in an address

# Keys of a camera that only some kinds of source have, with the words for these sources in a message.
CHILD: tuple[tuple[Kind, ...], str] = ("rpicam", "nvargus"), '"rpicam" and "nvargus"'
ADDRESS: tuple[tuple[Kind, ...], str] = ("address",), "an address such as http:// or rtsp://"
KEYS: Mapping[str, tuple[tuple[Kind, ...], str]] = {
    "snapshot": ADDRESS,
    "username": ADDRESS,
    "password_file": ADDRESS,
    "key_frames": ADDRESS,
    "topic": (("mqtt",), '"mqtt"'),
    "frigate_camera": (("frigate",), '"frigate"'),
    "wait_s": (("frigate",), '"frigate"'),
    "existing": (("watch",), '"watch:FOLDER"'),
    "repeat": (("video", "pictures"), "a file or a folder of pictures"),
    "width": CHILD,
    "height": CHILD,
    "fps": CHILD,
}


def kind_of(source: str) -> Kind:
    """The kind of a source. One that is nothing else is the path of pictures: a directory, a tar or a single file."""
    if source in ("mqtt", "frigate", "rpicam", "nvargus"):
        return source  # type: ignore[return-value]
    if source.startswith(WATCH):
        return "watch"
    if "://" in source:
        return "address"
    if source.startswith("/dev/"):
        return "device"
    return "video" if source.lower().endswith(VIDEO_SUFFIXES) else "pictures"


def path_of(source: str) -> str:
    """The path of a source that is a file or a folder. "~" of a user who is not here stays as it is written."""
    return os.path.expanduser(source.removeprefix(WATCH))


def scheme_of(source: str) -> str:
    return source.partition("://")[0].lower()


def check_source_keys(source: str, keys: Mapping[str, Any]) -> None:
    """Raises ConfigError for keys that do not go with the source, and for a password in an address.

    keys: those of KEYS, with their values. No message contains the address, which may contain a password.
    """
    kind = kind_of(source)
    for key, value in keys.items():
        kinds, words = KEYS[key]
        if value is not None and value is not False and kind not in kinds:
            raise ConfigError(f"{key} goes only with {words} as the source: remove it, or change source")
    if source == WATCH:
        raise ConfigError(f'source = "{WATCH}" names no folder: write {WATCH}/srv/ftp/cam')
    if kind == "address":
        _check_address(source, keys)
    elif _contains_password(source.removeprefix(WATCH)):
        raise ConfigError(
            'source contains a password and is not an address: write source = "rtsp://camera.lan/...", '
            'username = "..." and password_file = "/etc/aiflow/camera-password", whose first line is the password'
        )
    if topic := keys.get("topic"):
        _check_topic(topic)


def _contains_password(path: str) -> bool:
    """Whether a path is meant as an address with a password. One that begins with /, . or ~ may contain : and @."""
    query = parse_qsl(path.partition("?")[2])
    is_path = re.match(r"/(?!/)|[.~]", path)
    return any(key.lower() in PASSWORD_KEYS for key, _ in query) or bool(not is_path and re.search("(?s):.*@", path))


def _check_address(source: str, keys: Mapping[str, Any]) -> None:
    scheme = scheme_of(source)
    try:
        parts = urlsplit(source)
        has_port = parts.port is not None or not re.search(r":[^]]*$", parts.netloc)
    except ValueError:  # a port that is no number, such as a password with a slash in it
        parts, has_port = urlsplit(f"{scheme}://camera"), False
    if "@" in parts.netloc or ("@" in source and not has_port):
        host = parts.netloc.rpartition("@")[2] or "camera"
        raise ConfigError(
            f'the address in source contains a user name or a password: write source = "{scheme}://{host}/...", '
            'username = "..." and password_file = "/etc/aiflow/camera-password", whose first line is the password'
        )
    for key, value in parse_qsl(parts.query):
        if key.lower() in PASSWORD_KEYS and value != PLACEHOLDERS[1]:
            raise ConfigError(
                f"the address in source contains a password: write {key}={{password}} there, and name the file whose "
                "first line is the password in password_file"
            )
    has_login = keys.get("username") is not None and keys.get("password_file") is not None
    if any(placeholder in source for placeholder in PLACEHOLDERS) and not has_login:
        raise ConfigError("the address in source has {username} or {password}: set username and password_file")
    if (keys.get("username") is None) != (keys.get("password_file") is None):
        raise ConfigError("a camera's login needs both username and password_file: set both, or remove both")
    if has_login and scheme not in WITH_LOGIN:
        raise ConfigError(f"{scheme}:// has no login: remove username and password_file, or change source")
    if keys.get("snapshot") and scheme not in HTTP:
        raise ConfigError("snapshot goes only with http:// and https://: remove it, or change source")


def _check_topic(topic: str) -> None:
    if re.search(r"[+#\0]", topic) or topic.startswith(("$", "aiflow/")):
        raise ConfigError(
            f'topic = "{topic[:64]}", want one topic without + and #, such as "frigate/front/person/snapshot", and '
            "none that begins with $ or aiflow/; for pictures on aiflow/.../down/frame, leave topic out"
        )
