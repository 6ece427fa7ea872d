"""What the README shows works as it stands there."""

import re
from pathlib import Path

from edge_runtime.config import RuntimeConfig, load_toml
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
