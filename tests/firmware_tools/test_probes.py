"""What is asked of a broker: all that a board subscribes to there, and what does not work without it."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from edge_runtime.app import Board
from edge_runtime.config import RuntimeConfig, load_toml
from edge_runtime.inference.bundle import Bundle
from firmware_tools import cli
from firmware_tools.doctor import _with_config, bounded
from firmware_tools.probes import board_subscriptions
from firmware_tools.site_broker import Board as BoardAccount
from firmware_tools.site_broker import Site
from tests.brokers import Mosquitto
from tests.sites import login, site_broker

SITE = Site("home", [BoardAccount("b1")], ["s1"], takes_pictures=True, home_assistants=["ha"])
EVERYTHING = """
[[cameras]]
name = "yard"
source = "mqtt"
topic = "cam/yard"
[[cameras]]
name = "gate"
source = "frigate"
[homeassistant]
[updates]
folder = "bundles"
"""


def configured(folder: Path, bundle: Bundle, more: str = "", port: int = 1) -> Path:
    mqtt = login(folder, "b1", port)
    (folder / "board.toml").write_text(
        f'[board]\nid = "b1"\nbundle = "{bundle.path}"\nparadigm = "offload"\n'
        f'[[cameras]]\nname = "door"\nsource = "mqtt"\n'
        f'[mqtt]\nport = {port}\nusername = "b1"\npassword_file = "{mqtt.password_file}"\n{more}'
    )
    return folder / "board.toml"


@pytest.mark.parametrize("local", ["", "[local]\nport = 2\n"])
@pytest.mark.parametrize("more", ["", EVERYTHING, "[homeassistant]\ndiscovery = false\n"])
def test_exactly_what_a_board_subscribes_to_is_asked_for(
    tmp_path: Path, board_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, more: str, local: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "passwords").mkdir()
    (tmp_path / "passwords" / "b1").write_text("pa55\n")
    config = load_toml(configured(tmp_path, board_bundle, more + local), RuntimeConfig)
    board = Board(config)
    with closing(board.servers), closing(board.local):
        routes = [{(route.filter, route.optional) for route in router.routes} for router in board.routers]
    for_servers, for_users = (
        {(each.topic, each.without != "") for each in asked} for asked in board_subscriptions(config)
    )
    assert routes == ([for_servers, for_users] if local else [for_servers | for_users])


# ---- rights ----


@contextmanager
def without(folder: Path, part: str) -> Iterator[Mosquitto]:
    """A site's broker whose rights lack the subscriptions with this in their topic, as those of an older version do."""
    broker = site_broker(folder, SITE)
    rights = folder / "broker" / "rights.json"
    found = json.loads(rights.read_text())
    for role in found["roles"]:
        kept = [acl for acl in role["acls"] if not (acl["acltype"].startswith("subscribe") and part in acl["topic"])]
        role["acls"] = kept
    rights.write_text(json.dumps(found))
    with broker:
        yield broker


@pytest.mark.parametrize(
    ("part", "status", "says"),
    [
        ("no topic", "ok", ""),
        ("down/bundle/", "warning", "no bundle of `aiflow bundle push` arrives"),
        ("server/+/status", "warning", "does not know which servers are there"),
        ("homeassistant/status", "warning", "Home Assistant does not show the board"),
        ("down/reply", "failure", "refused to subscribe aiflow/home/b1/down/reply"),
    ],
)
def test_a_missing_right_is_a_failure_or_a_warning_that_says_what_will_not_work(
    tmp_path: Path, board_bundle: Bundle, capsys: pytest.CaptureFixture[str], part: str, status: str, says: str
) -> None:
    more = f'[homeassistant]\n[updates]\nfolder = "{tmp_path}/bundles"\n'
    with without(tmp_path, part) as broker:
        path = configured(tmp_path, board_bundle, more, broker.port)
        (finding,) = [bounded(check) for check in _with_config(path) if check.name == "broker mqtt"]
        assert bool(cli.main(["validate", "--connect", str(path)])) == (status == "failure")
    assert finding.status == status
    assert says in finding.found + finding.advice
    lines = capsys.readouterr().out
    assert ("warning: the broker forbids" in lines) == (status == "warning")
    assert says in lines
