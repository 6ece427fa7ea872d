"""server.toml: read whole, and every mistake named with its fix."""

from pathlib import Path

import pytest

from edge_runtime.config import load_toml
from edge_runtime.errors import ConfigError
from server.config import Config

GOOD = '[server]\nid = "s1"\nbundle = "models/zoo/one"\n'


def written(path: Path, text: str) -> Path:
    (path / "server.toml").write_text(text)
    return path / "server.toml"


def test_an_id_and_a_bundle_are_enough(tmp_path: Path) -> None:
    config = load_toml(written(tmp_path, GOOD), Config)
    assert (config.server.site, config.server.tier, config.server.threads) == ("home", "edge", 1)
    settings = config.mqtt_settings()
    assert settings.receive_maximum == config.server.queue
    assert settings.queue_messages > config.server.queue


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("thread = 2", "did you mean threads"),
        ('tier = "moon"', "tier"),
        ('device = "tpu"', "device"),
        ("queue = 0", "queue"),
        ("max_batch = 64", "max_batch"),
        ('[mqtt]\nhots = "broker"', "did you mean host"),
        ("[upstream]\n[upstream.mqtt]\nprot = 1", r"unknown key `prot` \(in upstream.mqtt\): did you mean port"),
        (
            "[upstream]\nmax_shares = 0.1\n[upstream.mqtt]",
            r"unknown key `max_shares` \(in upstream\): did you mean max_s",
        ),
        ('device = "cuda:x"', 'server.device = "cuda:x", want "cpu", "cuda" or, of several, "cuda:1"'),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_toml(written(tmp_path, f"{GOOD}{line}\n"), Config)


def test_a_plain_connection_to_another_machine_is_refused_unless_allowed(tmp_path: Path) -> None:
    remote = '[mqtt]\nhost = "broker.example"\n'
    with pytest.raises(ConfigError, match="TLS is off"):
        load_toml(written(tmp_path, GOOD + remote), Config).mqtt_settings()
    assert load_toml(written(tmp_path, GOOD + remote + "insecure = true\n"), Config).mqtt_settings()
