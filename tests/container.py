"""A Debian whose process 1 is systemd, in a container that shares this machine's network, Python packages and code.

Debian is made once, in a directory. A container leaves it as it is: what it writes is in memory and goes with it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from testbed.processes import Process, ProcessError
from tests.brokers import skip

ROOT = Path(__file__).parents[1]
SUITE, PYTHON = "bookworm", (3, 11)  # a Debian, and its Python, for which the packages of the tests must be
PACKAGES = "systemd,dbus,python3,python3-venv"
TOOLS = {"mmdebstrap": "mmdebstrap", "systemd-nspawn": "systemd-container"}  # program -> its package
AIFLOW = "/opt/aiflow/bin/aiflow"
SCRIPT = "#!/opt/aiflow/bin/python3\nimport sys\nfrom firmware_tools.cli import main\nsys.exit(main())\n"
PREPARE = f"""
set -e
python3 -m venv --without-pip /opt/aiflow
printf '/opt/code\\n/opt/site\\n' >"$(echo /opt/aiflow/lib/python3*/site-packages)/bound.pth"
printf '{SCRIPT}' >{AIFLOW}
chmod 755 {AIFLOW}
"""
CONTROLLERS = [Path("/sys/fs/cgroup", name) for name in ("memory", "cpu")]  # of cgroup v1
HAS_V1 = all((controller / "cgroup.procs").exists() for controller in CONTROLLERS)
BOOT_S = 60.0
COMMAND_S = 300.0  # a server that starts on a busy machine


class Container:
    """Runs commands inside."""

    def __init__(self, leader: int) -> None:
        """leader: its process 1, as this machine calls it."""
        self.leader = leader
        self._enter = ["nsenter", "--target", str(leader), "--all"]

    def call(self, *words: str) -> "subprocess.CompletedProcess[str]":
        command = [*self._enter, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)

    def shows(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.call("systemctl", "show", "--property", name, "--value", unit).stdout.strip()

    def log(self, unit: str) -> str:
        return self.call("journalctl", "--no-pager", "--output=cat", "--unit", unit).stdout


@contextmanager
def booted(folder: Path, binds: Mapping[str, Path], log: Path) -> Iterator[Container]:
    """A container of the Debian in this directory, which is made if it does not exist. Skips the test if it cannot be.

    binds: directory inside -> outside, which both see. log: a new file.
    """
    if os.geteuid() != 0:
        skip("only root can start containers")
    if sys.version_info[:2] != PYTHON:
        skip("the Debian has another Python than the tests, so their packages do not work there")
    for program, package in TOOLS.items():
        if not shutil.which(program):
            skip(f"{program} is not installed: apt install {package}")
    if not folder.exists():
        _make(folder)
    code = {"/opt/site": Path(sysconfig.get_path("purelib")), "/opt/code": ROOT}
    options = [f"--bind-ro={outside}:{inside}" for inside, outside in code.items()]
    options += [f"--bind={outside}:{inside}" for inside, outside in binds.items()]
    options += ["--volatile=overlay", "--register=no", "--keep-unit", "--link-journal=no", "--console=pipe"]
    with ExitStack() as stack:
        groups = [stack.enter_context(_group(controller)) for controller in CONTROLLERS if HAS_V1]
        joining = "".join(f"echo $$ >{group}/cgroup.procs; " for group in groups)
        command = ["sh", "-c", f'{joining}exec "$@"', "sh", "systemd-nspawn", f"--directory={folder}", "--boot"]
        # Its end shuts the container down.
        yield _running(stack.enter_context(Process([*command, *options], log, "container")))


def _make(folder: Path) -> None:
    new = folder.with_name(f"{folder.name}.new")  # what an interrupted try has left does not count
    shutil.rmtree(new, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(new)], check=True)
    new.rename(folder)


def _running(process: Process) -> Container:
    container = _started(process)
    if HAS_V1:  # with cgroup v1, nspawn leaves systemd no limits to set
        remounts = [["mount", "--options", "remount,bind,rw", str(controller)] for controller in CONTROLLERS]
        for words in (*remounts, ["systemctl", "daemon-reexec"]):
            assert container.call(*words).returncode == 0
    done = container.call("sh", "-c", PREPARE)
    assert done.returncode == 0, done.stderr
    return container


def _started(process: Process) -> Container:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    end = time.monotonic() + BOOT_S
    while time.monotonic() < end:
        process.check_running()
        for leader in children.read_text().split():  # the first ones are others, which do not stay
            container = Container(int(leader))
            if container.call("systemctl", "is-system-running").stdout.strip() in ("running", "degraded"):
                return container
        time.sleep(0.1)
    raise ProcessError(f"the container did not start: {process.said()}")


@contextmanager
def _group(controller: Path) -> Iterator[Path]:
    """A group of cgroup v1 for the container, below our own."""
    name = f":{controller.name}:"
    own = next(line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if name in line)
    group = controller / own.strip("/") / f"aiflow-test-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        for path in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
            path.rmdir()
        group.rmdir()
