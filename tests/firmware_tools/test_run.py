"""What `aiflow run` prints for a person who looks on."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_runtime.inference.bundle import Bundle
from firmware_tools.run import closing_line
from testbed.broker import free_port


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


def run(config: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "firmware_tools", "run", *options, str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout.splitlines()


def test_a_directory_shows_its_captions_without_a_broker(config: Path) -> None:
    *events, last = run(config, "--show")
    assert [event.split()[1:3] for event in events] == 2 * [["b1/door", "new"]]
    assert all("word" in event for event in events)
    assert last.startswith("the board has stopped: 2 frames, ")


@pytest.mark.parametrize("options", [[], ["--no-show"]])
def test_a_service_prints_nothing_beside_its_log(config: Path, options: list[str]) -> None:
    assert run(config, *options) == []


def test_the_closing_line_has_what_is_not_zero() -> None:
    assert closing_line({"accepted": 3, "lost": 0, "mqtt": {"losses": 1, "refused": 0}}) == (
        "the board has stopped: 3 accepted, 1 mqtt losses"
    )
    assert closing_line({"lost": 0}) == "the board has stopped: nothing happened"
