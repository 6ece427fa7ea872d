"""`aiflow service`: its units pass systemd's own checks, and install and uninstall do what they say and nothing else.

A directory stands in for /, and commands are recorded; those of systemd that can work on a directory are run as well.
"""

import argparse
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.shutdown import BOARD_STOP_S, SLACK_S
from firmware_tools import cli, systemd_units
from firmware_tools import service as command
from firmware_tools.service import EXIT_NOT_INSTALLED, EXIT_RUNNING, EXIT_STOPPED, System, run_command
from firmware_tools.systemd_units import ServiceError, check_files, check_program, service_of
from tests.brokers import skip

AIFLOW = Path("/opt/aiflow/bin/aiflow")
BOARD = """
[board]
id = "porch"
bundle = "/opt/aiflow/bundles/b"
[[cameras]]
name = "front"
source = "{source}"
"""
SERVER = """
[server]
id = "attic"
bundle = "/opt/aiflow/bundles/b"
device = "{source}"
stop_s = 25
"""
OPENAI = '[server]\nid = "attic"\ntarget = "openai:http://127.0.0.1:1/v1"\ndevice = "{source}"\n'
HF = '[server]\nid = "attic"\ntarget = "hf:HOME/model"\ndevice = "{source}"\n'
CASES = [(BOARD, "rtsp://camera.lan/x"), (BOARD, "/dev/video0"), (BOARD, "rpicam"), (BOARD, "nvargus")]
CASES += [(SERVER, "cpu"), (SERVER, "cuda")]
EXPOSURE = {"rtsp://camera.lan/x": 1.4, "/dev/video0": 1.6, "rpicam": 1.6, "nvargus": 2.0, "cpu": 1.2, "cuda": 1.8}


class Recorder:
    """Runs no command of the system that the tests run on; what systemd can do to a directory, it does to `root`."""

    def __init__(self, root: Path) -> None:
        self.root, self.commands, self.fails = root, list[str](), ""
        self.says = ""

    def __call__(self, words: Sequence[str]) -> str:
        self.commands.append(" ".join(words))
        if self.fails and self.fails in self.commands[-1]:
            raise ServiceError(f"`{self.commands[-1]}` failed with exit code 1: no")
        if words[:2] in (["systemctl", "enable"], ["systemctl", "disable"]) and shutil.which("systemctl"):
            run_command([words[0], f"--root={self.root}", words[1], words[-1]])
        return self.says

    def taken(self) -> list[str]:
        commands, self.commands = self.commands, []
        return commands


@pytest.fixture
def _systemd() -> None:
    if not (shutil.which("systemd-analyze") and shutil.which("systemd-sysusers")):
        skip("systemd is not installed: apt install systemd")


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    (tmp_path / "root/run/systemd/system").mkdir(parents=True)
    (tmp_path / "root/etc/systemd/system/multi-user.target.wants").mkdir(parents=True)
    return Recorder(tmp_path / "root")


