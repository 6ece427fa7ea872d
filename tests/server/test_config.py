"""server.toml: read whole, and every mistake named with its fix."""

from pathlib import Path

import pytest

from edge_runtime.config import load_toml
from edge_runtime.errors import ConfigError
from server.config import Config, RayConfig, ServerConfig

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


OPENAI = '[server]\nid = "s1"\ntarget = "openai:http://127.0.0.1:8080/v1"\n'
TABLE = '[openai]\nmodel = "m"\n'


def test_another_server_as_target_needs_no_bundle(tmp_path: Path) -> None:
    config = load_toml(written(tmp_path, OPENAI + TABLE), Config)
    config.check_target()
    assert config.server.bundle is None
    assert config.openai
    assert config.openai.model == "m"


SEVERAL = '[vllm]\ntail = "t"\n[prompts.moves]\nframes = 3\n[prompts.stays]\nframes = 1\n'


def test_prompts_whose_frames_are_not_shown_to_boards_with_features_are_a_warning(tmp_path: Path) -> None:
    text = OPENAI.replace("openai:", "vllm:") + 'bundle = "b"\n' + TABLE
    config = load_toml(written(tmp_path, text + SEVERAL), Config)
    config.check_target()
    assert "asked about one picture if a board sends features: moves;" in config.hidden_frames()
    assert load_toml(written(tmp_path, text + SEVERAL.replace("= 3", "= 1")), Config).hidden_frames() == ""
    assert load_toml(written(tmp_path, text + SEVERAL.replace('tail = "t"', "")), Config).hidden_frames() == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[server]\nid = "s1"\n', "required key `bundle` is missing"),
        (GOOD + TABLE, "of no use with target"),
        (OPENAI, r"needs the table \[openai\]"),
        (OPENAI + "pictures = false\n" + TABLE, "answers pictures only"),
        (OPENAI + TABLE + '[questions]\ngate = "gate.safetensors"\n', "need features and tokens"),
        (OPENAI + TABLE + "[upstream]\n[upstream.mqtt]\n", "need features and tokens"),
        (GOOD + '[prompts.gate]\nquestion = "Open?"\n', r"\[prompts\] is of no use with target"),
        ('[server]\nid = "s1"\ntarget = "hf:m"\n[hf]\nprompt = "gate"\n', r"\[hf\] is none of the prompts door"),
        ('[server]\nid = "s1"\ntarget = "hf:./no-such-folder"\n', r"holds no config\.json"),
        ('[server]\nid = "s1"\ntarget = "hf:m"\n[hf]\nassistant = "./none"\n', r"none holds no config\.json"),
        (OPENAI + TABLE + "budget_per_day = 1.0\n", "set input_price"),
        (OPENAI + TABLE + "prediction = true\n", "wants target = .* and the boards' bundle"),
        (OPENAI.replace("openai:", "vllm:"), r"needs the table \[openai\]"),
        (OPENAI.replace("openai:", "vllm:") + 'bundle = "b"\n' + TABLE + "prediction = true\n", "prediction = true"),
        (OPENAI + TABLE + '[vllm]\ntail = "t"\n', r"\[vllm\] is of no use with target"),
        (OPENAI.replace("[server]\n", "[server]\ncalls = 2\n") + TABLE, "calls in .* is of no use with target"),
        (OPENAI.replace("openai:", "vllm:") + TABLE + '[vllm]\ntail = "t"\n', r"`tail` in \[vllm\] reads features"),
        (
            OPENAI.replace("openai:", "vllm:") + 'bundle = "b"\npictures = false\n' + TABLE + SEVERAL,
            "one picture if .*: moves",
        ),
        (OPENAI + TABLE + 'spent_file = "spent.json"\n', "without budget_per_day"),
        (OPENAI.replace("127.0.0.1", "gpu.lan") + TABLE, r"gpu\.lan is not on this machine and its address is http"),
        (OPENAI.replace("127.0.0.1", "me:secret@gpu.lan") + TABLE, "without a login"),
        (OPENAI.replace("/v1", "/v1?key=secret") + TABLE, "without [?] or #"),
        (OPENAI.replace(":8080", ":80800") + TABLE, "wants an address"),
        (OPENAI.replace("127.0.0.1", "[::1") + TABLE, "wants an address"),
        (OPENAI.replace("http://127.0.0.1:8080", "http://") + TABLE, "wants an address"),
    ],
)
def test_a_target_that_lacks_what_it_needs_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        load_toml(written(tmp_path, text), Config).check_target()
    assert "secret" not in str(found.value)


@pytest.mark.parametrize("address", ["http://gpu.lan/v1", "https://gpu.lan/v1", "http://[::1]:8080/v1"])
def test_plain_http_off_this_machine_must_be_allowed(tmp_path: Path, address: str) -> None:
    text = OPENAI.replace("http://127.0.0.1:8080/v1", address) + TABLE
    load_toml(written(tmp_path, text + "insecure = true\n"), Config).check_target()


@pytest.mark.parametrize(
    "target", ["openai", "openai:ftp://x/v1", "openai:http://a b/v1", "vllm:x", "hf:", "hf:a b", "", "bundle "]
)
def test_a_target_of_no_kind_is_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(ConfigError, match='want "bundle", "lm", "openai:http'):
        load_toml(written(tmp_path, OPENAI.replace("openai:http://127.0.0.1:8080/v1", target) + TABLE), Config)


@pytest.mark.parametrize(
    ("table", "message"),
    [("replicas = 3\nmax_replicas = 2", "max_replicas"), ("replicas = 0", "replicas"), ("gpu = 1", "gpu")],
)
def test_a_table_ray_that_cannot_work_is_named(tmp_path: Path, table: str, message: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(f'[server]\nid = "attic"\nbundle = "b"\n[ray]\n{table}\n')
    with pytest.raises(ConfigError, match=message):
        load_toml(file, Config)


def test_another_server_has_no_replicas_of_ours() -> None:
    config = Config(ServerConfig(id="attic", target="openai:http://127.0.0.1:1/v1"), ray=RayConfig())
    with pytest.raises(
        ConfigError, match=r"\[ray\] is of no use with target = \"openai\": .* \"bundle\" or \"hf:FOLDER\""
    ):
        config.check_target()
