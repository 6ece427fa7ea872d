"""`make deb`: what the package holds, and that it is installed, updated and removed in a real Debian.

Slow, and skipped without a Debian in a directory: CONTRIBUTING.md says how to make it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.arm64 import NOT_PACKAGED

DEBIAN = os.environ.get("AIFLOW_DEBIAN_ROOT", "")
ROOT = Path(__file__).parents[1]
BUNDLE = "/opt/aiflow-edge/packages/models/zoo/everyday-lite0"
# These stay after a removal: an administrator's files, the account, and what dpkg and systemd keep of any package.
KEPT = (
    "etc/aiflow",
    "etc/passwd",
    "etc/group",
    "etc/shadow",
    "etc/gshadow",
    "etc/.pwd.lock",
    "etc/subuid",
    "etc/subgid",
)
DPKG = ("var/lib/dpkg", "var/log", "var/cache")
BOARD = f"""
[board]
id = "b1"
bundle = "{BUNDLE}"
paradigm = "device"
[[cameras]]
name = "door"
source = "mqtt"
"""
# Run by systemd in the container, which then ends. Each line of state is: what was done, active or not, its process.
SCENARIO = r"""#!/bin/sh
state() { echo "$1 $(systemctl show --property=ActiveState --value aiflow-board)" \
    "$(systemctl show --property=MainPID --value aiflow-board)" >>/states; }
dpkg --install /package.deb && state installed
dpkg --install /package.deb && state updated
dpkg --remove aiflow-edge && state removed
dpkg --install /package.deb && state returned
aiflow service install /etc/aiflow/board.toml && state started
cp --preserve /etc/aiflow/board.toml /etc/aiflow/porch.toml
aiflow service install /etc/aiflow/porch.toml && state renamed
dpkg --install /package.deb && state "$(sed -n 's/^ExecStart=.* //p' /etc/systemd/system/aiflow-board.service)"
systemctl disable --now aiflow-board && dpkg --install /package.deb && state disabled
dpkg --purge aiflow-edge && state purged
"""
UNIT = """
[Unit]
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
ExecStart=/scenario.sh
StandardOutput=file:/scenario.log
StandardError=file:/scenario.log
[Install]
WantedBy=multi-user.target
"""

pytestmark = [
    pytest.mark.skipif(not DEBIAN, reason="AIFLOW_DEBIAN_ROOT names no directory with a Debian"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can install packages"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the Makefile in a copy of the repository, for the Python of the tests."""
    source = tmp_path_factory.mktemp("deb") / "source"
    shutil.copytree(ROOT, source, ignore=NOT_PACKAGED)
    command = ["make", "--old-file=venv", f"BIN={Path(sys.executable).parent}", "deb"]
    fast = {**os.environ, "DPKG_DEB_COMPRESSOR_TYPE": "none", "PYTHONPATH": str(source)}
    subprocess.run(command, check=True, cwd=source, env=fast)
    return next((source / "dist").glob("aiflow-edge_*.deb"))


@pytest.fixture
def debian(tmp_path: Path, package: Path) -> Path:
    """A copy of the Debian with the package's file in it."""
    root = tmp_path / "debian"
    subprocess.run(["cp", "--archive", DEBIAN, str(root)], check=True)
    shutil.rmtree(root / "opt", ignore_errors=True)  # other tests' program
    shutil.copy(package, root / "package.deb")
    return root


def inside(root: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["chroot", str(root), *command], capture_output=True, text=True, check=False)


def tree(root: Path) -> dict[str, int]:
    """Every file and its size, without what stays after any removal."""
    paths = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_symlink() or path.is_file()}
    return {name: path.lstat().st_size for name, path in paths.items() if not name.startswith((*KEPT, *DPKG))}


def test_the_package_holds_the_boards_part_and_no_path_of_the_machine_that_built_it(package: Path) -> None:
    listing = subprocess.run(
        ["dpkg-deb", "--contents", str(package)], capture_output=True, text=True, check=True
    ).stdout
    assert f".{BUNDLE}/manifest.json" in listing
    assert ".safetensors" not in listing
    assert "__pycache__" not in listing
    assert {line.split()[1] for line in listing.splitlines()} == {"root/root"}
    extract = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(extract, stdout=subprocess.PIPE) as process:
        found = subprocess.run(["grep", "-c", str(package.parents[1])], stdin=process.stdout, check=False)
    assert found.returncode == 1
    if shutil.which("lintian"):
        ours = "uses-no-compression-for-data-tarball,uses-no-compression-for-control-tarball"  # of this test
        nobody = "bogus-mail-host,bogus-mail-host-in-debian-changelog"  # whoever makes a package names himself
        tags = [f"--suppress-tags={ours},{nobody}"]
        subprocess.run(["lintian", "--allow-root", "--fail-on=error", *tags, str(package)], check=True)


def test_it_is_installed_runs_and_is_removed_without_a_trace(debian: Path) -> None:
    before = tree(debian)
    done = inside(debian, "dpkg", "--install", "/package.deb")
    assert done.returncode == 0, done.stderr
    assert "aiflow setup --out /etc/aiflow/board.toml" in done.stdout
    assert inside(debian, "aiflow", "--version").stdout.startswith("aiflow ")
    (debian / "etc/aiflow/board.toml").write_text(BOARD)
    report = json.loads(inside(debian, "aiflow", "doctor", "--json").stdout)
    checks = {check["name"]: check["status"] for check in report["checks"]}
    assert (checks["python"], checks["packages"]) == ("ok", "ok")
    done = inside(debian, "runuser", "-u", "aiflow", "--", "aiflow", "validate", BUNDLE)
    assert done.returncode == 0, done.stderr

    done = inside(debian, "dpkg", "--remove", "aiflow-edge")
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(debian) == before
    assert inside(debian, "dpkg", "--purge", "aiflow-edge").returncode == 0
    assert (debian / "etc/aiflow/board.toml").read_text() == BOARD


@pytest.mark.skipif(not shutil.which("systemd-nspawn"), reason="systemd-nspawn is not installed")
def test_the_service_starts_with_the_package_follows_its_updates_and_goes_with_it(debian: Path) -> None:
    (debian / "etc/aiflow").mkdir()
    (debian / "etc/aiflow/board.toml").write_text(BOARD)
    (debian / "scenario.sh").write_text(SCENARIO)
    (debian / "scenario.sh").chmod(0o755)
    unit = debian / "etc/systemd/system/scenario.service"
    unit.write_text(UNIT)
    (unit.parent / "multi-user.target.wants").mkdir(exist_ok=True)
    (unit.parent / "multi-user.target.wants" / unit.name).symlink_to(f"../{unit.name}")
    options = ["--register=no", "--keep-unit", "--private-network", "--console=pipe", "--boot"]
    subprocess.run(
        ["systemd-nspawn", f"--directory={debian}", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    log = (debian / "scenario.log").read_text()
    states = [line.split() for line in (debian / "states").read_text().splitlines()]
    assert [state[:2] for state in states] == [
        ["installed", "active"],
        ["updated", "active"],
        ["removed", "inactive"],
        ["returned", "inactive"],
        ["started", "active"],
        ["renamed", "active"],
        ["/etc/aiflow/porch.toml", "active"],
        ["disabled", "inactive"],
        ["purged", "inactive"],
    ], log
    assert states[0][2] != states[1][2], "the update did not start the new program"
    assert not list(debian.glob("etc/systemd/system/**/aiflow*"))