@pytest.fixture
def system(recorder: Recorder) -> System:
    return System(recorder.root, recorder, is_root=True)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that writes a configuration. /tmp, where the tests are, counts as visible to a service."""
    monkeypatch.setattr(systemd_units, "HIDDEN", (tmp_path / "home",))
    monkeypatch.setattr(systemd_units, "program", lambda: AIFLOW)

    def write(text: str = BOARD, source: str = "rtsp://camera.lan/x", more: str = "") -> Path:
        path = tmp_path / "aiflow.toml"
        path.write_text(text.format(source=source) + more)
        return path

    return write


def act(system: System, action: str, **values: object) -> int:
    return command.run(argparse.Namespace(action=action, **{"dry_run": False, **values}), system)


def tree(root: Path) -> dict[str, bytes | str]:
    """Every path below it, and its content or the target of its link."""
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


# ---- the units ----


@pytest.mark.usefixtures("_systemd")
@pytest.mark.parametrize(("text", "source"), CASES)
def test_a_unit_is_read_by_systemd_and_exposes_little(
    written: Callable[..., Path], tmp_path: Path, text: str, source: str
) -> None:
    service = service_of(written(text, source), Path("/bin/true"))  # systemd wants the program to exist
    path = tmp_path / systemd_units.unit_name(service.role)
    path.write_text(service.unit)
    verify = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, check=False
    )
    assert [line for line in verify.stderr.splitlines() if path.name in line] == []
    offline = ["systemd-analyze", "security", "--offline=true", str(path)]
    done = subprocess.run(offline, capture_output=True, text=True, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd is older than 250, it has no --offline")
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert exposure, done.stderr
    assert float(exposure[1]) <= EXPOSURE[source]


@pytest.mark.parametrize(("text", "stop_s"), [(BOARD, BOARD_STOP_S), (SERVER, 25)])
def test_a_unit_gives_time_to_stop_and_does_not_restart_on_a_wrong_configuration(
    written: Callable[..., Path], text: str, stop_s: float
) -> None:
    unit = service_of(written(text, "cpu"), AIFLOW).unit
    settings = dict(re.findall(r"(?m)^(\w+)=(.*)$", unit))
    assert settings["RestartPreventExitStatus"] == str(cli.EXIT_CONFIG)
    assert float(settings["TimeoutStopSec"]) > stop_s + SLACK_S
    assert settings["Type"] == "notify"
    assert float(settings["WatchdogSec"]) + float(settings["TimeoutAbortSec"]) + float(settings["RestartSec"]) <= 30
    assert settings["ExecStart"].startswith(f"{AIFLOW} ")
    assert settings["ExecStart"].endswith("/aiflow.toml")
    assert "MemoryDenyWriteExecute" not in settings
    assert "$" not in unit.replace("$MAINPID", "")  # systemd's own


def test_a_service_starts_after_the_disks_with_its_files_are_mounted(written: Callable[..., Path]) -> None:
    more = (
        '[mqtt]\nusername = "b"\npassword_file = "/mnt/keys/p"\nca_file = "/run/credentials/aiflow-board.service/ca"\n'
    )
    unit = service_of(config := written(BOARD, "/mnt/photos", more), AIFLOW).unit
    paths = re.findall(r"(?m)^RequiresMountsFor=(.*)$", unit)[0].split()
    assert paths == sorted([str(AIFLOW), "/opt/aiflow/bundles/b", "/mnt/keys/p", str(config)])  # a camera is waited for


@pytest.mark.parametrize(("text", "source"), CASES)
def test_a_service_gets_the_devices_that_its_configuration_needs(
    written: Callable[..., Path], text: str, source: str
) -> None:
    unit = service_of(written(text, source), AIFLOW).unit
    needs_device = source in ("/dev/video0", "rpicam", "nvargus", "cuda")
    assert ("PrivateDevices=yes" in unit) is not needs_device
    assert ("SupplementaryGroups=video" in unit) is (source in ("/dev/video0", "rpicam", "nvargus"))
    if source in ("nvargus", "cuda"):  # one allowed device would forbid those of the GPU
        assert not re.search(r"(?m)^(ProtectClock|DeviceAllow|DevicePolicy)=", unit)


@pytest.mark.parametrize("source", ["mqtt", "/dev/video0", "nvargus"])
def test_a_board_with_providers_gets_the_gpu_and_memory_to_compile_networks(
    written: Callable[..., Path], source: str
) -> None:
    text = BOARD.replace("[[", 'providers = ["tensorrt", "cuda"]\n[[', 1)
    unit = service_of(written(text, source), AIFLOW).unit
    assert not re.search(r"(?m)^(PrivateDevices|ProtectClock|DeviceAllow|DevicePolicy)=", unit)
    assert "SupplementaryGroups=video" in unit
    assert re.findall(r"(?m)^MemoryMax=(.*)", unit)[-1] == "80%"  # the last one counts


@pytest.mark.parametrize("count", [1, 2, 16])
def test_a_board_gets_memory_and_threads_for_each_of_its_cameras(written: Callable[..., Path], count: int) -> None:
    cameras = "".join(f'[[cameras]]\nname = "c{n}"\nsource = "rtsp://camera.lan/{n}"\n' for n in range(1, count))
    unit = service_of(written(BOARD, "rtsp://camera.lan/0", cameras), AIFLOW).unit
    ((memory_mb, tasks),) = re.findall(r"(?m)^MemoryMax=(\d+)M\nTasksMax=(\d+)$", unit)
    board_mb, reader_mb = 116, 155  # measured: resident with onnxruntime; a reader of 2160p, H.265, with its frame
    board_threads, camera_threads = 10, 6  # two in the board, four in the reader: test_video_capture.py
    assert int(memory_mb) >= max(512, board_mb + count * reader_mb)
    assert int(tasks) >= max(128, board_threads + count * camera_threads)
    if count == 1:
        assert (memory_mb, tasks) == ("512", "128")


def test_a_server_with_replicas_gets_the_threads_of_ray(written: Callable[..., Path]) -> None:
    unit = service_of(written(SERVER, "cpu", "[ray]\n"), AIFLOW).unit
    assert re.findall(r"(?m)^TasksMax=(.*)", unit)[-1] == "infinity"


# ---- what a service would not see ----


@pytest.mark.parametrize(
    ("text", "source", "more", "says"),
    [
        (BOARD.replace("/opt/", ""), "mqtt", "", r"\[board\] bundle = aiflow/bundles/b: want an absolute path"),
        (BOARD.replace("/opt", "HOME"), "mqtt", "", r"\[board\] bundle = .* which a service does not see"),
        (BOARD, "watch:HOME/drop", "", "camera front source = .* which a service does not see"),
        (BOARD, "photos", "", "camera front source = photos: want an absolute path"),
        (BOARD, "mqtt", '[mqtt]\nusername = "b"\npassword_file = "HOME/p"\n', r"\[mqtt\] password_file = .* not see"),
        (BOARD, "mqtt", '[local]\nca_file = "ca.pem"\n', r"\[local\] ca_file = ca.pem: want an absolute path"),
        (BOARD, "mqtt", '[outbox]\nfile = "/srv/o.sqlite"\n', r"\[outbox\] file = /srv/o.sqlite: a service may write"),
        (BOARD, "mqtt", '[outbox]\nfile = "../o.sqlite"\n', r"\[outbox\] file = ../o.sqlite: a service may write"),
        (BOARD, "mqtt", '[kept_frames]\nfolder = "/srv/f"\n', r"\[kept_frames\] folder = /srv/f: a service may write"),
        (SERVER, "cpu", '[questions]\ngate = "gate.q"\n', r"\[questions\] gate = gate.q: want an absolute path"),
        (OPENAI, "cpu", '[openai]\nmodel = "m"\nkey_file = "HOME/key"\n', r"\[openai\] key_file = .* does not see"),
        (
            OPENAI,
            "cpu",
            '[openai]\nmodel = "m"\nspent_file = "/etc/spent"\n',
            r"\[openai\] spent_file = /etc/spent: a ser",
        ),
        (HF, "cpu", "", r"\[server\] target = .* does not see"),
        (HF.replace("HOME", "/srv"), "cpu", '[hf]\ntail = "HOME/tail"\n', r"\[hf\] tail = .* does not see"),
        (HF.replace("HOME", "/srv"), "cpu", '[hf]\nassistant = "HOME/m"\n', r"\[hf\] assistant = .* does not see"),
        (
            HF.replace("HOME", "/srv"),
            "cpu",
            '[prompts.gate]\nquestion = "?"\nschema = "s.json"\n',
            r"schema = s.json: want",
        ),
        (
            OPENAI.replace("openai:", "vllm:"),
            "cpu",
            '[openai]\nmodel = "m"\n[vllm]\ntail = "tail"\n',
            r"\[vllm\] tail = tail: want an absolute path",
        ),
        (HF.replace("HOME/model", "./m"), "cpu", "", r"\[server\] target = ./m: want an absolute path"),
        (SERVER, "cpu", 'second_bundle = "b"\n', r"\[server\] second_bundle = b: want an absolute path"),
        (SERVER, "cpu", '[upstream.mqtt]\nca_file = "HOME/ca"\n', r"\[upstream.mqtt\] ca_file = .* does not see"),
    ],
)
def test_a_file_that_a_service_would_not_find_is_named(
    written: Callable[..., Path], tmp_path: Path, text: str, source: str, more: str, says: str
) -> None:
    path = written(text, source, more)
    path.write_text(path.read_text().replace("HOME", str(tmp_path / "home")))
    with pytest.raises(ConfigError, match=says):
        check_files(service_of(path, AIFLOW))


@pytest.mark.parametrize("outbox", ["outbox.sqlite", "/var/lib/aiflow/outbox.sqlite", "/var/lib/aiflow/a/o.sqlite"])
def test_an_outbox_in_the_state_directory_is_accepted(written: Callable[..., Path], outbox: str) -> None:
    check_files(service_of(written(more=f'[outbox]\nfile = "{outbox}"\n'), AIFLOW))


def test_a_virtual_environment_in_a_home_directory_is_named_also_behind_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd_units, "HIDDEN", (tmp_path / "home",))
    (tmp_path / "home/bin").mkdir(parents=True)
    (tmp_path / "opt").symlink_to(tmp_path / "home")
    for place in (tmp_path / "home/bin/aiflow", tmp_path / "opt/bin/aiflow"):
        with pytest.raises(ServiceError, match=r"the virtual environment, .* which a service does not see"):
            check_program(place)


def test_a_path_that_systemd_would_expand_is_refused() -> None:
    odd = Path("/opt/100% mine/aiflow")
    with pytest.raises(ServiceError, match=r"gives ' ', '%' a meaning"):
        check_program(odd)


def test_the_places_that_the_units_hide_are_the_ones_that_are_checked() -> None:
    for folder in ("/home/anna/b", "/root/b", "/tmp/b", "/var/tmp/b", "/run/user/1000/b"):
        assert systemd_units.hidden_below(Path(folder))
    for folder in ("/opt/aiflow", "/etc/aiflow", "/srv/home/x", "/var/lib/aiflow"):
        assert systemd_units.hidden_below(Path(folder)) is None


# ---- install ----


def test_install_checks_as_the_service_s_account_then_writes_and_starts_it(
    written: Callable[..., Path], recorder: Recorder, system: System
) -> None:
    config = written()
    assert act(system, "install", config=config) == 0
    path = system.unit("board")
    assert path.read_text() == service_of(config, AIFLOW).unit
    assert path.stat().st_mode & 0o777 == 0o644
    assert recorder.taken() == [
        'systemd-sysusers --inline u aiflow - "aiflow board and server" /var/lib/aiflow',
        f"runuser -u aiflow -- {AIFLOW} validate {config}",
        "systemctl daemon-reload",
        "systemctl enable --now aiflow-board.service",
    ]


def test_a_second_install_changes_nothing_and_a_new_setting_restarts(
    written: Callable[..., Path], recorder: Recorder, system: System
) -> None:
    act(system, "install", config=written(SERVER, "cpu"))
    before, _ = tree(recorder.root), recorder.taken()
    act(system, "install", config=written(SERVER, "cpu"))
    assert tree(recorder.root) == before
    assert recorder.taken()[2:] == ["systemctl enable --now aiflow-server.service"]
    act(system, "install", config=written(SERVER, "cuda"))
    assert tree(recorder.root).keys() == before.keys()
    assert recorder.taken()[2:] == [
        "systemctl daemon-reload",
        "systemctl enable --now aiflow-server.service",
        "systemctl restart aiflow-server.service",
    ]


@pytest.mark.parametrize("action", ["install", "uninstall"])
def test_a_dry_run_prints_everything_and_changes_nothing(
    written: Callable[..., Path],
    recorder: Recorder,
    capsys: pytest.CaptureFixture[str],
    action: str,
) -> None:
    system = System(recorder.root, recorder, is_root=False)
    values = {"config": written()} if action == "install" else {"role": "board"}
    if action == "uninstall":
        system.unit("board").write_text(service_of(written(), AIFLOW).unit)
    before = tree(recorder.root)
    assert act(system, action, dry_run=True, **values) == 0
    assert (tree(recorder.root), recorder.taken()) == (before, [])
    shown = capsys.readouterr().out
    assert "systemctl daemon-reload" in shown
    if action == "install":
        assert service_of(written(), AIFLOW).unit in shown
        assert "systemctl enable --now aiflow-board.service" in shown
        assert "'u aiflow - \"aiflow board and server\" /var/lib/aiflow'" in shown  # can be pasted into a shell
    else:
        assert f"rm {system.unit('board')}" in shown


@pytest.mark.parametrize(
    ("fails", "says", "is_written"),
    [
        ("runuser", "the account aiflow, .* cannot use .* chgrp aiflow FILE", False),
        ("getent group video", "no group video", False),
        ("systemd-sysusers", "systemd-sysusers", False),
        ("enable", "journalctl -u aiflow-board.service", True),
    ],
)
def test_what_fails_is_named_and_without_rights_no_unit_is_written(
    written: Callable[..., Path], recorder: Recorder, system: System, fails: str, says: str, is_written: bool
) -> None:
    recorder.fails = fails
    with pytest.raises(ServiceError, match=says):
        act(system, "install", config=written(source="/dev/video0"))
    assert system.unit("board").exists() is is_written


def test_credentials_of_systemd_are_not_looked_for_before_the_service_runs(
    written: Callable[..., Path], recorder: Recorder, system: System
) -> None:
    place = "/run/credentials/aiflow-board.service/password"
    act(system, "install", config=written(more=f'[mqtt]\nusername = "b"\npassword_file = "{place}"\n'))
    assert not any("validate" in line for line in recorder.taken())


def test_a_second_board_is_refused_with_the_name_of_the_first_and_another_program_for_it_is_not(
    written: Callable[..., Path], recorder: Recorder, system: System, tmp_path: Path
) -> None:
    first = written()
    act(system, "install", config=first)
    unit = system.unit("board")
    unit.write_text(unit.read_text().replace("ExecStart=/", "ExecStart=/elsewhere/"))  # the environment has moved
    act(system, "install", config=first)
    before = tree(recorder.root)
    (second := first.with_name("second.toml")).write_text(first.read_text())
    recorder.taken()
    with pytest.raises(ServiceError, match=f"runs {first}: a machine has one board as a service"):
        act(system, "install", config=second)
    assert (tree(recorder.root), recorder.taken()) == (before, [])


@pytest.mark.parametrize("kind", ["foreign", "masked", "other"])
def test_a_unit_of_somebody_else_is_neither_replaced_nor_removed(
    written: Callable[..., Path], recorder: Recorder, system: System, kind: str
) -> None:
    path = system.unit("board")
    if kind == "masked":
        path.symlink_to("/dev/null")
    else:
        path.write_text("[Unit]\n" if kind == "foreign" else systemd_units.mark("server") + "\n[Unit]\n")
    before = tree(recorder.root)
    for action, values in (("install", {"config": written()}), ("uninstall", {"role": "board"})):
        with pytest.raises(ServiceError, match="was not written by"):
            act(system, action, **values)
    assert (tree(recorder.root), recorder.taken()) == (before, [])


def test_without_systemd_or_root_it_says_what_to_do_and_runs_nothing(
    written: Callable[..., Path], recorder: Recorder, system: System
) -> None:
    with pytest.raises(ServiceError, match="only root can change services"):
        act(System(recorder.root, recorder, is_root=False), "install", config=written())
    shutil.rmtree(recorder.root / "run")
    with pytest.raises(ServiceError, match="systemd does not run this system"):
        act(system, "install", config=written())
    assert recorder.taken() == []
    assert not system.unit("board").exists()


def test_a_unit_that_cannot_be_written_is_an_error_and_leaves_nothing(
    written: Callable[..., Path], recorder: Recorder, system: System
) -> None:
    shutil.rmtree(recorder.root / "etc")
    with pytest.raises(ServiceError, match="cannot be written: No such file or directory"):
        act(system, "install", config=written())
    assert not any("enable" in line for line in recorder.taken())


def test_a_configuration_that_does_not_load_exits_as_one(
    written: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(BOARD.replace("bundle =", "bundel ="))
    assert cli.main(["service", "install", "--dry-run", str(path)]) == cli.EXIT_CONFIG
    assert "did you mean bundle?" in capsys.readouterr().err


def test_a_program_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    with pytest.raises(ServiceError, match="install the program into a virtual environment"):
        systemd_units.program()


@pytest.mark.usefixtures("_systemd")
def test_the_account_is_one_that_systemd_can_make(
    written: Callable[..., Path], recorder: Recorder, system: System
) -> None:
    act(system, "install", config=written())
    words = recorder.taken()[0].split(" ", 2)
    for _ in range(2):
        run_command([words[0], f"--root={recorder.root}", *words[1:]])
    (line,) = (recorder.root / "etc/passwd").read_text().splitlines()
    name, _, _, _, _, home, shell = line.split(":")
    assert (name, home) == ("aiflow", "/var/lib/aiflow")
    assert shell.endswith("nologin")


# ---- uninstall and status ----


@pytest.mark.parametrize("text", [BOARD, SERVER])
def test_uninstall_removes_exactly_what_install_wrote(
    written: Callable[..., Path], recorder: Recorder, system: System, text: str
) -> None:
    (recorder.root / "etc/systemd/system/other.service").write_text("[Unit]\n")
    before, role = tree(recorder.root), "board" if text is BOARD else "server"
    act(system, "install", config=written(text, "mqtt" if text is BOARD else "cpu"))
    assert tree(recorder.root) != before
    recorder.taken()
    act(system, "uninstall", role=role)
    assert tree(recorder.root) == before
    assert recorder.taken() == [
        f"systemctl disable --now aiflow-{role}.service",
        "systemctl daemon-reload",
        f"systemctl reset-failed aiflow-{role}.service*",
    ]
    with pytest.raises(ServiceError, match="is not installed as a service"):
        act(system, "uninstall", role=role)


SHOWN = """ActiveState=active
SubState=running
UnitFileState=enabled
ActiveEnterTimestamp=Sun 2026-11-29 07:00:00 UTC
StatusText=broker broker.lan:8883 backoff: why = because
WatchdogTimestamp=Sun 2026-11-29 07:10:00 UTC
WatchdogUSec=20s
NRestarts=2
Result=success
ExecMainStatus=0
MemoryCurrent=120000000
MemoryMax=536870912
"""


@pytest.mark.parametrize(("state", "code"), [("active", EXIT_RUNNING), ("failed", EXIT_STOPPED)])
def test_status_has_a_line_for_what_is_known_and_an_exit_code(
    recorder: Recorder, system: System, capsys: pytest.CaptureFixture[str], state: str, code: int
) -> None:
    system.unit("board").write_text("")
    recorder.says = SHOWN.replace("=active", f"={state}")
    assert act(system, "status", role="board") == code
    lines = dict(re.findall(r"(?m)^(.{15}) (.*)$", capsys.readouterr().out))
    assert {name.strip(): value for name, value in lines.items()} == {
        "state": f"{state} (running)",
        "at boot": "enabled",
        "since": "Sun 2026-11-29 07:00:00 UTC",
        "says": "broker broker.lan:8883 backoff: why = because",
        "last progress": "Sun 2026-11-29 07:10:00 UTC (after 20s without any it starts again)",
        "restarts": "2",
        "last result": "success",
        "last exit code": "0",
        "memory": "120 MB of 537 MB",
    }


def test_status_of_a_service_that_never_ran_leaves_out_what_is_not_known(
    recorder: Recorder, system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    system.unit("server").write_text("")
    recorder.says = (
        "ActiveState=inactive\nSubState=dead\nWatchdogTimestamp=\nMemoryCurrent=[not set]\nMemoryMax=infinity"
    )
    assert act(system, "status", role="server") == EXIT_STOPPED
    assert capsys.readouterr().out == "state           inactive (dead)\n"


def test_status_of_what_is_not_installed_has_its_own_exit_code(
    system: System, capsys: pytest.CaptureFixture[str]
) -> None:
    assert act(system, "status", role="board") == EXIT_NOT_INSTALLED
    assert "aiflow-board.service is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [(["false"], "exit code 1"), (["aiflow-no-such-program"], "is not installed"), (["sleep", "60"], "did not work")],
)
def test_a_command_that_fails_hangs_or_does_not_exist_is_named(
    monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    monkeypatch.setattr(command, "COMMAND_S", 0.1 if words[0] == "sleep" else 60.0)
    with pytest.raises(ServiceError, match=says):
        run_command(words)
