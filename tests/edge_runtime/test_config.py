import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.config import MAX_CONFIG_BYTES, CameraConfig, RuntimeConfig, load_toml
from edge_runtime.errors import ConfigError
from firmware_tools.cli import EXIT_CONFIG

BOARD = '[board]\nid = "b1"\nbundle = "models/zoo/small"\n'
CAMERA = '[[cameras]]\nname = "door"\nsource = "photos"\n'


def load(folder: Path, text: str | bytes) -> RuntimeConfig:
    path = folder / "board.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_toml(path, RuntimeConfig)


def test_id_bundle_and_one_camera_are_enough(tmp_path):
    config = load(tmp_path, BOARD + CAMERA)
    assert (config.board.site, config.board.paradigm, config.board.backend) == ("home", "auto", "auto")
    assert config.cameras == (CameraConfig("door", "photos"),)
    assert config.mqtt.settings("b1").host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        (BOARD + "deadline = 9\n" + CAMERA, "deadline", "deadline_ms"),
        (BOARD + CAMERA + "interval = 9\n", "interval", "interval_s"),
        (BOARD + CAMERA + '[mqtt]\nhostname = "x"\n', "hostname", "host"),
        (BOARD.replace("[board]", "[bord]") + CAMERA, "bord", "board"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path, text, key, nearest):
    with pytest.raises(ConfigError, match=rf"board\.toml: .*`{key}`.*did you mean {nearest}\?"):
        load(tmp_path, text)


def test_an_unknown_key_like_no_other_is_refused_with_those_of_its_table(tmp_path):
    with pytest.raises(ConfigError, match=r"`zzz`.*known keys: id, bundle, site, backend, "):
        load(tmp_path, BOARD + "zzz = 1\n" + CAMERA)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (BOARD + "threads = 0\n" + CAMERA, "board.threads"),
        (BOARD + "threads = 17\n" + CAMERA, "board.threads"),
        (BOARD + "deadline_ms = 49\n" + CAMERA, "board.deadline_ms"),
        (BOARD + "resend_ms = 1.5\n" + CAMERA, "board.resend_ms"),
        (BOARD + "open_requests = 0\n" + CAMERA, "board.open_requests"),
        (BOARD + "jpeg_quality = 101\n" + CAMERA, "board.jpeg_quality"),
        (BOARD + 'paradigm = "fast"\n' + CAMERA, "board.paradigm"),
        (BOARD + 'tier = "device"\n' + CAMERA, "board.tier"),
        (BOARD.replace("b1", "B 1") + CAMERA, "board.id"),
        (BOARD + CAMERA + "interval_s = nan\n", r"cameras\[0\].interval_s"),
        (BOARD + CAMERA + "stall_s = inf\n", r"cameras\[0\].stall_s"),
        (BOARD + CAMERA.replace("door", "a/b"), r"cameras\[0\].name"),
        (BOARD + CAMERA + "[mqtt]\nport = 65536\n", "mqtt.port"),
        (BOARD + CAMERA + "[mqtt]\nkeepalive_s = 1\n", "mqtt.keepalive_s"),
        ("cameras = []\n" + BOARD, "cameras"),
        (BOARD + '[[cameras]]\nname = "door"\nsource = ""\n', r"cameras\[0\].source"),
    ],
)
def test_a_value_out_of_bounds_is_refused_and_its_key_named(tmp_path, text, key):
    with pytest.raises(ConfigError, match=rf"board\.toml: .*\(in {key}\)"):
        load(tmp_path, text)


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"required field `bundle` \(in board\)"):
        load(tmp_path, '[board]\nid = "b1"\n' + CAMERA)


@pytest.mark.parametrize(("local", "is_near"), [("", False), ("[local]\n", False), ("[local]\nport = 1884\n", True)])
def test_a_near_broker_is_another_one_than_the_servers(tmp_path, local, is_near):
    assert (load(tmp_path, BOARD + CAMERA + local).near_broker is not None) == is_near


def test_two_cameras_of_one_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="two cameras have one name among door, door"):
        load(tmp_path, BOARD + 2 * CAMERA)


@pytest.mark.parametrize(
    "text", ["[board\n", b"\xff\xfe", "x = " + "[" * 100_000], ids=["syntax", "encoding", "nesting"]
)
def test_what_is_not_toml_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"board\.toml: not TOML"):
        load(tmp_path, text)


def test_a_file_too_large_for_a_configuration_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a configuration"):
        load(tmp_path, "#" * (MAX_CONFIG_BYTES + 1))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent.toml"):
        with pytest.raises(ConfigError, match="name an existing configuration file"):
            load_toml(path, RuntimeConfig)


def test_plain_text_to_another_machine_must_be_asked_for(tmp_path):
    remote = BOARD + CAMERA + '[mqtt]\nhost = "broker.example"\n'
    with pytest.raises(ConfigError, match="insecure = true"):
        load(tmp_path, remote).mqtt.settings("b1")
    assert load(tmp_path, remote + "insecure = true\n").mqtt.settings("b1").host == "broker.example"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (BOARD + "thread = 2\n" + CAMERA, "did you mean threads?"),
        (BOARD.replace("models/zoo/small", "/nowhere") + CAMERA, "/nowhere holds no manifest.json"),
    ],
)
def test_aiflow_run_exits_78_and_says_why(tmp_path, text, found):
    path = tmp_path / "board.toml"
    path.write_text(text)
    code = "import sys; from firmware_tools.cli import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code, "run", path], capture_output=True, text=True, check=False)
    assert result.returncode == EXIT_CONFIG
    assert found in result.stderr
    assert "Traceback" not in result.stderr


def test_a_camera_cannot_want_the_head_that_a_board_does_not_load(tmp_path):
    with pytest.raises(ConfigError, match=r"camera door wants split, but a board that offloads .*: give the board"):
        load(tmp_path, BOARD + 'paradigm = "offload"\n' + CAMERA + 'paradigm = "split"\n')
