"""Commands and figures of the README and of docs/FIGURES.md are true as they stand there."""

import re
import subprocess
from pathlib import Path

from edge_runtime.config import PolicyConfig, RuntimeConfig, load_toml
from edge_runtime.inference.bundle import open_bundle
from edge_runtime.inference.draft_calibration import Calibration
from firmware_tools import cli
from models import SHIPPED_BUNDLE
from server.config import Config
from tests.pages import says

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_configurations_are_read(tmp_path):
    board, server = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "board.toml").write_text(board)
    (tmp_path / "server.toml").write_text(server)
    assert load_toml(tmp_path / "board.toml", RuntimeConfig).cameras[0].name == "front"
    assert load_toml(tmp_path / "server.toml", Config).server.tier == "cloud"


def test_its_commands_and_pages_exist():
    commands = re.findall(r"^aiflow ([a-z]+)", README, re.MULTILINE)
    assert len(commands) >= 5
    assert set(commands) <= cli.COMMANDS.keys()
    pages = [page for page in re.findall(r"\]\(([^)#]+)", README) if "://" not in page]
    assert pages
    assert not [page for page in pages if not (ROOT / page).exists()]


def test_the_size_of_an_installation_is_told_before_it_begins(tmp_path):
    """And the README names the build of PyTorch that the Makefile installs."""
    command = ["make", "-n", "demo", f"VENV={tmp_path / 'venv'}"]
    plan = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    told = re.findall(r"[0-9.]+ GB", plan.split("pip install")[0])
    assert told
    assert told[0] in README
    torch = re.search(r"(?m)^TORCH \?= (.*)$", (ROOT / "Makefile").read_text())
    assert torch
    assert f"make demo TORCH={torch[1]}+cpu" in README


def test_what_the_figures_say_of_the_shipped_bundles_drafts_holds():
    page = (ROOT / "docs" / "FIGURES.md").read_text()
    assert says(page, "at least 0.84", "`quality_floor`", "0.95", "0.80", "0.9")
    calibration = Calibration(open_bundle(SHIPPED_BUNDLE).manifest.draft_calibration)
    lower, by_default, highest = (calibration.min_confidence(floor) for floor in (0.9, 0.95, 1))
    assert PolicyConfig().quality_floor == 0.95
    assert (round(lower, 2), round(by_default, 2)) == (0.8, 0.84)
    assert highest > 1
