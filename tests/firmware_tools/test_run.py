"""What `aiflow run` prints for a person who looks on."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_runtime.inference.bundle import Bundle
from firmware_tools import cli
from firmware_tools.run import closing_line
from testbed.broker import free_port
from tests import runtimes


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


def run(*options: str | Path) -> list[str]:
    command = [sys.executable, "-m", "firmware_tools", "run", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout.splitlines()


def test_a_directory_shows_its_captions_without_a_broker(config: Path) -> None:
    *events, last = run("--show", config)
    assert [event.split()[1:3] for event in events] == 2 * [["b1/door", "new"]]
    assert all("word" in event for event in events)
    assert last.startswith("the board has stopped: 2 frames, ")


def test_a_runtime_that_kills_its_process_does_not_take_the_board_along(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text(config.read_text().replace('backend = "onnx"\n', ""))
    runtimes.install(tmp_path / "packages", monkeypatch, "onnxruntime", runtimes.SIGILL)
    assert run("--show", config)[-1].startswith("the board has stopped: 2 frames, ")
    runtimes.install(tmp_path / "packages", monkeypatch, "ai_edge_litert", runtimes.SIGILL)
    with pytest.raises(subprocess.CalledProcessError) as raised:
        run(config)
    assert raised.value.returncode == cli.EXIT_CONFIG
    assert "no runtime for the networks works on this board: onnx was ended by SIGILL" in raised.value.stderr


def test_a_camera_and_a_broker_need_no_file(config: Path, board_bundle: Bundle) -> None:
    flags = ["--id", "b2", "--broker", "127.0.0.1", "--port", free_port(), "--bundle", board_bundle.path]
    *events, last = run("--show", "--camera", config.parent / "pictures", *map(str, flags))
    assert {event.split()[1] for event in events} == {"b2/camera"}
    assert last.startswith("the board has stopped: 2 frames, ")


@pytest.mark.parametrize("options", [[], ["board.toml", "--camera", "0"], ["board.toml", "--broker", "broker.lan"]])
def test_a_file_and_flags_are_not_mixed_and_one_is_needed(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *options]) == cli.EXIT_CONFIG
    assert "want either a board.toml or --camera and --broker" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--camera", "rtsp://v:pa55@camera.lan/"], "the command line: camera camera: "),
        (["--camera", "0", "--id", "Porch!"], "the command line: board.id"),
    ],
)
def test_a_wrong_flag_is_named(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--broker", "broker.lan", *flags]) == cli.EXIT_CONFIG
    captured = capsys.readouterr().err
    assert says in captured
    assert "pa55" not in captured


@pytest.mark.parametrize("options", [[], ["--no-show"]])
def test_a_service_prints_nothing_beside_its_log(config: Path, options: list[str]) -> None:
    assert run(*options, config) == []


def test_a_service_does_not_load_what_only_a_terminal_needs(config: Path) -> None:
    code = (
        "import sys; from firmware_tools import cli; code = cli._run(['run', '--no-show', sys.argv[1]]); "
        "print(code, 'edge_runtime.app' in sys.modules, 'rich' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == ["0", "True", "False"]


def test_the_closing_line_has_what_is_not_zero() -> None:
    assert closing_line({"accepted": 3, "lost": 0, "mqtt": {"losses": 1, "refused": 0}}) == (
        "the board has stopped: 3 accepted, 1 mqtt losses"
    )
    assert closing_line({"lost": 0}) == "the board has stopped: nothing happened"
