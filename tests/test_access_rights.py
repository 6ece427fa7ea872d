"""The rights that docs/protocol.md lists are enough, and are needed: a broker that allows nothing else."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_runtime.config import BoardConfig, CameraConfig, MqttConfig, RuntimeConfig
from server.config import Config, ServerConfig
from tests.brokers import Mosquitto, skip
from tests.sites import assert_answered

PAGE = Path(__file__).parents[1] / "docs" / "protocol.md"
IDS = {"<site>": "home", "<board>": "porch", "<server>": "attic", "<pool>": "servers"}
PLUGINS = "/usr/lib/*/mosquitto_dynamic_security.so"


def rights() -> dict[str, tuple[list[str], list[str]]]:
    """Who writes and reads what, as the page says."""
    table = PAGE.read_text().split("<!-- rights -->")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    return {who: (_topics(writes), _topics(reads)) for who, writes, reads in rows}


def _topics(cell: str) -> list[str]:
    for name, value in IDS.items():
        cell = cell.replace(name, value)
    return re.findall(r"`([^`]+)`", cell)


def role(name: str, writes: list[str], reads: list[str]) -> dict[str, Any]:
    kinds = {"publishClientSend": writes, "publishClientReceive": reads, "subscribePattern": reads}
    acls = [{"acltype": kind, "topic": topic, "allow": True} for kind, allowed in kinds.items() for topic in allowed]
    return {"rolename": name, "acls": acls}


def account(name: str) -> dict[str, Any]:
    """With its own name as the password."""
    salt = b"12 bytes sal"
    digest = hashlib.pbkdf2_hmac("sha512", name.encode(), salt, 101)
    secret = {"password": base64.b64encode(digest).decode(), "salt": base64.b64encode(salt).decode()}
    return {"username": name, "roles": [{"rolename": name}], "iterations": 101, **secret}


@contextmanager
def strict_broker(folder: Path, roles: dict[str, tuple[list[str], list[str]]]) -> Iterator[Mosquitto]:
    """A Mosquitto that allows what the roles say and nothing else, subscriptions included."""
    plugin = next(Path("/").glob(PLUGINS[1:]), None)
    if plugin is None:
        skip(f"there is no {PLUGINS}: apt install mosquitto")
    closed = ("publishClientSend", "publishClientReceive", "subscribe", "unsubscribe")
    lists = {
        "defaultACLAccess": dict.fromkeys(closed, False),
        "clients": [account(name) for name in roles],
        "roles": [role(name, *allowed) for name, allowed in roles.items()],
    }
    (folder / "rights.json").write_text(json.dumps(lists))
    settings = f"plugin {plugin}\nplugin_opt_config_file {folder}/rights.json\npersistence false\n"
    with Mosquitto(folder, "listener {port} 127.0.0.1\nallow_anonymous false\n" + settings) as broker:
        yield broker


def login(folder: Path, name: str, port: int) -> MqttConfig:
    (folder / name).write_text(name)
    return MqttConfig(port=port, username=name, password_file=str(folder / name))


def test_the_rights_of_the_page_are_enough_for_board_server_and_user(board_bundle, tmp_path):
    from tests.edge_runtime.test_app import photo

    (tmp_path / "photo.jpg").write_bytes(photo(1))
    listed = rights()
    roles = {"porch": listed["board"], "attic": listed["server"], "user": listed["user"]}
    with strict_broker(tmp_path, roles) as broker:
        server = Config(ServerConfig(id="attic", bundle=str(board_bundle.path)), login(tmp_path, "attic", broker.port))
        board = RuntimeConfig(
            BoardConfig("porch", str(board_bundle.path), deadline_ms=60_000, paradigm="speculative"),
            (CameraConfig("door", str(tmp_path / "photo.jpg")),),
            login(tmp_path, "porch", broker.port),
        )
        assert_answered(board, server, login(tmp_path, "user", broker.port).settings("user"))
