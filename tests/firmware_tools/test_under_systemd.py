"""Both services under a real systemd, in a container: installed, frozen, killed, misconfigured, removed.

Needs root, systemd-nspawn, and a directory with Debian: CONTRIBUTING.md says how to make it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_runtime.inference.bundle import Bundle
from firmware_tools.service import EXIT_NOT_INSTALLED, EXIT_RUNNING, EXIT_STOPPED

DEBIAN = os.environ.get("AIFLOW_DEBIAN_ROOT", "")
ROOT = Path(__file__).parents[2]
AIFLOW = "/opt/aiflow/bin/aiflow"
PATIENCE_S = 100.0  # the watchdog takes 20 s
CONFIGS = {
    "board": '[board]\nid = "b1"\nbundle = "/opt/bundle"\nparadigm = "device"\n[outbox]\nfile = "outbox.sqlite"\n'
    '[[cameras]]\nname = "door"\nsource = "mqtt"\n',
    "server": '[server]\nid = "s1"\nbundle = "/opt/bundle"\n',
}
SCRIPT = "#!/opt/aiflow/bin/python3\nimport sys\nfrom firmware_tools.cli import main\nsys.exit(main())\n"

pytestmark = [
    pytest.mark.skipif(not DEBIAN, reason="AIFLOW_DEBIAN_ROOT names no directory with a Debian"),
    pytest.mark.skipif(not shutil.which("systemd-nspawn"), reason="systemd-nspawn is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start containers"),
    pytest.mark.timeout(600),
]


class Machine:
    """A container whose process 1 is systemd."""

    def __init__(self, leader: int) -> None:
        self._enter = ["nsenter", "--target", str(leader), "--all"]

    def call(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*self._enter, *words], capture_output=True, text=True, timeout=PATIENCE_S, check=False)

    def shows(self, role: str, name: str) -> str:
        return self.call("systemctl", "show", "-P", name, f"aiflow-{role}").stdout.strip()


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.5)


@pytest.fixture(scope="module")
def machine(board_bundle: Bundle) -> Iterator[Machine]:
    root = Path(DEBIAN)
    prepare = ["chroot", str(root), "python3", "-m", "venv", "--without-pip", "/opt/aiflow"]
    subprocess.run(prepare, check=True)
    packages = root / f"opt/aiflow/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    if not packages.is_dir():
        pytest.skip("the Debian has another Python than the tests, so their packages do not work there")
    (packages / "bound.pth").write_text("/opt/code\n/opt/site\n")
    (root / AIFLOW[1:]).write_text(SCRIPT)
    (root / AIFLOW[1:]).chmod(0o755)
    (root / "etc/aiflow").mkdir(exist_ok=True)
    shutil.rmtree(root / "opt/bundle", ignore_errors=True)
    shutil.copytree(board_bundle.path, root / "opt/bundle")
    for path in (root / "opt/bundle", *(root / "opt/bundle").iterdir()):
        path.chmod(0o755)  # the tests' own folders are for one user only
    binds = [f"--bind-ro={sysconfig.get_path('purelib')}:/opt/site", f"--bind-ro={ROOT}:/opt/code"]
    options = ["--register=no", "--keep-unit", "--private-network", "--console=pipe", *binds]
    with subprocess.Popen(
        ["systemd-nspawn", f"--directory={root}", "--boot", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            eventually(lambda: children.read_text() != "")
            machine = Machine(int(children.read_text().split()[0]))
            eventually(lambda: machine.call("systemctl", "is-system-running").stdout.strip() in ("running", "degraded"))
            yield machine
        finally:
            process.terminate()  # shuts the container down


@pytest.mark.parametrize("role", CONFIGS)
def test_a_service_comes_back_from_a_freeze_and_a_kill_and_not_from_a_mistake(machine: Machine, role: str) -> None:
    config = Path(DEBIAN, "etc/aiflow", f"{role}.toml")
    config.write_text(CONFIGS[role])
    config.chmod(0o644)
    inside = f"/etc/aiflow/{role}.toml"
    assert machine.call(AIFLOW, "service", "status", role).returncode == EXIT_NOT_INSTALLED
    for _ in range(2):
        done = machine.call(AIFLOW, "service", "install", inside)
        assert done.returncode == 0, done.stderr
    assert machine.call(AIFLOW, "service", "status", role).returncode == EXIT_RUNNING

    for number, signal in enumerate(("STOP", "KILL"), start=1):
        pid = machine.shows(role, "MainPID")
        machine.call("sh", "-c", f"kill -{signal} {pid}")
        eventually(lambda number=number: machine.shows(role, "NRestarts") == str(number))
        eventually(lambda: machine.shows(role, "SubState") == "running")
        assert machine.shows(role, "MainPID") != pid

    assert machine.call("systemctl", "stop", f"aiflow-{role}").returncode == 0
    assert (machine.shows(role, "Result"), machine.shows(role, "ExecMainStatus")) == ("success", "0")

    config.write_text(CONFIGS[role].replace("bundle =", "bundel ="))
    assert machine.call("systemctl", "start", f"aiflow-{role}").returncode != 0
    assert (machine.shows(role, "ActiveState"), machine.shows(role, "ExecMainStatus")) == ("failed", "78")
    assert machine.call(AIFLOW, "service", "status", role).returncode == EXIT_STOPPED

    done = machine.call(AIFLOW, "service", "uninstall", role)
    assert done.returncode == 0, done.stderr
    assert not list(Path(DEBIAN, "etc/systemd").rglob(f"*aiflow-{role}*"))
    assert machine.call("systemctl", "--failed", "--no-legend").stdout == ""
