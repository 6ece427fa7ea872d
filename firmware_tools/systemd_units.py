"""The systemd units of board and server, from the templates in units/, and what a service's protections would break.

Functions of a configuration: nothing here changes the system. service.py installs.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Literal

import edge_runtime
from edge_runtime.config import RuntimeConfig, load_toml, read_toml
from edge_runtime.config.camera_source import WATCH, kind_of
from edge_runtime.errors import AiflowError, ConfigError
from edge_runtime.mqtt import MqttConfig
from edge_runtime.packages import how_to_install_program
from edge_runtime.shutdown import BOARD_STOP_S, SLACK_S

if TYPE_CHECKING:
    from server.config import Config

Role = Literal["board", "server"]

USER = "aiflow"  # a system account; docs/adr/0025-a-system-account.md
STATE = Path("/var/lib/aiflow")  # StateDirectory=: the only directory, besides a private /tmp, that a service may write
ACCOUNT = f'u {USER} - "aiflow board and server" {STATE}'  # as sysusers.d(5) has it; the Debian package ships this line
MARK = "# Written by `aiflow service install`, which writes it again. Your own changes: systemctl edit "
HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))  # ProtectHome= and PrivateTmp=
CREDENTIALS = Path("/run/credentials")  # LoadCredential=: the files exist only for the running service
STOP_SLACK_S = 10.0  # systemd kills a service only after the service itself should have ended
PLAIN = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._+@:,=-"
)  # nothing that systemd expands

# By what the configuration needs. ProtectClock= allows one device, and so forbids all that DevicePolicy= does not.
VIDEO = "SupplementaryGroups=video"
NO_DEVICES = "PrivateTmp=yes\nPrivateDevices=yes\nProtectClock=yes"
CAMERA_DEVICES = (
    f"{VIDEO}\nPrivateTmp=yes\nProtectClock=yes\nDevicePolicy=closed\n"
    "DeviceAllow=char-video4linux rw\nDeviceAllow=char-media rw\nDeviceAllow=char-dma_heap rw"
)
JETSON_CAMERA = f"# nvargus-daemon listens in /tmp, and its client opens the devices of the GPU.\n{VIDEO}"
NO_DEVICES_NOR_USERS = f"{NO_DEVICES}\nPrivateUsers=yes"
GPU = "# A GPU.\nPrivateTmp=yes"
BOARD_GPU = f"{GPU}\n{VIDEO}"  # the group has the devices of a Jetson's GPU, too
# Limits of a board and of each camera, which may have a process that decodes. Measured with onnxruntime: a board with
# 1, 8 and 16 cameras of 1080p and H.264 takes 142, 541 and 988 MB and has 10, 45 and 85 threads. With 2160p and H.265 a
# camera takes 155 MB. A limit that is too low kills a board that works, so the rest is spare.
BOARD_MB, CAMERA_MB = 320, 192
BOARD_TASKS, CAMERA_TASKS = 112, 16
COMPILES = "\n# CUDA and TensorRT take more memory than a board otherwise does.\nMemoryMax=80%"
RAY = "\n# Ray starts a process for each core, each with dozens of threads.\nTasksMax=infinity"


class ServiceError(AiflowError, RuntimeError):
    """A service cannot be installed, asked or removed here."""


@dataclass(frozen=True, slots=True)
class Service:
    """A board or a server as a service."""

    role: Role
    config: Path  # absolute
    unit: str  # the text of its unit
    files: tuple[tuple[str, str], ...]  # what the configuration names, and the path
    writes: tuple[tuple[str, str], ...] = ()  # likewise, what the service writes

    @property
    def uses_credentials(self) -> bool:
        return any(CREDENTIALS in Path(path).parents for _, path in self.files)


def unit_name(role: Role) -> str:
    return f"aiflow-{role}.service"


def mark(role: Role) -> str:
    """The first line of a unit that was installed by us."""
    return f"{MARK}{unit_name(role).removesuffix('.service')}"


def program() -> Path:
    """`aiflow` in the virtual environment that runs. Raises ServiceError if the program is not installed there."""
    path = Path(sys.prefix, "bin", "aiflow")
    if not path.is_file():
        raise ServiceError(
            f"{path} does not exist: install the program into a virtual environment, for example /opt/aiflow "
            f"({how_to_install_program('board')}), and run the `aiflow` of that environment"
        )
    return path


def service_of(config: Path, aiflow: Path) -> Service:
    """The service that runs this configuration with this program. Raises ConfigError for a file that does not load."""
    config = config.absolute()
    if "server" in read_toml(config):
        from server.config import Config

        return _server(config, load_toml(config, Config), aiflow)
    return _board(config, load_toml(config, RuntimeConfig), aiflow)


def _board(path: Path, config: RuntimeConfig, aiflow: Path) -> Service:
    kinds = {kind_of(camera.source) for camera in config.cameras}
    devices = CAMERA_DEVICES if kinds & {"device", "rpicam"} else NO_DEVICES
    if config.board.providers:
        devices = BOARD_GPU
    if "nvargus" in kinds:
        devices = JETSON_CAMERA
    devices += COMPILES if config.board.providers else ""
    files = [("[board] bundle", config.board.bundle), *_broker_files("mqtt", config.mqtt)]
    files += _broker_files("local", config.local)
    files += _named("frigate", config.frigate, "token_file", "ca_file")
    files += _named("updates", config.updates, "trust_file")
    sources = []  # the board itself waits for those that are not there
    for camera in config.cameras:
        if camera.password_file:
            files.append((f"camera {camera.name} password_file", camera.password_file))
        if kind_of(camera.source) in ("watch", "video", "pictures"):
            sources.append((f"camera {camera.name} source", camera.source.removeprefix(WATCH)))
    count = len(config.cameras)
    limits = {"memory_mb": BOARD_MB + CAMERA_MB * count, "tasks": BOARD_TASKS + CAMERA_TASKS * count}
    unit = _unit("board", path, aiflow, BOARD_STOP_S, devices, files, **limits)
    folders = (*_named("updates", config.updates, "folder"), *_named("kept_frames", config.kept_frames, "folder"))
    writes = (*_named("outbox", config.outbox, "file"), *folders)
    return Service("board", path, unit, (*files, *sources), writes)


def _server(path: Path, config: "Config", aiflow: Path) -> Service:
    server = config.server
    devices = GPU if server.device.startswith("cuda") else NO_DEVICES_NOR_USERS
    devices += RAY if config.ray else ""
    files = list(_broker_files("mqtt", config.mqtt))
    files += _named("server", server, "bundle", "second_bundle", "questions_folder")
    files += _named("openai", config.openai, "key_file", "ca_file")
    files += _named("hf", config.hf, "tail")
    files += _named("vllm", config.vllm, "tail")
    files += _named("lm", config.lm, "weights")
    models = (("[server] target", server.target.removeprefix("hf:")), ("[hf] assistant", config.hf.assistant or ""))
    files += [(what, model) for what, model in models if model.startswith(("/", ".", "~"))]  # folders; others are names
    files += _broker_files("upstream.mqtt", config.upstream.mqtt if config.upstream else None)
    files += [(f"[questions] {name}", file) for name, file in config.questions.items()]
    schemas = {name: prompt.schema for name, prompt in config.prompts.items()}
    files += [(f"[prompts.{name}] schema", file) for name, file in schemas.items() if isinstance(file, str)]
    unit = _unit("server", path, aiflow, server.stop_s, devices, files)
    writes = (*_named("openai", config.openai, "spent_file"), *_named("lm", config.lm, "cache"))
    return Service("server", path, unit, tuple(files), writes)


def _broker_files(table: str, broker: MqttConfig | None) -> Iterator[tuple[str, str]]:
    return _named(table, broker, "password_file", "ca_file", "cert_file", "key_file")


def _named(table: str, values: object, *keys: str) -> Iterator[tuple[str, str]]:
    """The keys of a table that have a value, as messages call them."""
    for key in keys:
        if path := getattr(values, key, None):
            yield f"[{table}] {key}", path


def _unit(
    role: Role, config: Path, aiflow: Path, stop_s: float, devices: str, files: list[tuple[str, str]], **limits: int
) -> str:
    from firmware_tools.cli import EXIT_CONFIG

    paths = {str(config), str(aiflow), *(path for _, path in files)}
    waits_for = [path for path in sorted(paths) if path.startswith("/") and set(path) <= PLAIN]
    template = resources.files("firmware_tools").joinpath("units").joinpath(unit_name(role)).read_text(encoding="utf-8")
    return Template(template).substitute(
        mark=mark(role),
        program=aiflow,
        config=config,
        stop_s=f"{stop_s + SLACK_S + STOP_SLACK_S:.0f}",
        exit_config=EXIT_CONFIG,
        devices=devices,
        **limits,
        waits_for=" ".join(path for path in waits_for if CREDENTIALS not in Path(path).parents),
    )


def check_program(aiflow: Path) -> None:
    """Raises ServiceError for a program that works on a terminal, and not as a service."""
    _check_plain(aiflow)
    code = Path(edge_runtime.__file__).parent  # of a checkout, if it is installed with pip -e
    for what, place in (("the virtual environment", aiflow), ("its Python", Path(sys.executable)), ("its code", code)):
        if (folder := hidden_below(place)) is not None:
            raise ServiceError(
                f"{what}, {place.resolve()}, is in {folder}, which a service does not see: make a virtual environment "
                "such as /opt/aiflow with the system's Python, install the program there without -e, and run its aiflow"
            )


def check_files(service: Service) -> None:
    """Raises ConfigError or ServiceError for files that a service would not find, or could not write."""
    _check_plain(service.config)
    for what, text in (("the configuration", str(service.config)), *service.files):
        path = Path(text)
        if not path.is_absolute():
            raise ConfigError(
                f"{service.config}: {what} = {text}: want an absolute path: a service runs in {STATE}, not here"
            )
        if (folder := hidden_below(path)) is not None:
            raise ConfigError(
                f"{service.config}: {what} = {text} is in {folder}, which a service does not see: move it to "
                "/etc/aiflow, /opt/aiflow, /srv or another place, and name it in the configuration"
            )
    for what, text in service.writes:
        if STATE not in (STATE / text).resolve().parents:
            raise ConfigError(
                f"{service.config}: {what} = {text}: a service may write only in {STATE}: name a file there"
            )


def _check_plain(path: Path) -> None:
    if odd := set(str(path)) - PLAIN:
        shown = ", ".join(repr(character) for character in sorted(odd))
        raise ServiceError(f"{path}: systemd gives {shown} a meaning: use letters, digits and /._+@:,=- only")


def hidden_below(path: Path) -> Path | None:
    """The directory that a service does not see, and that has this path or the file to which it links."""
    return next((folder for folder in HIDDEN for p in (path, path.resolve()) if folder in (p, *p.parents)), None)
