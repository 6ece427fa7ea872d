"""`aiflow completion`: what a shell writes when somebody presses the tab key, and what the manual page has."""

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from firmware_tools.cli import COMMANDS

ROOT = Path(__file__).parents[2]
# Lines as they are typed, and as they are run. A tab comes where the word is clear.
TYPED = [
    ("servi\tinst\t/etc/pass\t", "service install /etc/passwd"),
    ("bench e2e --pro\tlte-m --trace /etc/pass\t", "bench e2e --profile lte-m --trace /etc/passwd"),
    ("completion z\t", "completion zsh"),
]
SHELLS = {"bash": ["bash", "--norc", "-i"], "zsh": ["zsh", "-f", "-i"]}
PREPARE = {"bash": "", "zsh": "autoload -Uz compinit; compinit -u -D; "}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By shell, what the command prints."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        with (folder / shell).open("w") as file:
            subprocess.run([sys.executable, "-m", "firmware_tools", "completion", shell], stdout=file, check=True)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_tab_completes_commands_options_and_files(shell: str, scripts: dict[str, Path]) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    # The function stands for the program. A shell reads tabs as such from its prompt on.
    lines = [f'{PREPARE[shell]}eval "$(<{scripts[shell]})"', "aiflow() { echo called with $@.; }", "PS1='rea''dy:'"]
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "INPUTRC": "/dev/null"}
    with subprocess.Popen(
        SHELLS[shell], stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
    ) as process:
        os.close(slave)
        try:
            for line in lines:
                os.write(master, f"{line}\n".encode())
            read_until(master, "ready:")
            for typed, called in TYPED:
                os.write(master, f"aiflow {typed}\n".encode())
                read_until(master, rf"called with {called}\.(?s:.*)ready:")
        finally:
            process.kill()
            os.close(master)


def read_until(terminal: int, wanted: str) -> None:
    """Waits for this pattern, whatever else the terminal shows. The limit is the test's."""
    said = ""
    while not re.search(wanted, said):
        said += os.read(terminal, 4096).decode(errors="replace")


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_completes_commands_options_and_values(scripts: dict[str, Path]) -> None:
    def completions(line: str) -> set[str]:
        code = f"source {scripts['fish']}; complete --do-complete '{line}'"
        done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True)
        return {line.split("\t")[0] for line in done.stdout.splitlines()}

    assert completions("aiflow ") == COMMANDS.keys()
    assert completions("aiflow service status ") == {"board", "server"}
    assert "--profile" in completions("aiflow bench e2e --")


def test_a_command_whose_packages_are_missing_is_completed_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "tomli_w.py").write_text("raise ModuleNotFoundError(name='tomli_w')")  # as on a board
    command = [sys.executable, "-m", "firmware_tools", "completion", "bash"]
    path = f"{tmp_path}:{ROOT}"
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
    )
    assert "_shtab_aiflow_demo_option_strings=(-h --help)\n" in done.stdout
    assert "_shtab_aiflow_doctor_option_strings=(-h --help --config --json)\n" in done.stdout


def test_the_manual_page_has_every_command_and_no_fault(tmp_path: Path) -> None:
    command = [
        "make",
        "--silent",
        f"--directory={ROOT}",
        "--old-file=venv",
        f"BIN={Path(sys.executable).parent}",
        "man",
    ]
    page = ROOT / "build" / "aiflow.1"
    subprocess.run(command, check=True)
    text = page.read_text()
    assert all(f"\n\\fBaiflow\\fR \\fI\\,{name}\\/\\fR\n" in text for name in COMMANDS)
    assert "\n\\fB\\-\\-camera\\fR \\fI\\,SOURCE\\/\\fR\n" in text
    # Long lines are no fault of a page that nobody edits.
    for checker in (["mandoc", "-Tlint", "-Wwarning"], ["man", "--warnings", "--local-file"]):
        if shutil.which(checker[0]):
            done = subprocess.run([*checker, str(page)], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "")
            assert checker[0] != "mandoc" or done.stdout == ""
