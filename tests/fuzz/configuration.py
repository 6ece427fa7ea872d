"""board.toml, server.toml, motion masks and link traces."""

import json
import ssl
import tempfile
from functools import cache
from pathlib import Path

import msgspec

from edge_runtime.config import RuntimeConfig, load_toml
from edge_runtime.errors import ConfigError
from server.config import Config
from testbed.shaping import LinkError, parse_trace
from tests.fuzz.mutations import TOML
from tests.fuzz.target import Target

# Each takes about 5 ms, and always gives the same.
msgspec.inspect.type_info = cache(msgspec.inspect.type_info)
ssl.create_default_context = cache(ssl.create_default_context)

GOOD_BOARD = """[board]
id = "b1"
bundle = "bundle"
[[cameras]]
name = "door"
source = "mqtt"
"""
FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-configuration-")


def board(data: bytes) -> None:
    """As `aiflow run` reads it, up to the settings of its connections."""
    path = Path(FOLDER.name) / "board.toml"
    path.write_bytes(data)
    config = load_toml(path, RuntimeConfig)
    for camera in config.cameras:
        camera.motion.polygons()
    config.mqtt.settings("board")


def server(data: bytes) -> None:
    """As `aiflow serve` reads it, up to the settings of its connections."""
    path = Path(FOLDER.name) / "server.toml"
    path.write_bytes(data)
    config = load_toml(path, Config)
    config.mqtt_settings()
    config.check_target()
    if config.upstream:
        config.upstream.settings(config.server.id)


def mask(data: bytes) -> None:
    """One polygon, in a board.toml that is otherwise good."""
    polygon = json.dumps(data.decode("utf-8", "replace"))
    board(f"{GOOD_BOARD}motion.mask = [{polygon}]\n".encode())


def trace(data: bytes) -> None:
    parse_trace(data.decode("utf-8", "replace"), "trace")


TARGETS = {
    "board": Target(board, ConfigError, 4096, format=TOML),
    "server": Target(server, ConfigError, 4096, format=TOML),
    "mask": Target(mask, ConfigError, 1024),
    "trace": Target(trace, LinkError, 4096),
}
