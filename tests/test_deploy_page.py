"""The files of docs/DEPLOY.md work together: broker, certificates, passwords, rights, board, server."""

import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from edge_runtime.config import CameraConfig, RuntimeConfig, load_toml
from edge_runtime.mqtt import MqttClient, MqttConfig
from firmware_tools.cli import main
from firmware_tools.systemd_units import check_files, service_of
from server.config import Config
from tests.brokers import Mosquitto, mosquitto_or_skip
from tests.firmware_tools.test_service import EXPOSURE
from tests.listener import PATIENCE_S
from tests.sites import assert_answered

PAGE = (Path(__file__).parents[1] / "docs" / "DEPLOY.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """What the page's command makes for the servers' broker, whose name is localhost."""
    mosquitto_or_skip()
    command = next(line for block in blocks("sh") for line in block.splitlines() if line.startswith("aiflow broker"))
    words = command.replace("broker.lan", "localhost").replace("site-home", str(tmp_path)).split()[1:]
    assert main([*words, "--broker-dir", str(tmp_path / "broker")]) == 0
    return tmp_path


def broker(site: Path) -> Mosquitto:
    config = (site / "broker" / "aiflow.conf").read_text()
    return Mosquitto(site, config.replace("listener 8883", "listener {port} 127.0.0.1") + "persistence false\n")


def login(site: Path, config: MqttConfig, port: int) -> MqttConfig:
    """As the page has it, but for this machine."""
    password, authority = str(site / "passwords" / str(config.username)), str(site / "ca.pem")
    return msgspec.structs.replace(config, host="localhost", port=port, password_file=password, ca_file=authority)


def configured(folder: Path) -> tuple[RuntimeConfig, Config]:
    for name, text in zip(("board.toml", "server.toml"), blocks("toml"), strict=True):
        (folder / name).write_text(text)
    return load_toml(folder / "board.toml", RuntimeConfig), load_toml(folder / "server.toml", Config)


def test_board_server_and_person_reach_each_other_over_its_broker(site, board_bundle):
    from tests.edge_runtime.test_app import photo

    (site / "photo.jpg").write_bytes(photo(1))
    board, server = configured(site)
    with broker(site) as running:
        mqtt = login(site, board.mqtt, running.port)
        board = RuntimeConfig(
            msgspec.structs.replace(
                board.board, bundle=str(board_bundle.path), deadline_ms=60_000, paradigm="speculative"
            ),
            (CameraConfig("front", str(site / "photo.jpg")),),
            mqtt,
        )
        server = Config(
            msgspec.structs.replace(server.server, bundle=str(board_bundle.path)),
            login(site, server.mqtt, running.port),
        )
        assert_answered(board, server, login(site, MqttConfig(username="anna"), running.port).settings("anna"))


def test_it_names_every_file_that_its_command_writes(site):
    for path in site.rglob("*"):
        if path.is_file():
            assert str(path.relative_to(site)).split("/")[0] in PAGE
    assert (site / "broker" / "aiflow.conf").read_text().splitlines()[1] == "listener 8883"


def test_its_near_broker_listens_on_loopback_alone(tmp_path):
    (config,) = blocks("conf")
    assert "listener 1883 127.0.0.1\n" in config
    with (
        Mosquitto(tmp_path, config.replace("1883", "{port}") + "persistence false\n") as near,
        MqttClient(MqttConfig(port=near.port).settings("porch")) as client,
    ):
        assert client.wait_online(PATIENCE_S)


def test_its_figures_of_the_units_are_those_that_the_tests_hold_them_to():
    (sentence,) = re.findall(r"(?s)`systemd-analyze security --offline=true` \(systemd 252\)(.*?\d)\. The units", PAGE)
    sources = ("rtsp://camera.lan/x", "/dev/video0", "nvargus", "cpu", "cuda")
    assert [float(figure) for figure in re.findall(r"\d\.\d", sentence)] == [EXPOSURE[source] for source in sources]


def test_its_configurations_make_services(tmp_path):
    configured(tmp_path)
    for role in ("board", "server"):
        name = f"{role}.toml"
        service = service_of(tmp_path / name, Path("/opt/aiflow/bin/aiflow"))
        check_files(replace(service, config=Path("/etc/aiflow", name)))  # a service does not see the tests' folder
        (watchdog_s,) = re.findall(rf"`WatchdogSec` .*?\b(\d+) s for a {role}", PAGE)
        lines = re.findall(r"`((?:Type|Restart)=[a-z0-9-]+)`", PAGE)
        for line in (*lines, f"WatchdogSec={watchdog_s}"):
            assert f"{line}\n" in service.unit
