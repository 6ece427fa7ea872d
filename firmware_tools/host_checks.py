"""What `aiflow doctor` looks at on the board itself: Python, packages, processor, memory, heat, power, disk, clock.

One function per check. Each returns a Finding; `root` replaces / in tests.
"""

import ctypes
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edge_runtime.cores import usable_cores
from edge_runtime.errors import ConfigError
from edge_runtime.firmware.signature import FIRST_YEAR
from edge_runtime.inference.backends import RUNTIMES, hint
from edge_runtime.packages import how_to_install, how_to_repair
from edge_runtime.planning.thermal import ThermalReader

if TYPE_CHECKING:
    from edge_runtime.config import BoardConfig

Status = Literal["ok", "warning", "failure"]

OLDEST = (3, 10)
IMPORT_S = 60.0  # a slow SD card takes long to read OpenCV
NEEDED_MB, SCARCE_MB = 120, 250  # memory; a board with onnxruntime takes about 115 MB
FULL_MB, NEARLY_FULL_MB = 10, 200  # free on a disk
WORN, FEW_SPARE = 9, 2  # of an eMMC, see _wear
HOT_C = 80.0  # a Raspberry Pi slows itself down from here
# In the order of preference; a CPU without any of them works, and is slower.
CPU_FEATURES = ("asimddp", "i8mm", "asimd", "avx512_vnni", "avx_vnni", "avx2", "avx", "sse4_1")
UNDER_VOLTAGE, SINCE_START = 0b1, 16  # bits of the Raspberry Pi's flags, see planning/thermal.py
TIME_ERROR = 5  # what adjtimex(2) returns while no time service has set the clock


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    status: Status
    found: str
    advice: str = ""  # what to do; empty if nothing


def ok(found: str) -> Finding:
    return Finding("ok", found)


def check_python() -> Finding:
    version, bits = platform.python_version(), 64 if sys.maxsize > 1 << 32 else 32
    found = f"Python {version}, {bits} bit, on {platform.machine()}"
    if sys.version_info < OLDEST:
        return Finding("failure", found, "install Python 3.10 or newer")
    if bits == 32:
        return Finding("failure", found, "install a 64-bit system: onnxruntime and LiteRT have no 32-bit packages")
    return ok(found)


def check_packages(board: "BoardConfig | None" = None) -> Finding:
    """OpenCV and the runtimes, each imported in a process of its own: one that does not fit the processor crashes.

    One of the board's runtimes must work; a board that only offloads needs none. None: a board with the defaults.
    """
    wanted, is_needed = (board.backend, board.paradigm != "offload") if board else ("auto", True)
    backends = [name for name in RUNTIMES if is_needed and wanted in ("auto", name)]
    versions, broken = {}, {}
    for module in ("cv2", *(runtime for backend in backends for runtime in RUNTIMES[backend])):
        version, why = _import(module)
        if version:
            versions[module] = version
        elif why:
            broken[module] = why
    found = ", ".join(f"{module} {version}" for module, version in versions.items()) or "none"
    if "cv2" not in versions:
        advice = how_to_repair("cv2") if "cv2" in broken else how_to_install("cv2")
        return Finding("failure", f"{found}; cv2: {broken.get('cv2', 'not installed')}", advice)
    problems = "".join(f"; {module}: {why}" for module, why in broken.items())
    if backends and len(versions) == 1:
        advice = how_to_repair(next(iter(broken))) if broken else hint(backends[0])
        return Finding("failure", f"{found}, no runtime for the networks{problems}", advice)
    if broken:
        return Finding("warning", found + problems, "remove or reinstall what is broken; the board uses the other one")
    return ok(found)


def _import(module: str) -> tuple[str, str]:
    """A module's version, or why it cannot be imported; both empty if it is not installed."""
    code = f"import {module} as m; print(getattr(m, '__version__', 'installed'))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=IMPORT_S,
            check=False,
            errors="replace",
            env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},  # inference/backends/onnx.py says why
        )
    except subprocess.TimeoutExpired:
        return "", f"not imported within {IMPORT_S:.0f} s"
    if done.returncode == 0:
        return done.stdout.split()[-1], ""
    if done.returncode < 0:
        return "", f"ends with {signal.Signals(-done.returncode).name}: it was built for another processor"
    last = (done.stderr.strip().splitlines() or ["unknown error"])[-1]
    return "", "" if last == f"ModuleNotFoundError: No module named '{module}'" else last[:120]


def check_cpu(root: Path = Path("/")) -> Finding:
    text = _text(root / "proc/cpuinfo")
    words = set(" ".join(re.findall(r"(?m)^(?:flags|Features)\s*:(.*)$", text)).split())
    features = [name for name in CPU_FEATURES if name in words]
    model = _text(root / "proc/device-tree/model").strip("\0 \n") or next(
        iter(re.findall(r"(?m)^model name\s*:\s*(.*)$", text)), "unknown model"
    )
    return ok(f"{model}, {usable_cores(root)} core(s), {' '.join(features[:4]) or 'no known vector instructions'}")


