"""`aiflow setup`: a board.toml from flags or answers, which loads; a wrong answer writes nothing."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.config import HomeAssistantConfig, RuntimeConfig, load_toml
from edge_runtime.inference.bundle import Bundle
from firmware_tools import cli
from firmware_tools.site_broker import Board, Site, write_site
from tests.brokers import Mosquitto
from tests.edge_runtime.capture.helpers import write_photos

FLAGS = ["--id", "porch", "--camera", "rtsp://camera.lan/x", "--broker", "broker.lan", "--username", "porch"]


def setup(folder: Path, *flags: str) -> int:
    return cli.main(["setup", "--out", str(folder / "board.toml"), *flags])


def test_flags_make_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        setup(
            tmp_path,
            *FLAGS,
            "--ca-file",
            "/etc/aiflow/ca.pem",
            "--camera-username",
            "v",
            "--camera-password-file",
            "/etc/aiflow/camera",
        )
        == 0
    )
    config = load_toml(tmp_path / "board.toml", RuntimeConfig)
    assert (config.board.id, config.mqtt.host, config.mqtt.port) == ("porch", "broker.lan", 8883)
    assert (config.mqtt.password_file, config.mqtt.ca_file) == ("/etc/aiflow/password", "/etc/aiflow/ca.pem")
    assert (config.cameras[0].source, config.cameras[0].username) == ("rtsp://camera.lan/x", "v")
    assert "aiflow doctor --config" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["board.toml"]


@pytest.mark.parametrize("folder", ["/srv/\N{CAMERA}", '/srv/"\\', "/srv/\x7f"])
def test_any_name_of_a_folder_can_be_read_again(tmp_path: Path, folder: str) -> None:
    flags = ["--id", "b1", "--camera", f"watch:{folder}", "--broker", "localhost", "--username", ""]
    assert setup(tmp_path, *flags) == 0
    assert load_toml(tmp_path / "board.toml", RuntimeConfig).cameras[0].source == f"watch:{folder}"


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    camera = os.fsdecode(b"watch:/srv/\xff")
    assert setup(tmp_path, "--id", "b1", "--camera", camera, "--broker", "localhost", "--username", "") == 1
    assert "not UTF-8" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_broker_elsewhere_has_tls_and_one_on_this_machine_needs_none(tmp_path: Path) -> None:
    assert setup(tmp_path, *FLAGS, "--ca-file", "") == 0
    assert load_toml(tmp_path / "board.toml", RuntimeConfig).mqtt.tls
    assert setup(tmp_path, "--force", "--id", "b", "--camera", "0", "--broker", "localhost", "--username", "") == 0
    mqtt = load_toml(tmp_path / "board.toml", RuntimeConfig).mqtt
    assert (mqtt.tls, mqtt.port, mqtt.username) == (False, 1883, None)
    assert setup(tmp_path, "--force", *FLAGS, "--insecure") == 0
    mqtt = load_toml(tmp_path / "board.toml", RuntimeConfig).mqtt
    assert (mqtt.tls, mqtt.port, mqtt.insecure) == (False, 1883, True)


def test_a_board_appears_in_home_assistant_only_if_asked_to(tmp_path: Path) -> None:
    flags = ("--ca-file", "", "--force")
    assert setup(tmp_path, *FLAGS, *flags) == 0
    assert load_toml(tmp_path / "board.toml", RuntimeConfig).homeassistant is None
    assert setup(tmp_path, *FLAGS, *flags, "--homeassistant") == 0
    assert load_toml(tmp_path / "board.toml", RuntimeConfig).homeassistant == HomeAssistantConfig()


def test_the_doctor_approves_of_what_it_writes(tmp_path: Path, board_bundle: Bundle, broker: Mosquitto) -> None:
    photos = write_photos(tmp_path / "p", 10)
    flags = [
        "--id",
        "b1",
        "--camera",
        photos,
        "--broker",
        "127.0.0.1",
        "--username",
        "",
        "--broker-port",
        str(broker.port),
    ]
    assert setup(tmp_path, *flags, "--bundle", str(board_bundle.path)) == 0
    assert cli.main(["doctor", "--config", str(tmp_path / "board.toml")]) in (0, 1)  # 1: this machine's clock


def test_the_doctor_approves_of_a_login_over_tls_once_the_password_is_where_it_says(
    tmp_path: Path, board_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "p", 10)
    site = Site("home", [Board("b1")], ["s1"])
    write_site(tmp_path, site, make_tls=["localhost"], broker_folder=str(tmp_path / "broker"))
    conf = (tmp_path / "broker" / "aiflow.conf").read_text().replace("listener 8883", "listener {port} 127.0.0.1")
    with Mosquitto(tmp_path, conf + "persistence false\n") as broker:
        flags = f"--id b1 --camera p --broker localhost --broker-port {broker.port} --username b1 --ca-file ca.pem"
        assert setup(tmp_path, *flags.split(), "--password-file", "secret", "--bundle", str(board_bundle.path)) == 0
        assert f"{tmp_path}/secret ([mqtt] password_file) does not exist yet. Write" in capsys.readouterr().out
        doctor = ["doctor", "--config", str(tmp_path / "board.toml")]
        assert cli.main(doctor) == 2
        (tmp_path / "passwords" / "b1").rename(tmp_path / "secret")
        monkeypatch.chdir("/")  # as a service: nothing is relative
        assert cli.main(doctor) in (0, 1)  # 1: this machine's clock
    assert "connected over TLS, as b1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("camera", "written"),
    [
        ("watch:uploads", "watch:{}/uploads"),
        ("photos", "{}/photos"),
        ("day.mp4", "{}/day.mp4"),
        ("0", "/dev/video0"),
        ("rpicam", "rpicam"),
        ("rtsp://camera.lan/x", "rtsp://camera.lan/x"),
    ],
)
def test_every_path_is_written_as_a_service_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, board_bundle: Bundle, camera: str, written: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bundle", "ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).touch()
    flags = "--id b --broker broker.lan --username b --ca-file ca.pem --cert-file cert.pem --key-file key.pem"
    assert setup(tmp_path, *flags.split(), "--password-file", "secret", "--bundle", "bundle", "--camera", camera) == 0
    config = load_toml(tmp_path / "board.toml", RuntimeConfig)
    assert config.cameras[0].source == written.format(tmp_path)
    paths = (config.board.bundle, config.mqtt.password_file, config.mqtt.ca_file, config.mqtt.cert_file)
    assert paths == tuple(f"{tmp_path}/{name}" for name in ("bundle", "secret", "ca.pem", "cert.pem"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--camera", "rtsp://v:pa55@camera.lan/"], "username = "),
        (["--id", "Porch!"], "--id: board.id"),
        (["--camera", 'a"b\n'], ""),
    ],
)
def test_a_wrong_answer_says_what_to_write_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    code = setup(tmp_path, *FLAGS, "--ca-file", "", *flags)
    captured = capsys.readouterr().err
    assert says in captured
    assert "pa55" not in captured
    assert os.listdir(tmp_path) == ([] if code else ["board.toml"])
    assert code == (cli.EXIT_CONFIG if says else 0)


def test_a_file_that_exists_and_a_folder_that_does_not_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "board.toml").write_text("mine")
    assert setup(tmp_path, *FLAGS, "--ca-file", "") == cli.EXIT_FAILED
    assert (tmp_path / "board.toml").read_text() == "mine"
    assert setup(tmp_path / "no", *FLAGS, "--ca-file", "") == cli.EXIT_FAILED
    assert "cannot be written: No such file" in capsys.readouterr().err


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "firmware_tools", "setup", "--out", str(folder / "board.toml")]


def test_without_a_terminal_a_missing_flag_is_named(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == cli.EXIT_FAILED
    assert "--id is missing" in done.stderr


def test_without_a_terminal_no_username_and_the_systems_authorities_are_the_defaults(tmp_path: Path) -> None:
    done = subprocess.run(
        [*command(tmp_path), "--id", "b", "--camera", "0", "--broker", "broker.lan"],
        stdin=subprocess.DEVNULL,
        check=False,
    )
    mqtt = load_toml(tmp_path / "board.toml", RuntimeConfig).mqtt
    assert (done.returncode, mqtt.username, mqtt.tls, mqtt.ca_file) == (0, None, True, None)


@pytest.mark.parametrize(
    ("typed", "refused"),
    [
        ("attic\n\nbroker.lan\n\n\n", ""),
        ("Attic!\nattic\n\nbroker.lan\n\n\n", "--id: "),
        ("attic\n\nbroker.lan\nporch\nmine\n\n", ""),
        ("attic\nrtsp://v:pa55@camera.lan/\n\nbroker.lan:1883\nbroker.lan\n\n\n", "--camera: "),
    ],
)
def test_on_a_terminal_it_asks_until_an_answer_can_be_and_an_empty_one_is_the_default(
    tmp_path: Path, typed: str, refused: str
) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(command(tmp_path), stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        os.write(ours, typed.encode())
        out, err = process.communicate()
    os.close(ours)
    config = load_toml(tmp_path / "board.toml", RuntimeConfig)
    assert out.count(b"[") >= 3
    assert config.mqtt.password_file == (os.path.abspath("mine") if "mine" in typed else None)
    assert (b"mine ([mqtt] password_file) does not exist yet" in out) == ("mine" in typed)
    assert refused.encode() in err
    assert b"pa55" not in err
    assert (config.board.id, config.cameras[0].source, config.mqtt.host) == ("attic", "/dev/video0", "broker.lan")
