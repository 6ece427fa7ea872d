"""What the README shows works as it stands there."""

import re
from pathlib import Path

from edge_runtime.config import PolicyConfig, RuntimeConfig, load_toml
from edge_runtime.inference.bundle import open_bundle
from edge_runtime.inference.draft_calibration import Calibration
from firmware_tools.evaluate import SHIPPED_BUNDLE
from server.config import Config

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_its_configurations_are_read(tmp_path):
    board, server = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "board.toml").write_text(board)
    (tmp_path / "server.toml").write_text(server)
    assert load_toml(tmp_path / "board.toml", RuntimeConfig).cameras[0].motion.enabled
    upstream = load_toml(tmp_path / "server.toml", Config).upstream
    assert upstream is not None
    assert upstream.mqtt.host == "broker.example"


def test_what_it_says_of_the_shipped_bundles_drafts_holds():
    assert (
        "whose confidence is 0.87 or more (`draft_calibration` in its manifest), and above 0.80 for a floor of"
        in README
    )
    calibration = Calibration(open_bundle(SHIPPED_BUNDLE).manifest.draft_calibration)
    lower, by_default, highest = (calibration.min_confidence(floor) for floor in (0.9, 0.95, 1))
    assert PolicyConfig().quality_floor == 0.95
    assert 0.86 < by_default <= 0.87
    assert 0.80 < lower <= 0.81
    assert highest > 1
