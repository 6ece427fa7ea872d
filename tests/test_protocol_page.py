"""The JSON and the settings that docs/protocol.md lists are those of board and server; its bounds are theirs."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

from edge_runtime.app import Board
from edge_runtime.config import BoardConfig, CameraConfig, PolicyConfig, RuntimeConfig
from edge_runtime.mqtt import MqttSettings
from edge_runtime.planning.server_status import CLAIM_AGE_S, MAX_STATUS, SERVERS, decode_status
from edge_runtime.reporting import board_settings
from edge_runtime.reporting.remote_settings import MAX_SETTING_BYTES
from edge_runtime.wire import Event
from server.config import MAX_REPLY, Config, ServerConfig
from server.engine import Proof
from server.gateway import Gateway
from server.reply_cache import ReplyCache
from server.service import Service
from server.targets.bundle import BundleTarget
from server.watchdog import STATUS_PERIOD_S
from tests.pages import says

PAGE = (Path(__file__).parents[1] / "docs" / "protocol.md").read_text()
CAMERA = CameraConfig("door", "mqtt")


def rows(table: str) -> list[list[str]]:
    """The cells of the table behind a marker."""
    lines = PAGE.split(f"<!-- {table} -->")[1].strip().split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def listed(table: str, only_starred: bool = False) -> set[str]:
    return {
        name for cells in rows(table) if "*" in cells[0] or not only_starred for name in re.findall("`(.*?)`", cells[0])
    }


def test_a_boards_status_has_the_listed_fields(board_bundle):
    board = Board(RuntimeConfig(BoardConfig("porch", str(board_bundle.path)), (CAMERA,)))
    online, offline = (json.loads(board._status(state).payload) for state in ("online", "offline"))
    board.servers.close()
    assert online.keys() == listed("board status")
    assert offline.keys() == listed("board status", only_starred=True)
    assert online["cameras"] == {"door": "starting"}


def test_a_servers_status_has_the_listed_fields_and_a_board_reads_it(board_bundle):
    config = Config(ServerConfig("attic", str(board_bundle.path)))
    target = BundleTarget(board_bundle, SimpleNamespace(proof=Proof(), head=None))
    service = Service(config.server, target, ReplyCache())
    gateway = Gateway(config.mqtt_settings(), "home", "attic", "servers", service.receive, service.status)
    payload = gateway._status_message().payload
    gateway.client.close()
    assert json.loads(payload).keys() == listed("server status")
    assert listed("server status", only_starred=True) == {"state", "server"}
    assert decode_status(payload).server == "attic"
    assert decode_status(b'{"state": "offline", "server": "attic"}').state == "offline"


def test_an_event_has_the_listed_fields():
    assert listed("event") == set(Event.__struct_fields__)


def test_the_settings_are_those_of_the_board():
    config = RuntimeConfig(BoardConfig("porch", "bundle"), (CAMERA,))
    settings = {setting.name: setting for setting in board_settings(config)}
    values = {cells[0].strip("`").replace("<camera>", "door"): cells[1] for cells in rows("settings")}
    assert values.keys() == settings.keys()
    for name, said in values.items():
        for word in re.findall("`(.*?)`", said) or ["0", "1"]:
            assert settings[name].parse(word.lower()) == word
    private = RuntimeConfig(config.board, config.cameras, policy=PolicyConfig(may_offload=False))
    assert len({setting.name for setting in board_settings(private)}) == len(values)


def test_its_bounds_are_those_of_the_code():
    config = Config(ServerConfig("attic", "bundle"))
    bounds: list[tuple[str | int, ...]] = [
        (MqttSettings("127.0.0.1", 1883, client_id="porch").max_inbound_bytes, "board"),
        (config.mqtt_settings().max_inbound_bytes, "server"),
        (MAX_REPLY, "replies", "tier"),
        (MAX_STATUS, "bytes", SERVERS, "servers"),
        (MAX_SETTING_BYTES, "bytes", "`down/set/<name>`"),
        (f"{CLAIM_AGE_S:.0f} s", "status"),
        (f"{STATUS_PERIOD_S:.0f} s", "server"),
    ]
    assert [facts for facts in bounds if not says(PAGE, *facts)] == []
