"""A Debian for arm64 in a directory, whose programs run under qemu's user-mode emulation.

qemu looks up every path below the directory first (its option -L). So this needs no root, no chroot, no mount and no
handler of binary formats, and leaves none behind. Only the emulated program itself is emulated: it cannot start other
programs of the directory. Its Python can start itself, since it takes a script that calls qemu for its own program.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from edge_runtime.errors import AiflowError

CPU = "cortex-a72"  # of a Raspberry Pi 4; qemu's name
# onnxruntime reads these files of Linux, and ends with SIGSEGV when they describe an x86 machine.
CPU_INFO = """processor\t: {number}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
CORES = 4
PACKAGES = "python3,libstdc++6"  # without the second, no compiled package of Python loads
# What pip of an emulated Debian 12 would accept: glibc 2.36.
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1)] + ["manylinux2014_aarch64"]
PATIENCE_S = 1200.0  # emulation on a busy machine
LAST = 2000  # characters of a failed program's output in an error


class EmulationError(AiflowError, RuntimeError):
    """A program that was started failed."""


class NoEmulationError(AiflowError, RuntimeError):
    """This machine lacks what emulation needs."""


class EmulatedDebian:
    """A Debian whose packages are unpacked and not configured: a Python and the libraries that it needs."""

    def __init__(self, folder: Path, suite: str) -> None:
        """folder: does not exist yet. suite: "bookworm" or "trixie". Raises NoEmulationError."""
        self.folder = folder
        self._qemu = _program("qemu-aarch64-static", "qemu-aarch64")
        archive = folder.with_suffix(".tar")
        # Without root it may not change the root directory, and need not: no script of a package is run.
        mode = "root" if os.geteuid() == 0 else "chrootless"
        options = [
            f"--mode={mode}",
            "--architectures=arm64",
            "--variant=extract",
            "--format=tar",
            f"--include={PACKAGES}",
        ]
        try:
            output([_program("mmdebstrap"), *options, suite, str(archive)])
        except EmulationError as error:
            raise NoEmulationError(f"no Debian for arm64 could be unpacked: {error}") from error
        folder.mkdir()
        # By way of an archive, so that everything belongs to this user.
        output(["tar", "--extract", f"--file={archive}", f"--directory={folder}", "--no-same-owner", "--exclude=./dev"])
        archive.unlink()
        for name in ("bin", "lib", "sbin"):  # links that the package base-files of trixie makes when it is configured
            if not (folder / name).exists():
                (folder / name).symlink_to(f"usr/{name}")
        (folder / "proc").mkdir(exist_ok=True)
        cores = [CPU_INFO.format(number=number) for number in range(CORES)]
        (folder / "proc" / "cpuinfo").write_text("".join(cores))
        pythons = [
            path for path in (folder / "usr/bin").glob("python3.*") if path.name.removeprefix("python3.").isdigit()
        ]
        if len(pythons) != 1:
            raise EmulationError(f"{folder}/usr/bin has {len(pythons)} Pythons, want 1: {pythons}")
        self.python_version = pythons[0].name.removeprefix("python")
        self._python = self.starts_python(folder.with_name(f"{folder.name}-python"))

    def starts_python(self, script: Path) -> Path:
        """Writes a script that runs this Debian's Python, whose sys.executable is then the script."""
        python = self.folder / "usr/bin" / f"python{self.python_version}"
        script.write_text(f'#!/bin/sh\nexec {self._qemu} -cpu {CPU} -L {self.folder} -0 "$0" {python} "$@"\n')
        script.chmod(0o755)
        return script

    def python(self, path: Sequence[Path], *arguments: str) -> list[str]:
        """The command that runs this Debian's Python with these directories of packages."""
        environment = [f"PYTHONPATH={':'.join(map(str, path))}", "PYTHONSAFEPATH=1"]
        return ["env", *environment, str(self._python), *arguments]

    def install(self, site: Path, *requirements: str) -> None:
        """Installs packages for this Debian into a directory, from wheels for arm64 only. Raises EmulationError."""
        platforms = [f"--platform={platform}" for platform in PLATFORMS]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={self.python_version}"]
        output([*pip, *options, *platforms, f"--target={site}", *requirements])


def output(command: Sequence[str], codes: Collection[int] = (0,)) -> str:
    """Runs a program; its standard output. Raises EmulationError, with what it said last, for another exit code."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise EmulationError(f"{' '.join(command)} did not end within {PATIENCE_S:.0f} s") from error
    if done.returncode not in codes:
        said = (done.stdout + done.stderr)[-LAST:]
        raise EmulationError(f"{' '.join(command)} ended with exit code {done.returncode}; it said last:\n{said}")
    return done.stdout


def _program(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    raise NoEmulationError(f"{names[0]} is not installed: apt install qemu-user-static mmdebstrap")
