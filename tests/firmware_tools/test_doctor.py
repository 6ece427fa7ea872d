"""`aiflow doctor`: what is wrong with a board is named, with what to do, and nothing makes it hang."""

import json
import os
import queue
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from edge_runtime.config import RuntimeConfig, load_toml
from edge_runtime.errors import AiflowError
from edge_runtime.firmware.store import State
from edge_runtime.inference.bundle import Bundle, open_bundle
from edge_runtime.mqtt import Message, MqttClient, MqttConfig, Outcome
from edge_runtime.wire import topics
from firmware_tools import cli, host_checks, probes
from firmware_tools.doctor import Check, _disk, _with_config, bounded
from firmware_tools.host_checks import Finding, ok
from firmware_tools.service import System
from firmware_tools.systemd_units import service_of
from tests.brokers import Mosquitto
from tests.edge_runtime.capture.helpers import large_jpeg, write_photos
from tests.edge_runtime.firmware.helpers import KEY, NEVER, OTHER_KEY, sign, trust
from tests.http_camera import HttpCamera, picture
from tests.listener import PATIENCE_S

HOST = ["python", "packages", "cpu", "memory", "temperature", "power", "disk", "clock"]


@pytest.fixture
def config(tmp_path: Path, board_bundle: Bundle) -> Callable[..., Path]:
    """A function that writes board.toml with one camera."""

    def write(source: str, port: int = 1, more: str = "") -> Path:
        path = tmp_path / "board.toml"
        path.write_text(
            f'[board]\nid = "b1"\nbundle = "{board_bundle.path}"\nbackend = "onnx"\n'
            f'[[cameras]]\nname = "door"\nsource = "{source}"\n[mqtt]\nport = {port}\n{more}'
        )
        return path

    return write


