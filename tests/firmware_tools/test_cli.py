"""The command line: it teaches, it starts light, and a mistake is one line that says what to do."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.faults.rows import ROWS
from firmware_tools.cli import COMMANDS, EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED, main
from firmware_tools.evaluate import SHIPPED_BUNDLE
from tests import runtimes
from tests.bundles import tiny_bundle

BOARD = """
[board]
id = "b1"
bundle = "{bundle}"
{more}
[[cameras]]
name = "door"
source = "{bundle}"
"""
SERVER = """
[server]
id = "s1"
bundle = "{bundle}"
{more}
"""


def aiflow(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "firmware_tools", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped bundle where there is one."""
    if (SHIPPED_BUNDLE / "manifest.json").is_file():
        return SHIPPED_BUNDLE
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", board=True).path


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    """A bundle whose files a test may take away and exchange."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture
def config(tmp_path: Path, bundle: Path) -> Callable[..., Path]:
    """A function that writes a board's or a server's TOML."""

    def write(text: str, more: str = "") -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text.format(bundle=bundle, more=more))
        return path

    return write


def assert_one_line(done: "subprocess.CompletedProcess[str]", *parts: str) -> None:
    """A configuration's exit code, and one line on standard error, beside notes, that says all of this."""
    assert done.returncode == EXIT_CONFIG
    # LiteRT writes one of its own, which nothing turns off.
    (line,) = [line for line in done.stderr.splitlines() if " INFO " not in line and not line.startswith("INFO: ")]
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"usage: aiflow {command}" in shown
    assert COMMANDS[command] in shown


