"""The board's configuration: one TOML file, read and checked whole at start, then handed down as values.

An unknown key is an error that suggests the nearest one; nothing inside the runtime reads the environment.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from edge_runtime.mqtt import MqttSettings

MAX_CONFIG_BYTES = 256 * 1024

Id = Annotated[str, Meta(pattern="^[a-z0-9-]{1,32}$")]
StationId = Annotated[str, Meta(pattern="^(?!server$)[a-z0-9-]{1,32}$")]  # a topic's level where "server" has a meaning
Config = TypeVar("Config")


class ConfigError(ValueError):
    """A configuration that cannot work; the message names file, key and fix. Commands exit with 78 on it."""


class MqttConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """How to reach the broker; the fields of MqttSettings that an operator sets."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 1883
    username: str | None = None
    password_file: str | None = None  # secrets come from files only
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    tls: bool = False
    insecure: bool = False  # true allows plain text to a broker that is not on this machine
    keepalive_s: Annotated[int, Meta(ge=2, le=600)] = 10

    def settings(self, client_id: str, **others: Any) -> MqttSettings:
        """Raises MqttConfigError (a ValueError) where no connection could ever work."""
        return MqttSettings(client_id=client_id, **msgspec.structs.asdict(self), **others)


class CameraConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """One source of frames."""

    name: Id
    source: str  # a directory, tar, picture or video file, /dev/video0, rtsp://..., or "mqtt": pictures on down/frame
    interval_s: Annotated[float, Meta(ge=0, le=86400)] = 1.0  # between frames; 0 takes every one that the board manages
    stall_s: Annotated[float, Meta(ge=1, le=600)] = 5.0  # a camera without a new frame for so long is opened again
    repeat: bool = False  # start over when files end


class BoardConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The board and how it answers."""

    id: StationId
    bundle: str  # directory of the bundle
    site: Id = "home"
    backend: Literal["auto", "onnx", "litert"] = "auto"
    threads: Annotated[int, Meta(ge=1, le=16)] = 1  # of head and draft
    paradigm: Literal["device", "split", "speculative", "offload"] = "speculative"
    tier: Literal["edge", "cloud"] | None = None  # wanted for the answer; none: whichever server answers
    deadline_ms: Annotated[int, Meta(ge=50, le=600_000)] = 5000  # from capture; after it the draft stands
    resend_ms: Annotated[int, Meta(ge=20, le=60_000)] = 1500  # without a reply for at least so long: the same id again
    open_requests: Annotated[int, Meta(ge=1, le=4096)] = 64  # waiting for replies; the oldest is reported lost
    jpeg_quality: Annotated[int, Meta(ge=1, le=100)] = 75  # offload, and the JPEG equivalent in events


class RuntimeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """board.toml."""

    board: BoardConfig
    cameras: Annotated[tuple[CameraConfig, ...], Meta(min_length=1, max_length=16)]
    mqtt: MqttConfig = MqttConfig()

    def __post_init__(self) -> None:
        names = [camera.name for camera in self.cameras]
        if len(set(names)) < len(names):
            raise ValueError(f"two cameras have one name among {', '.join(names)}: give each its own")


def load_toml(path: Path, kind: type[Config]) -> Config:
    """Reads and checks a TOML file whole. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: name an existing configuration file") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes: this is not a configuration")
    try:
        return msgspec.toml.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_explain(str(error), kind)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def _explain(message: str, kind: type) -> str:
    """msgspec's message, its path written as in TOML, with the nearest known key for an unknown one."""
    found = re.search(r" - at `\$\.?([^`]*)`", message)
    path = found[1] if found else ""
    if found:
        message = message.replace(found[0], f" (in {path})" if path else "")
    if unknown := re.search(r"unknown field `([^`]*)`", message):
        known = _keys(kind, path)
        nearest = difflib.get_close_matches(unknown[1], known, 1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(known)}"
        return message.replace(unknown[0], f"unknown key `{unknown[1]}`") + f": {hint}"
    return message


def _keys(kind: type, path: str) -> list[str]:
    """The keys of one table of a tree of Structs; path as in `mqtt` or `cameras[0]`."""
    table: Any = msgspec.inspect.type_info(kind)
    for name in re.findall(r"[a-z_]+", path):
        inner = next(field.type for field in table.fields if field.encode_name == name)
        table = getattr(inner, "item_type", inner)
    return [field.encode_name for field in table.fields]