def examine(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code and the findings by name."""
    code = cli.main(["doctor", "--json", *(str(argument) for argument in arguments)])
    result = json.loads(capsys.readouterr().out)
    assert result["schema"] == 1
    assert all(set(check) == {"name", "status", "found", "advice"} for check in result["checks"])
    statuses = [check["status"] for check in result["checks"]]
    assert result["status"] == next(word for word in ("failure", "warning", "ok") if word in statuses)
    assert code == {"ok": 0, "warning": 1, "failure": 2}[result["status"]]
    return code, {check["name"]: check for check in result["checks"]}


def found_by(name: str, path: Path) -> Finding:
    """What one check says about the board of this configuration."""
    (check,) = [check for check in _with_config(path) if check.name == name]
    return bounded(check)


# ---- the whole ----


def test_a_trigger_on_a_label_that_the_bundle_does_not_have_is_a_warning(config: Callable[..., Path]) -> None:
    path = config("mqtt")
    assert found_by("bundle", path).status == "ok"
    trigger = "[[cameras.triggers]]\nwhen = 'label == nobody'\n[mqtt]"
    path.write_text(path.read_text().replace("[mqtt]", trigger))
    finding = found_by("bundle", path)
    assert (finding.status, "trigger on the label 'nobody'" in finding.advice) == ("warning", True)


def test_a_board_without_a_configuration_has_its_system_checked(capsys: pytest.CaptureFixture[str]) -> None:
    code, checks = examine(capsys)
    assert list(checks) == HOST
    assert code in (0, 1)  # the clock of this machine may not be synchronised


def test_everything_of_a_board_in_order_has_a_line(
    config: Callable[..., Path], broker: Mosquitto, capsys: pytest.CaptureFixture[str]
) -> None:
    shade = iter(range(10, 250))
    with HttpCamera(lambda _: picture(large_jpeg(next(shade)))) as camera:
        assert cli.main(["doctor", "--config", str(config(camera.url, broker.port))]) in (0, 1)
    lines = dict(re.findall(r"(?m)^\w+ +(.+?): (.*)", capsys.readouterr().out))
    assert list(lines) == [*HOST, "configuration", "bundle", "broker mqtt", "camera door", "self-test"]
    assert re.fullmatch(r"frames of 160 x 160 pixels, [0-9.]+ per second", lines["camera door"])
    assert re.fullmatch(
        r"20 frames: head [0-9.]+ ms, draft [0-9.]+ ms \(medians, onnx, [12] thread\(s\)\)", lines["self-test"]
    )
    assert "connected in plain text" in lines["broker mqtt"]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise ImportError('libGL')", "cv2: ImportError: libGL"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "cv2: ends with SIGILL"),
    ],
)
def test_an_opencv_that_is_broken_ends_no_check_but_those_that_load_it(
    config: Callable[..., Path], tmp_path: Path, code: str, why: str
) -> None:
    (tmp_path / "cv2.py").write_text(code)
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = [sys.executable, "-m", "firmware_tools", "doctor", "--json", "--config", str(config("photos"))]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert why in checks["packages"]["found"]
    assert checks["bundle"]["status"] == "ok"
    assert [checks[name]["found"] for name in ("camera door", "self-test")] == ["not tried"] * 2


def test_a_bundle_that_was_given_up_is_a_warning(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(str(tmp_path / "photo.jpg"), more=f'[updates]\nfolder = "{tmp_path}"\n')
    _, checks = examine(capsys, "--config", path)
    assert checks["updates"]["status"] == "ok"
    (tmp_path / "state.json").write_bytes(msgspec.json.encode(State(failed="new-2-0123456789abcdef", why="it crashes")))
    _, checks = examine(capsys, "--config", path)
    assert checks["updates"]["status"] == "warning"
    assert "new-2-0123456789abcdef was given up: it crashes" in checks["updates"]["found"]


def test_an_installed_bundle_that_is_damaged_is_named_although_the_one_of_the_configuration_is_in_order(
    config: Callable[..., Path], tmp_path: Path, board_bundle: Bundle
) -> None:
    path = config(str(tmp_path / "photo.jpg"), more=f'[updates]\nfolder = "{tmp_path}"\n')
    entry = "new-0-0123456789abcdef"
    shutil.copytree(board_bundle.path, tmp_path / entry)
    (tmp_path / "state.json").write_bytes(msgspec.json.encode(State(entry)))
    assert found_by("updates", path).status == "ok"
    (tmp_path / entry / "head.onnx").write_bytes(b"x")
    finding = found_by("updates", path)
    assert finding.status == "failure"
    assert f"{entry}/head.onnx is not the file" in finding.found
    for name in ("bundle", "self-test"):  # of the bundle that runs
        assert f"{entry}/head.onnx is not the file" in found_by(name, path).found


def with_trust(config: Callable[..., Path], tmp_path: Path, board_bundle: Bundle) -> Path:
    """The board.toml of a board with a trust file, and with a bundle of its own in `shipped`."""
    trust(tmp_path)
    path = config("mqtt", more=f'[updates]\nfolder = "{tmp_path}/bundles"\ntrust_file = "{tmp_path}/trust"\n')
    shutil.copytree(board_bundle.path, tmp_path / "shipped")
    path.write_text(path.read_text().replace(str(board_bundle.path), str(tmp_path / "shipped")))
    return path


@pytest.mark.parametrize(
    ("key", "expires", "says"),
    [
        (None, NEVER, "is unsigned"),
        (OTHER_KEY, NEVER, "none of the 1 trusted keys has signed this"),
        (KEY, date(2025, 12, 31), "expired on 2025-12-31"),
        (KEY, NEVER, ""),
    ],
)
def test_a_bundle_in_use_that_a_board_with_a_trust_file_would_not_install_is_a_warning(
    config: Callable[..., Path], tmp_path: Path, board_bundle: Bundle, key: Any, expires: date, says: str
) -> None:
    path = with_trust(config, tmp_path, board_bundle)
    if key:
        sign(open_bundle(tmp_path / "shipped"), 3, expires, key)
    finding = found_by("updates", path)
    assert (finding.status, says in finding.advice) == ("warning" if says else "ok", True)


def test_a_bundle_in_use_that_another_bundles_signature_came_with_is_a_warning(
    config: Callable[..., Path], tmp_path: Path, board_bundle: Bundle
) -> None:
    path = with_trust(config, tmp_path, board_bundle)
    sign(open_bundle(tmp_path / "shipped"), 3)
    manifest = tmp_path / "shipped" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")  # another bundle with the same files
    finding = found_by("updates", path)
    assert (finding.status, "signature is of another bundle" in finding.advice) == ("warning", True)


def test_a_board_with_the_same_id_that_runs_elsewhere_is_a_warning(
    config: Callable[..., Path], broker: Mosquitto
) -> None:
    path, status = config("mqtt", broker.port), topics.status("home", "b1")
    assert found_by("broker mqtt", path).status == "ok"
    with MqttClient(MqttConfig(port=broker.port).settings("other")) as other:
        for state, expected in (("online", "warning"), ("offline", "ok")):
            said = queue.Queue[Outcome]()
            payload = json.dumps({"state": state}).encode()
            other.publish(status, payload, retain=True, on_outcome=said.put)
            assert said.get(timeout=PATIENCE_S) is Outcome.DELIVERED
            finding = found_by("broker mqtt", path)
            assert finding.status == expected
            assert ("a board with the id b1 is running" in finding.found) == (state == "online")


def test_a_board_with_the_same_id_that_runs_here_with_this_file_is_in_order(
    config: Callable[..., Path], broker: Mosquitto
) -> None:
    path, said = config("mqtt", broker.port), queue.Queue[Message]()
    settings, status = MqttConfig(port=broker.port).settings("other"), topics.status("home", "b1")
    command = [sys.executable, "-m", "firmware_tools", "run", "--no-show", path.name]
    paths = os.pathsep.join(filter(None, sys.path))
    with (
        MqttClient(settings, subscriptions=[(status, 1)], on_message=said.put),
        subprocess.Popen(command, cwd=path.parent, env=os.environ | {"PYTHONPATH": paths}) as board,
    ):
        try:
            assert json.loads(said.get(timeout=PATIENCE_S).payload)["state"] == "online"
            finding = found_by("broker mqtt", path)
        finally:
            board.terminate()
    assert finding.status == "ok"
    assert "a board with the id b1 is running" in finding.found


@pytest.mark.parametrize("kept", ['[outbox]\nfile = "/proc/outbox"', '[updates]\nfolder = "/proc/bundles"'])
def test_a_disk_that_cannot_be_written_is_a_failure_if_the_board_keeps_something_there(
    config: Callable[..., Path], tmp_path: Path, kept: str
) -> None:
    path = config(str(tmp_path / "photo.jpg"))
    assert found_by("disk", path).status == "ok"
    path.write_text(f"{path.read_text()}\n{kept}\n")
    finding = found_by("disk", path)
    assert (finding.status, finding.found) == ("failure", "/proc: not writable for this user")


def test_each_folder_where_the_board_keeps_something_is_checked(config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a-file").touch()
    here, no_folder = f'[outbox]\nfile = "{tmp_path}/o"\n', f'[updates]\nfolder = "{tmp_path}/a-file/bundles"\n'
    finding = found_by("disk", config("mqtt", more=here + no_folder))
    assert (finding.status, finding.found) == ("failure", f"{tmp_path}/a-file: is a file, not a folder")


def test_a_relative_place_is_that_of_the_service_if_one_runs_this_configuration(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, system = config("mqtt", more='[outbox]\nfile = "outbox.sqlite"\n'), System(tmp_path / "root")
    assert found_by("disk", path).found.startswith(f"{tmp_path}: ")
    assert system.state_of(path) is None
    file(system.root, "etc/systemd/system/aiflow-board.service", service_of(path, Path("aiflow")).unit)
    state = system.root / "var/lib/aiflow"
    state.mkdir(parents=True)
    assert system.state_of(path) == state
    assert _disk(load_toml(path, RuntimeConfig), state).found.startswith(f"{state}: ")
    assert system.state_of(tmp_path / "other.toml") is None


@pytest.mark.parametrize(
    ("board", "source", "state", "found"),
    [
        ("", "mqtt", None, "the choice of a backend"),
        ("", "mqtt", "/proc/state", "the choice of a backend"),
        ('paradigm = "offload"\n', "watch:/srv", "/proc/state", "what was read of watched folders"),
        ('paradigm = "offload"\n', "watch:/srv", None, ""),  # only a service remembers what it read
        ('paradigm = "offload"\n', "mqtt", "/proc/state", ""),
    ],
)
def test_what_is_only_lost_at_a_restart_is_a_warning_if_its_place_cannot_be_written(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, board: str, source: str, state: str | None, found: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")
    path = config(source)
    path.write_text(path.read_text().replace("[[cameras]]", f"{board}[[cameras]]"))
    finding = _disk(load_toml(path, RuntimeConfig), state and Path(state))
    assert finding.status == ("warning" if found else "ok")
    assert found in finding.advice


def test_what_is_broken_is_named_and_the_rest_is_checked(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "FRAME_S", 1.0)
    with HttpCamera(lambda _: (404, {}, b"")) as camera:
        code, checks = examine(capsys, "--config", config(camera.url))
    assert (code, [name for name, check in checks.items() if check["status"] == "failure"]) == (
        2,
        ["broker mqtt", "camera door"],
    )
    assert "answers 404 Not Found: check the path" in checks["camera door"]["found"]
    assert "does a broker listen at 127.0.0.1:1?" in checks["broker mqtt"]["found"]


@pytest.mark.parametrize(
    ("source", "found"),
    [("watch:{folder}/no", "does not exist"), ("rpicam", "needs the program"), ("x://h", "unknown")],
)
def test_a_camera_that_can_never_work_says_what_to_do(
    config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    found: str,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    _, checks = examine(capsys, "--config", config(source.format(folder=tmp_path)))
    assert found in checks["camera door"]["found"]


def test_a_configuration_that_cannot_be_read_is_a_failure_and_the_system_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "board.toml").write_text("[bord]\n")
    code, checks = examine(capsys, "--config", tmp_path / "board.toml")
    assert (code, list(checks)) == (2, [*HOST, "configuration"])
    assert "did you mean board?" in checks["configuration"]["found"]


def test_a_damaged_bundle_is_named(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, board_bundle: Bundle
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in board_bundle.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "head.onnx").write_bytes(b"x")
    path = config(write_photos(tmp_path / "p", 10))
    path.write_text(path.read_text().replace(str(board_bundle.path), str(copy)))
    _, checks = examine(capsys, "--config", path)
    assert checks["bundle"]["status"] == "failure"
    assert "head.onnx" in checks["bundle"]["found"]


def test_it_starts_without_torch() -> None:
    code = "import sys, firmware_tools.doctor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- a check ----


def test_a_check_that_hangs_is_a_failure_after_its_limit() -> None:
    hang = threading.Event()
    finding = bounded(Check("disk", lambda: hang.wait() and ok(""), limit_s=0.05))
    hang.set()
    assert (finding.status, finding.found) == ("failure", "no result within 0.05 s")


def test_a_named_error_is_a_failure_and_any_other_is_a_bug() -> None:
    def named() -> Finding:
        raise AiflowError("plug it in")

    assert bounded(Check("camera", named)) == Finding("failure", "plug it in")
    with pytest.raises(ZeroDivisionError):
        bounded(Check("bug", lambda: ok(str(1 / 0))))


# ---- the system ----


def file(root: Path, path: str, text: str) -> Path:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)
    return root


@pytest.mark.parametrize(("available_mb", "status"), [(100, "failure"), (200, "warning"), (900, "ok")])
def test_little_memory_is_found(tmp_path: Path, available_mb: int, status: str) -> None:
    root = file(tmp_path, "proc/meminfo", f"MemTotal: 1000000 kB\nMemAvailable: {available_mb * 1024} kB\n")
    assert host_checks.check_memory(root).status == status


@pytest.mark.parametrize(("milli", "status"), [(45_000, "ok"), (85_000, "warning")])
def test_heat_is_found(tmp_path: Path, milli: int, status: str) -> None:
    assert (
        host_checks.check_temperature(file(tmp_path, "sys/class/thermal/thermal_zone0/temp", f"{milli}")).status
        == status
    )


@pytest.mark.parametrize(("flags", "status"), [("0", "ok"), ("50000", "warning"), ("50005", "failure"), ("2", "ok")])
def test_under_voltage_of_a_raspberry_pi_is_found_now_and_since_the_start(
    tmp_path: Path, flags: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = file(tmp_path, "sys/devices/platform/soc/soc:firmware/get_throttled", f"{flags}\n")
    assert host_checks.check_power(root).status == status
    program = tmp_path / "vcgencmd"  # on systems whose kernel does not have the file
    program.write_text(f'#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0x{flags}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host_checks.check_power(tmp_path / "none").status == status


def test_what_a_board_does_not_say_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for check in (
        host_checks.check_memory,
        host_checks.check_temperature,
        host_checks.check_power,
        host_checks.check_cpu,
    ):
        assert check(tmp_path).status == "ok"


def test_a_processor_is_named_with_its_features(tmp_path: Path) -> None:
    file(tmp_path, "proc/cpuinfo", "processor : 0\nFeatures : fp asimd asimddp crc32\n")
    found = host_checks.check_cpu(file(tmp_path, "proc/device-tree/model", "Raspberry Pi 5 Model B\0")).found
    assert found.startswith("Raspberry Pi 5 Model B, ")
    assert found.endswith("asimddp asimd")


@pytest.mark.parametrize(
    ("free_mb", "read_only", "needed", "status"),
    [
        (1000, False, True, "ok"),
        (100, False, True, "warning"),
        (1, False, True, "failure"),
        (1, False, False, "warning"),
        (1000, True, True, "failure"),
        (1000, True, False, "warning"),
    ],
)
def test_a_full_or_read_only_disk_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_mb: int, read_only: bool, needed: bool, status: str
) -> None:
    state = SimpleNamespace(f_bavail=free_mb, f_frsize=1 << 20, f_flag=int(read_only))
    monkeypatch.setattr(host_checks.os, "statvfs", lambda _: state)
    assert host_checks.check_disk(tmp_path / "not/there/yet", "files", needed).status == status


@pytest.mark.parametrize(
    ("life", "spare", "status", "says"),
    [
        ("0x01 0x02\n", "0x01\n", "ok", "10 to 20 % of the eMMC's life used"),
        ("0x09 0x01\n", "0x01\n", "warning", "80 to 90 % of the eMMC's life used"),
        ("0x01 0x0b\n", "0x01\n", "warning", "eMMC worn out"),
        ("0x02 0x02\n", "0x02\n", "warning", "10 to 20 % of the eMMC's life used, few spare blocks left"),
        ("0x00 0x00\n", "0x00\n", "ok", "MB free"),
        (None, None, "ok", "MB free"),  # an SD card
    ],
)
@pytest.mark.parametrize("partition", ["", "/mmcblk0p2"])
def test_the_wear_that_an_emmc_reports_is_found(
    tmp_path: Path, life: str | None, spare: str | None, status: str, says: str, partition: str
) -> None:
    disk = "sys/devices/mmc0/mmc0:0001/block/mmcblk0"
    file(tmp_path, f"{disk}{partition}/{'partition' if partition else 'dev'}", "2\n")
    for name, text in (("life_time", life), ("pre_eol_info", spare)):
        if text:
            file(tmp_path, f"{disk}/device/{name}", text)
    number = os.stat(tmp_path).st_dev
    link = tmp_path / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / f"{disk}{partition}")
    finding = host_checks.check_disk(tmp_path, "files", is_needed=True, root=tmp_path)
    assert finding.status == status
    assert finding.found.endswith(says)


@pytest.mark.parametrize(
    ("year", "synchronised", "status"),
    [(1970, None, "failure"), (2027, False, "warning"), (2027, True, "ok"), (2027, None, "ok")],
)
def test_a_clock_that_is_wrong_or_not_set_is_found(
    monkeypatch: pytest.MonkeyPatch, year: int, synchronised: bool | None, status: str
) -> None:
    now = host_checks.time.struct_time((year, 1, 1, 0, 0, 0, 0, 1, 0))
    monkeypatch.setattr(host_checks, "time", SimpleNamespace(gmtime=lambda: now, strftime=host_checks.time.strftime))
    monkeypatch.setattr(host_checks, "_is_synchronised", lambda: synchronised)
    assert host_checks.check_clock().status == status


def fake_python(folder: Path, monkeypatch: pytest.MonkeyPatch, cases: str) -> None:
    """A Python that does what a shell's `case` says for the code of an import."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\ncase "$2" in\n{cases}\nesac\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(host_checks.sys, "executable", str(program))


MISSING = "*) m=${2#import }; m=${m%% *}; echo \"ModuleNotFoundError: No module named '$m'\" >&2; exit 1;;"


@pytest.mark.parametrize(
    ("cases", "status", "found"),
    [
        ("*cv2*|*onnxruntime*) echo 1.0;;", "ok", "cv2 1.0, onnxruntime 1.0"),
        ("*cv2*|*ai_edge*) echo 1.0;;\n*onnxruntime*) kill -ILL $$;;", "warning", "ends with SIGILL: it was built for"),
        ("*cv2*) echo 1.0;;\n*onnxruntime*) kill -ILL $$;;", "failure", "no runtime"),
        (
            "*cv2*) echo 'ImportError: libGL' >&2; exit 1;;\n*onnxruntime*) echo 1;;",
            "failure",
            "cv2: ImportError: libGL",
        ),
        ("*onnxruntime*) echo 1;;", "failure", "cv2: not installed"),
        (
            "*cv2*|*onnxruntime*) echo telemetry-disabled=$ORT_DISABLE_TELEMETRY;;",
            "ok",
            "onnxruntime telemetry-disabled=1",
        ),
    ],
)
def test_packages_that_are_missing_or_do_not_fit_the_processor_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: str, status: str, found: str
) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    fake_python(tmp_path, monkeypatch, f"{cases}\n{MISSING}")
    finding = host_checks.check_packages()
    assert finding.status == status
    assert found in finding.found
    assert (finding.advice != "") == (status != "ok")


@pytest.mark.parametrize(
    ("board", "status"), [("", "failure"), ('paradigm = "offload"', "ok"), ('backend = "litert"', "failure")]
)
def test_only_the_runtimes_that_the_board_needs_are_looked_at(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, board: str, status: str
) -> None:
    path = config("mqtt")
    path.write_text(path.read_text().replace('backend = "onnx"', board))
    with_onnx = 'backend = "litert"' in board
    fake_python(tmp_path, monkeypatch, f"*cv2*{'|*onnxruntime*' * with_onnx}) echo 1.0;;\n{MISSING}")
    assert found_by("packages", path).status == status