@pytest.mark.parametrize(
    ("part", "has", "lacks"),
    [
        ("codec", "--backend", "--frames --row --tier --threads --seconds --markdown"),
        ("device", "--backend --frames", "--row --tier --threads --seconds --markdown"),
        ("server", "--backend --tier --threads", "--row --frames --seconds --markdown"),
        ("gateway", "--backend --tier --threads --seconds", "--row --frames --markdown"),
        ("faults", "--row --seconds --markdown", "--backend --tier --threads --frames"),
        ("rate", "--captions --split --classes --quick --codec-tail --markdown --plot", "--seconds --frames"),
    ],
)
def test_help_of_a_benchmark_shows_what_it_obeys(
    part: str, has: str, lacks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["bench", part, "--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in (*has.split(), "--images", "--limit", "--bundle", "--json"))
    assert not any(option in shown for option in lacks.split())


def test_help_of_the_fault_matrix_lists_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "faults", "--help"])
    shown = capsys.readouterr().out
    assert all(row.name in shown for row in ROWS)
    assert "mosquitto" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "codec", "--limit", "0"],
        ["bench", "device", "--frames", "-1"],
        ["bench", "faults", "--markdown", "/nowhere/table.md"],
        ["evaluate", "classify", "--images", "x", "--json", "/nowhere/a.json"],
        ["evaluate", "classify", "--images", "x", "--json", "/tmp"],
    ],
)
def test_a_number_or_a_file_that_cannot_work_is_found_before_anything_runs(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    says = "want a whole number from 1" if arguments[-1] in ("0", "-1") else "no such directory to write to"
    assert says in capsys.readouterr().err


def test_help_lists_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {summary}" in shown for name, summary in COMMANDS.items())


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["serve", "--help"], ["run", "none.toml"]])
def test_the_board_s_commands_start_without_torch(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom firmware_tools.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "print('LOADED', sorted({'torch', 'models', 'server'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_a_board_s_unknown_key_is_named_with_the_nearest(config: Callable[..., Path]) -> None:
    done = aiflow("run", config(BOARD, "treads = 2"))
    assert_one_line(done, "config.toml", "unknown key `treads`", "did you mean threads?")


def test_a_server_s_unknown_key_is_named_with_the_nearest(config: Callable[..., Path]) -> None:
    assert_one_line(aiflow("validate", config(SERVER, 'teer = "edge"')), "unknown key `teer`", "did you mean tier?")


@pytest.mark.parametrize(
    ("command", "text", "says"),
    [
        (["run"], SERVER, "this is a server's configuration, for `aiflow serve`: name a board's"),
        (["doctor", "--config"], SERVER, "this is a server's configuration"),
        (["serve"], BOARD, "this is a board's configuration, for `aiflow run`: name a server's"),
    ],
)
def test_a_configuration_of_the_other_kind_is_called_so(
    config: Callable[..., Path], command: list[str], text: str, says: str
) -> None:
    done = aiflow(*command, config(text))
    assert f"config.toml: {says}" in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_mistake_that_only_the_start_finds_names_the_file(config: Callable[..., Path], command: str) -> None:
    done = aiflow(command, config(BOARD + '[mqtt]\nhost = "broker.lan"\n'))
    assert_one_line(done, "config.toml: mqtt broker broker.lan", "TLS is off")


@pytest.mark.parametrize("text", [BOARD, SERVER])
def test_nobody_is_called_as_the_servers_topics_are(config: Callable[..., Path], text: str) -> None:
    path = config(text.replace("b1", "server").replace("s1", "server"))
    assert_one_line(aiflow("validate", path), "config.toml", "id")


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert_one_line(aiflow("run", tmp_path / "none.toml"), "none.toml", "name a configuration file that can be read")


@pytest.mark.parametrize(("command", "text"), [("run", BOARD), ("serve", SERVER), ("validate", BOARD)])
def test_a_missing_bundle_is_named(config: Callable[..., Path], bundle: Path, command: str, text: str) -> None:
    path = config(text)
    bundle.rename(bundle.with_name("elsewhere"))
    assert_one_line(aiflow(command, path), str(bundle), "holds no manifest.json", "name the directory of a bundle")


@pytest.mark.parametrize(
    ("command", "text", "more", "name"),
    [
        ("run", BOARD, 'backend = "onnx"', "head.onnx"),
        ("run", BOARD, 'backend = "litert"', "head.tflite"),
        ("serve", SERVER, "", "edge.safetensors"),
        ("validate", BOARD, "", "head.tflite"),
    ],
)
@pytest.mark.parametrize("is_missing", [True, False])
def test_a_missing_or_altered_model_is_named(
    config: Callable[..., Path], bundle: Path, command: str, text: str, more: str, name: str, is_missing: bool
) -> None:
    data = bytearray((bundle / name).read_bytes())
    (bundle / name).unlink()
    if not is_missing:
        data[len(data) // 2] ^= 1
        (bundle / name).write_bytes(data)
    path = bundle.resolve()
    fault = f"{path} lacks {name}: " if is_missing else f"{path / name} is not the file that the manifest names"
    assert_one_line(aiflow(command, config(text, more)), fault)


def test_an_error_after_the_start_is_none_of_the_configuration(config: Callable[..., Path]) -> None:
    script = (
        "import sys\nimport server.app\nfrom firmware_tools.cli import main\n"
        "def broken(*_):\n    raise ValueError('in the middle of it')\n"
        f"server.app.serve = broken\nsys.exit(main(['serve', {str(config(SERVER, 'max_batch = 1'))!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == EXIT_FAILED
    assert "Traceback" in done.stderr
    assert "ValueError: in the middle of it" in done.stderr


def test_a_demo_without_a_bundle_says_so(tmp_path: Path) -> None:
    done = aiflow("demo", "--bundle", tmp_path, "--html", tmp_path / "page.html")
    assert done.returncode == EXIT_FAILED
    assert len(done.stderr.splitlines()) == 1
    assert "holds no manifest.json" in done.stderr


def test_a_source_without_a_picture_is_a_warning_since_it_may_be_filled_later(
    config: Callable[..., Path], bundle: Path
) -> None:
    done = aiflow("validate", config(BOARD))
    assert done.returncode == 0
    assert f"warning: camera door: {bundle} holds no picture" in done.stdout


def test_a_source_that_can_never_work_is_named(config: Callable[..., Path], bundle: Path) -> None:
    text = BOARD.replace('source = "{bundle}"', 'source = "{bundle}/manifest.json"')
    assert_one_line(aiflow("validate", config(text)), f"camera door: {bundle}/manifest.json is no tar")


@pytest.mark.parametrize("text", ["[ server ]  # of the site\nid = 's1'", "server = {id = 's1'}", "server.id = 's1'"])
def test_a_server_s_configuration_is_known_however_it_is_written(config: Callable[..., Path], text: str) -> None:
    path = config("")
    path.write_text(text)
    assert_one_line(aiflow("validate", path), "required key `bundle` is missing (in server)")


def test_a_tier_that_the_bundle_lacks_is_named(config: Callable[..., Path], bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["targets"]["cloud"]
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    done = aiflow("validate", config(SERVER, 'tier = "cloud"'))
    assert_one_line(done, "config.toml", 'tier = "cloud", but the bundle', "has edge")


MISTAKES = {
    "a password without a user": '[mqtt]\npassword_file = "/etc/hostname"',
    "a key without a certificate": '[mqtt]\ntls = true\nkey_file = "/nowhere"',
    "a URL as host": '[mqtt]\nhost = "mqtts://broker.lan"',
    "a port in the host": '[mqtt]\nhost = "broker.lan:8883"',
    "a typo in an optional table": "[local]\nprot = 1884",
    "pictures that may not leave": "[policy]\nmay_offload = false",
    "a stop word that the bundle lacks": '[cameras.sampling]\nstop = ["gnu"]',
}


@pytest.mark.parametrize("text", MISTAKES.values(), ids=MISTAKES)
def test_what_cannot_work_is_found_by_validate_and_by_run(config: Callable[..., Path], text: str) -> None:
    path = config(BOARD.replace("{more}", 'paradigm = "offload"') + text)
    found = [aiflow(command, path) for command in ("validate", "run")]
    assert [done.returncode for done in found] == [EXIT_CONFIG, EXIT_CONFIG]
    assert found[0].stderr.removeprefix("aiflow validate") == found[1].stderr.removeprefix("aiflow run")
    assert len(found[0].stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("raised", "code", "shown"),
    [
        ("ConfigError('in one line')", EXIT_CONFIG, ["aiflow run: x: in one line"]),
        ("AiflowError('in one line')", EXIT_FAILED, ["aiflow run: in one line"]),
        (
            "ModuleNotFoundError(name='torch')",
            EXIT_CONFIG,
            ["aiflow run: x: the Python package torch is not installed"],
        ),
        ("ModuleNotFoundError(name='edge_runtime.tyop')", EXIT_FAILED, ["Traceback"]),
        ("ValueError('a bug')", EXIT_FAILED, ["Traceback", "ValueError: a bug"]),
        ("OSError('a bug')", EXIT_FAILED, ["Traceback", "OSError: a bug"]),
        ("KeyboardInterrupt()", EXIT_INTERRUPTED, []),
    ],
)
def test_only_named_errors_are_one_line_and_a_bug_shows_its_traceback(raised: str, code: int, shown: list[str]) -> None:
    script = (
        "import sys\nfrom edge_runtime.errors import AiflowError, ConfigError\nimport firmware_tools.run\n"
        f"def broken(args):\n    raise {raised}\n"
        "firmware_tools.run.run = broken\nfrom firmware_tools.cli import main\nsys.exit(main(['run', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code
    assert all(part in done.stderr for part in shown)
    assert ("Traceback" in done.stderr) == ("Traceback" in shown)


def test_a_reader_that_has_gone_is_no_bug(bundle: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "firmware_tools", "validate", str(bundle)]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=100, check=False, env=buffered)
    os.close(write)
    assert (done.returncode, done.stderr) == (EXIT_FAILED, b"")


def test_a_command_whose_package_is_missing_says_how_to_install_it(config: Callable[..., Path]) -> None:
    script = (
        "import sys\nsys.modules['torch'] = None\n"
        f"from firmware_tools.cli import main\nsys.exit(main(['serve', {str(config(SERVER))!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (EXIT_CONFIG, 1)
    assert "torch is not installed: pip install '" in done.stderr
    assert "aiflow-edge" not in done.stderr


@pytest.mark.parametrize("command", ["run", "validate"])
@pytest.mark.parametrize(
    ("module", "code", "named"),
    [
        (
            "cv2",
            "raise ImportError('libGL.so.1: cannot open shared object file', name='cv2')",
            "opencv-python-headless",
        ),
        ("numpy", "raise ImportError('\\n\\nRead this!\\n') from ImportError('libGL.so.1: cannot open')", "numpy"),
    ],
)
def test_a_package_that_does_not_load_is_named_with_what_it_misses(
    config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    module: str,
    code: str,
    named: str,
) -> None:
    runtimes.install(tmp_path / "packages", monkeypatch, module, code)
    done = aiflow(command, config(BOARD))
    assert_one_line(done, "libGL.so.1: cannot open", "install", named)


def test_an_opencv_for_another_processor_is_named_before_the_board_is_started(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`aiflow service install` validates, as the account of the service, before it writes the unit."""
    runtimes.install(tmp_path / "packages", monkeypatch, "cv2", runtimes.SIGILL)
    assert_one_line(aiflow("validate", config(BOARD)), "cv2: ends with SIGILL", "pip install")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["validate", "serve"])
def test_a_device_that_is_not_there_is_named(config: Callable[..., Path], command: str) -> None:
    assert_one_line(aiflow(command, config(SERVER, 'device = "cuda"')), 'device = "cuda", but PyTorch', "want device")


def test_a_bundle_in_order_validates(config: Callable[..., Path]) -> None:
    done = aiflow("validate", config(BOARD.replace('source = "{bundle}"', 'source = "mqtt"'), 'backend = "onnx"'))
    assert (done.returncode, done.stderr) == (0, "")
    assert "board b1 with 1 camera(s) is in order" in done.stdout
