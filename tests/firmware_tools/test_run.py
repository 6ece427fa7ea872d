"""What `aiflow run` prints for a person who looks on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import topics
from firmware_tools import cli
from firmware_tools.run import closing_line
from testbed.broker import free_port
from tests import runtimes
from tests.brokers import Mosquitto
from tests.listener import Listener


@pytest.fixture
def config(tmp_path: Path, board_bundle: Bundle) -> Path:
    """Two pictures, and a broker that is away."""
    (tmp_path / "pictures").mkdir()
    for number in (12, 14):  # their drafts have words in both runtimes
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8).repeat(40, 0).repeat(40, 1)
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())
    path = tmp_path / "board.toml"
    path.write_text(
        f'[board]\nid = "b1"\nbundle = "{board_bundle.path}"\nbackend = "onnx"\nparadigm = "device"\n'
        f'[[cameras]]\nname = "door"\nsource = "{tmp_path / "pictures"}"\ninterval_s = 0\n'
        f"[mqtt]\nport = {free_port()}\n"
    )
    return path


def run(*options: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "firmware_tools", "run", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)


def test_a_directory_shows_its_captions_without_a_broker(config: Path) -> None:
    *events, last = run("--show", config).stdout.splitlines()
    assert [event.split()[1:3] for event in events] == 2 * [["b1/door", "new"]]
    assert all("word" in event for event in events)
    assert last.startswith("the board has stopped: 2 frames, ")


def test_a_runtime_that_kills_its_process_does_not_take_the_board_along(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text(config.read_text().replace('backend = "onnx"\n', ""))
    runtimes.install(tmp_path / "packages", monkeypatch, "onnxruntime", runtimes.SIGILL)
    assert run("--show", config).stdout.splitlines()[-1].startswith("the board has stopped: 2 frames, ")
    runtimes.install(tmp_path / "packages", monkeypatch, "ai_edge_litert", runtimes.SIGILL)
    with pytest.raises(subprocess.CalledProcessError) as raised:
        run(config)
    assert raised.value.returncode == cli.EXIT_CONFIG
    assert "no runtime for the networks works on this board: onnx was ended by SIGILL" in raised.value.stderr


def test_a_camera_and_a_broker_need_no_file(config: Path, board_bundle: Bundle) -> None:
    flags = ["--id", "b2", "--broker", "127.0.0.1", "--broker-port", free_port(), "--bundle", board_bundle.path]
    *events, last = run("--show", "--camera", config.parent / "pictures", *map(str, flags)).stdout.splitlines()
    assert {event.split()[1] for event in events} == {"b2/camera"}
    assert ", 2 frames, " in last.replace(":", ",")


def test_a_board_without_a_file_announces_itself_to_home_assistant(
    config: Path, broker: Mosquitto, board_bundle: Bundle
) -> None:
    flags = ["--id", "b2", "--broker", "127.0.0.1", "--broker-port", broker.port, "--bundle", board_bundle.path]
    with Listener(broker.port, topics.discovery("homeassistant", "home", "b2")) as user:
        run("--camera", config.parent / "pictures", *map(str, flags), "--homeassistant")
        assert "camera.camera.caption" in json.loads(user.next())["cmps"]


@pytest.mark.parametrize(
    ("has_broker", "why"),
    [(False, "no connection to the broker 127.0.0.1:"), (True, "no server has been heard: does `aiflow serve` run")],
)
def test_without_broker_or_server_each_loss_says_so_and_only_what_left_is_counted(
    config: Path, broker: Mosquitto, has_broker: bool, why: str
) -> None:
    text = config.read_text().replace('"device"', '"split"\ndeadline_ms = 1000')
    config.write_text(re.sub("port = .*", f"port = {broker.port}", text) if has_broker else text)
    done = run("--show", config)
    *events, last = done.stdout.splitlines()
    lost = [event for event in events if event.split()[2] == "lost"]
    assert len(lost) == 2
    assert all(why in event for event in lost)
    assert ["nothing sent" in event for event in lost] == 2 * [not has_broker]
    assert ("request bytes" in last) is has_broker
    assert done.stderr.count(f"no answer: {why}") == 1  # once, for those who see the log alone


@pytest.mark.parametrize(
    "options",
    [[], ["board.toml", "--camera", "0"], ["board.toml", "--username", "porch"], ["board.toml", "--homeassistant"]],
)
def test_a_file_and_flags_are_not_mixed_and_one_is_needed(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *options]) == cli.EXIT_CONFIG
    assert "want either a board.toml, or options of board and broker" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--camera", "rtsp://v:pa55@camera.lan/"], "--camera: camera camera: "),
        (["--camera", "0", "--id", "Porch!"], "--id: board.id"),
        (["--broker-port", "99999"], "--broker-port: mqtt.port"),
        (["--broker", "broker.lan:1883"], "--broker broker.lan --broker-port 1883"),
    ],
)
def test_a_wrong_flag_is_named(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--broker", "broker.lan", *flags]) == cli.EXIT_CONFIG
    captured = capsys.readouterr().err
    assert says in captured
    assert "pa55" not in captured


@pytest.mark.parametrize("options", [[], ["--no-show"]])
def test_a_service_prints_nothing_beside_its_log(config: Path, options: list[str]) -> None:
    assert run(*options, config).stdout == ""


def test_a_service_does_not_load_what_only_a_terminal_needs(config: Path) -> None:
    code = (
        "import sys; from firmware_tools import cli; code = cli._run(['run', '--no-show', sys.argv[1]]); "
        "print(code, 'edge_runtime.app' in sys.modules, 'rich' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == ["0", "True", "False"]


def test_the_closing_line_has_what_is_not_zero() -> None:
    assert closing_line({"accepted": 3, "lost": 0, "mqtt": {"local": {"losses": 1, "refused": 0}}}) == (
        "the board has stopped: 3 accepted, 1 mqtt local losses"
    )
    assert closing_line({"answer_seconds": {"count": 4, "sum": 0.5}}).endswith(": 0.125 s to an answer on average")
    assert closing_line({"jpeg_bytes": 12345678}).endswith(": 12345678 jpeg bytes")
    assert closing_line({"answer_seconds": {"count": 0, "sum": 0.0}}).endswith("nothing happened")
    assert closing_line({"lost": 0}) == "the board has stopped: nothing happened"