def check_memory(root: Path = Path("/")) -> Finding:
    sizes = dict(re.findall(r"(?m)^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo")))
    if "MemAvailable" not in sizes:
        return ok("this system does not say")
    total, available = (int(sizes[name]) // 1024 for name in ("MemTotal", "MemAvailable"))
    found = f"{available} of {total} MB available"
    if available < NEEDED_MB:
        return Finding("failure", found, f"end other programs: a board needs about {NEEDED_MB} MB")
    if available < SCARCE_MB:
        return Finding("warning", found, "a board may be ended if other programs need more")
    return ok(found)


def check_temperature(root: Path = Path("/")) -> Finding:
    state = ThermalReader(root).read(0.0)
    if state.temperature_c is None:
        return ok("this board does not say")
    found = f"{state.temperature_c:.0f} °C" + (", slowed down" if state.throttled else "")
    if state.throttled or state.temperature_c >= HOT_C:
        return Finding("warning", found, "cool the board: a hot one slows itself down")
    return ok(found)


def check_power(root: Path = Path("/")) -> Finding:
    """Under-voltage, as a Raspberry Pi's firmware reports it."""
    flags = ThermalReader(root).firmware_flags()
    if flags is None:
        flags = _vcgencmd()
    advice = "use the official power supply and a short cable: too little voltage damages SD cards"
    if flags is None:
        return ok("this board does not say")
    if flags & UNDER_VOLTAGE:
        return Finding("failure", "the voltage is too low now", advice)
    if flags >> SINCE_START & UNDER_VOLTAGE:
        return Finding("warning", "the voltage has been too low since the start", advice)
    return ok("no under-voltage since the start")


def _vcgencmd() -> int | None:
    if not (program := shutil.which("vcgencmd")):
        return None
    try:
        done = subprocess.run([program, "get_throttled"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    flags = re.fullmatch(r"throttled=0x([0-9a-fA-F]+)\s*", done.stdout)
    return int(flags[1], 16) if flags else None


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists. It may be a file."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))


def is_writable(folder: Path) -> bool:
    """Tries it: os.access says yes to root everywhere, also in /proc. The file is gone at once."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def check_place(key: str, path: Path, is_file: bool) -> str:
    """A warning if this user cannot write there, else "". Raises ConfigError if nobody can.

    It is no error, as the folder may be made for the service before its start.
    """
    if is_file and os.path.isdir(path):
        raise ConfigError(f"{key} = {path}: is a folder: name a file in it")
    existing = nearest(path.parent if is_file else path)
    if not existing.is_dir():
        raise ConfigError(f"{key} = {path}: {existing} is a file, not a folder: name another place")
    return "" if is_writable(existing) else f"{key} = {path}: {existing} is not writable for this user"


def check_disk(folder: Path, kept: str, is_needed: bool, root: Path = Path("/")) -> Finding:
    """Whether a folder can be written to, and its disk has room and is not worn out.

    kept: what the board keeps there. is_needed: the board does not work in order without that.
    """
    existing = nearest(folder.absolute())
    bad: Status = "failure" if is_needed else "warning"
    advice = f"or name another place: it is for {kept}"
    if not existing.is_dir():
        return Finding(bad, f"{existing}: is a file, not a folder", f"remove it, {advice}")
    state = os.statvfs(existing)
    if state.f_flag & os.ST_RDONLY or not is_writable(existing):
        why = "read-only" if state.f_flag & os.ST_RDONLY else "not writable for this user"
        return Finding(bad, f"{existing}: {why}", f"make it writable, {advice}")
    free_mb = state.f_bavail * state.f_frsize >> 20
    wear, is_worn = _wear(existing, root)
    found = f"{existing}: {free_mb} MB free{wear}"
    if free_mb < FULL_MB:
        return Finding(bad, found, "delete files: the disk is full")
    if free_mb < NEARLY_FULL_MB:
        return Finding("warning", found, "delete files: the disk is nearly full")
    if is_worn:
        return Finding("warning", found, "replace the eMMC, or the board, soon")
    return ok(found)


def _wear(folder: Path, root: Path) -> tuple[str, bool]:
    """What the eMMC of this folder says of its own wear, and whether it will not last. An SD card says nothing.

    JEDEC JESD84-B51, 7.4: life_time has tenths of the life that are used, for two kinds of cells, from 1 (0 to 10 %) to
    11 (more than all); 0: unknown. pre_eol_info: 2 if 80 % of the spare blocks are used, 3 if 90 % are.
    """
    device = os.stat(folder).st_dev
    block = (root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    disk = block.parent if (block / "partition").exists() else block
    life, spare = (
        max((int(number, 16) for number in re.findall("0x[0-9a-fA-F]+", _text(disk / "device" / name))), default=0)
        for name in ("life_time", "pre_eol_info")
    )
    used = f", {10 * life - 10} to {10 * life} % of the eMMC's life used" if life else ""
    used = ", eMMC worn out" if life > 10 else used
    few = ", few spare blocks left" if spare >= FEW_SPARE else ""
    return used + few, life >= WORN or spare >= FEW_SPARE


def runs_here(config: Path) -> bool:
    """Whether a process that this user can see is `aiflow run` with this file."""
    wanted = os.path.realpath(config)
    for process in Path("/proc").glob("[0-9]*"):
        words, folder = _text(process / "cmdline").split("\0"), ""
        if "run" not in words:
            continue
        with suppress(OSError):  # another user's: a service names an absolute path anyway
            folder = os.readlink(process / "cwd")
        files = [os.path.join(folder, word) for word in words if folder or os.path.isabs(word)]
        if wanted in map(os.path.realpath, files):
            return True
    return False


def check_clock() -> Finding:
    now = time.gmtime()
    found = time.strftime("%Y-%m-%d %H:%M UTC", now)
    advice = "connect the board to a network, and start a time service: sudo timedatectl set-ntp true"
    if now.tm_year < FIRST_YEAR:
        return Finding("failure", f"{found} is in the past: TLS refuses every certificate", advice)
    is_synchronised = _is_synchronised()
    if is_synchronised is False:
        return Finding("warning", f"{found}, not synchronised", advice)
    return ok(f"{found}, synchronised" if is_synchronised else found)


def _is_synchronised() -> bool | None:
    """The kernel's answer, whichever time service runs: adjtimex(2) with nothing to set. None: it does not say."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(1024))  # struct timex has 208 bytes
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != TIME_ERROR


def _text(path: Path) -> str:
    try:
        with path.open(errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return ""
