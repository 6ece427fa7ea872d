"""The board's configuration: one TOML file, read and checked whole at start, then handed down as values.

docs/CONFIGURATION.md tells users the same: every key, its default and its range, held to this file by a test.
An unknown key is an error that suggests the nearest one; nothing inside the runtime reads the environment.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from edge_runtime.errors import AiflowError
from edge_runtime.mqtt.settings import MqttSettings, is_loopback

MAX_CONFIG_BYTES = 256 * 1024

Id = Annotated[str, Meta(pattern="^[a-z0-9-]{1,32}$")]
StationId = Annotated[str, Meta(pattern="^(?!server$)[a-z0-9-]{1,32}$")]  # a topic's level where "server" has a meaning
# Leaves room for the longest suffix of its run-time switches, "_enabled", in a topic's 32 characters.
CameraName = Annotated[str, Meta(pattern="^[a-z0-9-]{1,24}$")]
Config = TypeVar("Config")


class ConfigError(AiflowError, ValueError):
    """A configuration that cannot work; the message names file, key and fix. Commands exit with 78 on it."""


class MqttConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """How to reach the broker; the fields of MqttSettings that an operator sets."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 1883
    username: str | None = None
    password_file: str | None = None  # its first line; secrets come from files only
    ca_file: str | None = None  # implies tls
    cert_file: str | None = None  # implies tls
    key_file: str | None = None  # with cert_file
    tls: bool = False  # true without ca_file: the system's authorities
    insecure: bool = False  # true allows plain text to a broker that is not on this machine
    keepalive_s: Annotated[int, Meta(ge=2, le=600)] = 10  # a dead link is seen after about 1.7 of these

    def settings(self, client_id: str, **others: Any) -> MqttSettings:
        """Raises MqttConfigError (a ValueError) where no connection could ever work."""
        return MqttSettings(client_id=client_id, **msgspec.structs.asdict(self), **others)


class MotionConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """When a frame counts as motion; gate.py. Names, meaning and defaults are those of Frigate's motion detection.

    Only `enabled` differs: it is off until asked for. Pixels are those of the picture shrunk to `frame_height`.
    """

    enabled: bool = False
    threshold: Annotated[int, Meta(ge=1, le=255)] = 30  # grey levels that a pixel must differ from the background
    contour_area: Annotated[int, Meta(ge=0, le=100_000)] = 10  # pixels; smaller changed areas are noise
    frame_height: Annotated[int, Meta(ge=16, le=480)] = 100  # pixels; frames are compared at this size
    frame_alpha: Annotated[float, Meta(gt=0, le=1)] = 0.01  # weight of a new frame in the background
    improve_contrast: bool = True  # stretches flat pictures, as at night
    lightning_threshold: Annotated[float, Meta(ge=0.3, le=1)] = 0.8  # share of the picture that changes at once: light
    # Polygons "x1,y1,x2,y2,...", 0..1 of width and height from the top left, where nothing counts: clocks, trees.
    mask: Annotated[tuple[Annotated[str, Meta(max_length=2048)], ...], Meta(max_length=16)] = ()

    def __post_init__(self) -> None:
        self.polygons()

    def polygons(self) -> tuple[tuple[tuple[float, float], ...], ...]:
        """The mask's corners as (x, y). Raises ValueError, naming the polygon, for what is none."""
        return tuple(_corners(polygon) for polygon in self.mask)


def _corners(polygon: str) -> tuple[tuple[float, float], ...]:
    try:
        numbers = [float(number) for number in polygon.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) < 6 or len(numbers) % 2 or not all(0 <= number <= 1 for number in numbers):
        raise ValueError(
            f'mask "{polygon[:64]}" is no polygon: want "x1,y1,x2,y2,x3,y3,...", three corners or more, each number '
            "from 0 to 1 of the picture's width or height"
        )
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


class CameraConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """One source of frames."""

    name: CameraName
    # A directory, tar, picture or video file, /dev/video0, rtsp://..., or "mqtt": pictures on down/frame.
    source: Annotated[str, Meta(min_length=1)]
    interval_s: Annotated[float, Meta(ge=0, le=86400)] | None = None  # between frames; 0: every one the board manages
    stall_s: Annotated[float, Meta(ge=1, le=600)] = 5.0  # a camera without a new frame for so long is opened again
    repeat: bool = False  # start over when files end
    motion: MotionConfig = MotionConfig()  # which of these frames go on; off: all
    max_interval_s: Annotated[float, Meta(ge=0, le=86400)] = 0.0  # one goes on so often without motion too; 0: none
    frozen_s: Annotated[float, Meta(ge=0, le=86400)] = 30.0  # of one and the same picture: reported; 0: never
    # The board's own, unless set here.
    deadline_ms: Annotated[int, Meta(ge=50, le=600_000)] | None = None
    paradigm: Literal["auto", "device", "split", "speculative", "offload"] | None = None
    tier: Literal["edge", "cloud"] | None = None

    @property
    def min_interval_s(self) -> float:
        """Seconds between frames; unless set 1, and 0 over MQTT, where the camera's software has chosen already."""
        if self.interval_s is not None:
            return self.interval_s
        return 0.0 if self.source == "mqtt" else 1.0


class PolicyConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """What a board may spend, and what `paradigm = "auto"` must reach."""

    # What a draft must be worth, as a share of the verified text, to stand without it; 1: each draft is verified.
    quality_floor: Annotated[float, Meta(ge=0, le=1)] = 0.95
    # Of all requests, resends and replays included; 0: no limit.
    bytes_per_minute: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 0
    cpu_share: Annotated[float, Meta(gt=0, le=1)] = 1.0  # of one core, over the frames that come
    may_offload: bool = True  # pictures may leave the board


class OutboxConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Requests without an answer at their deadline, kept on disk and asked again; without a file they are lost."""

    file: str
    max_bytes: Annotated[int, Meta(ge=65536, le=1 << 34)] = 16 << 20  # then the oldest is dropped, and reported
    max_age_s: Annotated[float, Meta(ge=1, le=31 * 86400)] = 86400.0  # since capture; then reported lost
    replay_per_s: Annotated[float, Meta(gt=0, le=1000)] = 2.0  # after an outage, beside live frames
    every_request: bool = False  # written before they leave: a killed board then loses none; wears flash


class MetricsConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Where Prometheus may read the counters."""

    port: Annotated[int, Meta(ge=0, le=65535)]  # 0: any free one, see the log
    host: str = "127.0.0.1"


class BoardConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The board and how it answers."""

    id: StationId
    bundle: str  # directory of the bundle
    site: Id = "home"
    backend: Literal["auto", "onnx", "litert"] = "auto"
    threads: Annotated[int, Meta(ge=1, le=16)] = 1  # of head and draft
    paradigm: Literal["auto", "device", "split", "speculative", "offload"] = "auto"  # auto: chosen per frame
    tier: Literal["edge", "cloud"] | None = None  # wanted for the answer; none: whichever server answers
    deadline_ms: Annotated[int, Meta(ge=50, le=600_000)] = 5000  # from capture; after it the draft stands
    resend_ms: Annotated[int, Meta(ge=20, le=60_000)] = 1500  # without a reply for at least so long: the same id again
    open_requests: Annotated[int, Meta(ge=1, le=4096)] = 64  # waiting for replies; beyond them the device answers
    jpeg_quality: Annotated[int, Meta(ge=1, le=100)] = 75  # offload, and the JPEG equivalent in events
    slowdown: Annotated[float, Meta(ge=1, le=100)] = 1.0  # rehearses a slower board: it sleeps in proportion


class RuntimeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """board.toml."""

    board: BoardConfig
    cameras: Annotated[tuple[CameraConfig, ...], Meta(min_length=1, max_length=16)]
    mqtt: MqttConfig = MqttConfig()  # the broker of the servers
    local: MqttConfig | None = None  # a near broker for events, frames and switches; none: all goes over [mqtt]
    policy: PolicyConfig = PolicyConfig()
    outbox: OutboxConfig | None = None
    metrics: MetricsConfig | None = None

    @property
    def near_broker(self) -> MqttConfig | None:
        """`local`, unless it is the same broker and user as `mqtt`: one connection is enough then.

        A broker may derive the client id from the user name, so a second connection might evict the first.
        """
        local, mqtt = self.local, self.mqtt
        if local is None or (local.port, local.username) != (mqtt.port, mqtt.username):
            return local
        is_same = local.host == mqtt.host or (is_loopback(local.host) and is_loopback(mqtt.host))
        return None if is_same else local

    def __post_init__(self) -> None:
        names = [camera.name for camera in self.cameras]
        if len(set(names)) < len(names):
            raise ValueError(f"two cameras have one name among {', '.join(names)}: give each its own")
        if self.board.paradigm == "offload":
            for camera in self.cameras:
                if camera.paradigm not in (None, "offload"):
                    raise ValueError(
                        f"camera {camera.name} wants {camera.paradigm}, but a board that offloads loads no head: "
                        'give the board paradigm = "auto" and its other cameras "offload"'
                    )


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
