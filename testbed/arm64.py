"""The board's wheel on emulated arm64, compared with this machine: `python -m testbed.arm64`, or `make arm64`.

It installs the wheel of this checkout from wheels for arm64 only, then runs there: the golden vectors of the wire, the
shipped bundle in both runtimes, and a board against a broker and a server on this machine. It also unpacks
the Debian package there and runs its program, but not its scripts. Both machines must give what the protocol promises:
the same bytes for the same symbols, and the same text for the same bytes. It proves nothing about speed, cameras, or
the kernel of a board.

Exit codes: 0 all is equal; 1 something differs or fails; 77 this machine cannot (as test drivers of automake say it).
"""

import argparse
import json
import queue
import re
import shutil
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from edge_runtime.errors import AiflowError
from edge_runtime.inference.preprocess import to_input
from edge_runtime.mqtt import Message, MqttClient, MqttConfig
from edge_runtime.picture_checks import decode_picture
from edge_runtime.wire import topics
from testbed.broker import start_embedded
from testbed.emulation import EmulatedDebian, EmulationError, NoEmulationError, output
from testbed.processes import START_S, AiflowProcess, Process, interrupted_once, read_event, wait_serving
from testbed.sample_photos import collect

EXIT_FAILED, EXIT_CANNOT = 1, 77
ROOT = Path(__file__).resolve().parents[1]
NOT_PACKAGED = shutil.ignore_patterns(".*", "build", "dist", "work", "*.egg-info", "__pycache__")
RUNTIMES = {"onnx": "board", "litert": "litert"}  # backend: its extra
GOLDEN = ROOT / "tests/edge_runtime/wire/test_golden.py"
# Kernels may round differently; more than this is another network.
MAX_DIFFERENT = 0.01  # of the symbols of the same pixels
SITE, BOARD, SERVER = "arm64", "board", "attic"
# Emulation is slow.
SETTINGS = {"paradigm": "speculative", "deadline_ms": 600_000, "resend_ms": 60_000}


@dataclass
class Answer:
    """What a board reported about a picture."""

    text: str
    tokens: tuple[int, ...]
    tier: str
    bytes_up: int


def main() -> int:
    parser = argparse.ArgumentParser("python -m testbed.arm64", description="the board's wheel on emulated arm64")
    parser.add_argument("--suite", choices=["bookworm", "trixie"], default="bookworm", help="default: bookworm")
    args = parser.parse_args()
    try:
        with interrupted_once(), tempfile.TemporaryDirectory(prefix="aiflow-arm64-") as folder:
            faults = compare(Path(folder), args.suite)
    except NoEmulationError as error:
        print(f"make arm64: {error}", file=sys.stderr)
        return EXIT_CANNOT
    except AiflowError as error:
        print(f"make arm64: {error}", file=sys.stderr)
        return EXIT_FAILED
    for fault in faults:
        print(f"DIFFERS: {fault}", file=sys.stderr)
    return EXIT_FAILED if faults else 0


def compare(folder: Path, suite: str) -> list[str]:
    """Prints a line per finding. Returns what differs and must not. Raises NoEmulationError, EmulationError, ..."""
    debian = EmulatedDebian(folder / "debian", suite)
    print(f"Debian {suite} for arm64, Python {debian.python_version}", flush=True)
    wheel = build_wheel(folder)
    sites = {backend: folder / f"site-{backend}" for backend in RUNTIMES}
    for backend, extra in RUNTIMES.items():
        debian.install(sites[backend], f"{wheel}[{extra}]")
        print(f"{backend}: installed {megabytes(sites[backend])}", flush=True)
    debian.install(folder / "site-tests", "pytest", "hypothesis")
    golden = ["-q", "-c", "/dev/null", "-p", "no:cacheprovider", f"--confcutdir={GOLDEN.parent}", str(GOLDEN)]
    said = output(debian.python([sites["onnx"], folder / "site-tests"], "-m", "pytest", *golden))
    print(f"golden vectors: {said.splitlines()[-1]}", flush=True)
    bundle = next((sites["onnx"] / "models/zoo").glob("*/manifest.json")).parent.name
    pictures = write_pictures(folder / "pictures")
    faults: list[str] = []
    same: dict[str, list[str]] = {}  # by backend, the pictures with the same request on both machines
    for backend, site in sites.items():
        valid = output(debian.python([site], "-m", "firmware_tools", "validate", str(zoo(site, bundle))))
        print(f"{backend}: {valid.partition(': ')[2]}", end="", flush=True)
        module = ["-m", "testbed.board_outputs", str(zoo(site, bundle)), backend, str(pictures)]
        there = json.loads(output(debian.python([site], *module)))
        here = json.loads(output([sys.executable, *module]))
        faults += [f"{backend}: {fault}" for fault in differences(backend, here, there)]
        same[backend] = [x["picture"] for x, y in zip(here, there, strict=True) if x["request"] == y["request"]]
    for picture in pictures.glob("*-photo.jpg"):
        picture.unlink()
    faults += try_package(folder, debian, wheel)
    return faults + through_a_server(folder, debian, sites, bundle, pictures, same)


def build_wheel(folder: Path) -> Path:
    """Of a copy, since setuptools also packs what an earlier build has left in `build`."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=NOT_PACKAGED)
    output([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", str(source)])
    shutil.rmtree(source)
    return next(folder.glob("aiflow_edge-*.whl"))


def try_package(folder: Path, debian: EmulatedDebian, wheel: Path) -> list[str]:
    """Builds the Debian package and runs its program. Prints a line. Returns what does not work."""
    manual = folder / "aiflow.1"  # an empty one: this page is the same on all processors
    manual.touch()
    settings = [f"PYTHON={sys.executable}", f"PYTHON_VERSION={debian.python_version}", "ARCH=arm64"]
    settings.append("DPKG_DEB_COMPRESSOR_TYPE=none")  # compressing takes a minute
    output(["env", *settings, "sh", str(ROOT / "debian/build.sh"), str(wheel), str(manual), str(folder)])
    package = next(folder.glob("aiflow-edge_*_arm64.deb"))
    output(["dpkg-deb", "--extract", str(package), str(debian.folder)])
    programs = debian.folder / "opt/aiflow-edge/bin"
    (programs / "python3").unlink()  # a link, which this machine's kernel would follow to its own Python
    aiflow = [str(debian.starts_python(programs / "python3")), str(programs / "aiflow")]
    # It exits with 1 if the clock of this machine is not synchronised.
    report = json.loads(output([*aiflow, "doctor", "--json"], codes=(0, 1)))
    found = {check["name"]: check for check in report["checks"]}
    print(f"package: {output([*aiflow, '--version']).strip()}, {found['packages']['found']}", flush=True)
    return [f"package: {found[name]['found']}" for name in ("python", "packages") if found[name]["status"] != "ok"]


def zoo(site: Path, bundle: str) -> Path:
    return site / "models" / "zoo" / bundle


def megabytes(site: Path) -> str:
    """The size of the files of a directory, and of its largest packages."""
    sizes: dict[str, int] = {}
    for path in site.rglob("*"):
        if path.is_file():
            name = path.relative_to(site).parts[0].removesuffix(".libs")
            sizes[name] = sizes.get(name, 0) + path.stat().st_size
    sizes["cv2"] = sizes.get("cv2", 0) + sizes.pop("opencv_python_headless", 0)
    largest = sorted(sizes, key=lambda name: -sizes[name])[:4]
    return f"{sum(sizes.values()) / 1e6:.0f} MB (" + ", ".join(f"{n} {sizes[n] / 1e6:.0f}" for n in largest) + ")"


def write_pictures(folder: Path) -> Path:
    """Each sample photo twice: as it is, and as the head's input, which no runtime resizes."""
    folder.mkdir()
    for number, photo in enumerate(collect()):
        (folder / f"{number:02}-photo.jpg").write_bytes(photo.data)
        pixels = cv2.cvtColor(to_input(decode_picture(photo.data)), cv2.COLOR_RGB2BGR)
        (folder / f"{number:02}-input.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    return folder


def differences(backend: str, here: list[dict[str, Any]], there: list[dict[str, Any]]) -> list[str]:
    """Prints how many pictures are equal on both machines. Returns what differs and must not."""
    faults = []
    for kind in ("input", "photo"):
        pairs = [(x, y) for x, y in zip(here, there, strict=True) if f"-{kind}." in x["picture"]]
        equal = {key: sum(x[key] == y[key] for x, y in pairs) for key in ("pixels", "symbols", "request")}
        symbols = [(bytes.fromhex(x["symbols"]), bytes.fromhex(y["symbols"])) for x, y in pairs]
        different = sum(a != b for x, y in symbols for a, b in zip(x, y, strict=True))
        count = sum(len(x) for x, _ in symbols)
        print(
            f"{backend}: of {len(pairs)} pictures ({kind}) equal: "
            + ", ".join(f"{key} {number}" for key, number in equal.items())
            + f"; {different} of {count} symbols differ",
            flush=True,
        )
        if kind == "input" and (equal["pixels"] < len(pairs) or different > MAX_DIFFERENT * count):
            faults.append(f"{different} of {count} symbols of the same pixels")
    return faults


def through_a_server(
    folder: Path,
    debian: EmulatedDebian,
    sites: dict[str, Path],
    bundle: str,
    pictures: Path,
    same: dict[str, list[str]],
) -> list[str]:
    """The pictures through broker and server of this machine, by an emulated board and by one of this machine.

    Returns what differs although the requests are the same.
    """
    faults = []
    with ExitStack() as running:
        port = running.enter_context(start_embedded())
        server = {"id": SERVER, "site": SITE, "bundle": str(zoo(ROOT, bundle)), "tier": "cloud"}
        serving = AiflowProcess("serve", {"server": server, "mqtt": {"port": port}}, folder)
        wait_serving(running.enter_context(serving), port, SITE, SERVER)
        for backend, site in sites.items():
            board = {"id": BOARD, "site": SITE, "bundle": str(zoo(site, bundle)), "backend": backend, **SETTINGS}
            camera = {"name": "camera", "source": str(pictures), "interval_s": 0.0}
            process = AiflowProcess("run", {"board": board, "cameras": [camera], "mqtt": {"port": port}}, folder)
            count = len(list(pictures.iterdir()))
            here, _ = play(process, port, count)
            process.command = debian.python([site], "-m", "firmware_tools", *process.command[-2:])
            there, (resident, translated) = play(process, port, count)
            equal = [
                name for name in here if (here[name].tokens, here[name].tier) == (there[name].tokens, there[name].tier)
            ]
            size = sum(answer.bytes_up for answer in there.values()) / count
            print(f"{backend}: {len(equal)} of {count} verified texts equal; {size:.0f} bytes per picture", flush=True)
            print(f"{backend}: resident {resident} MB, of which {translated} MB are translated code", flush=True)
            differ = here.keys() & set(same[backend]) - set(equal)
            faults += [f"{backend}: {name}: {there[name]}, here {here[name]}" for name in sorted(differ)]
    return faults


def play(board: Process, port: int, pictures: int) -> tuple[dict[str, Answer], tuple[int, int]]:
    """Runs a board until each picture has its final event. Returns answers by picture, and the most `memory` it had."""
    inbox: queue.Queue[Message] = queue.Queue()
    settings = MqttConfig(port=port).settings("listener")
    found: dict[str, Answer] = {}
    with MqttClient(settings, subscriptions=[(topics.event(SITE, BOARD), 1)], on_message=inbox.put) as client:
        if not client.wait_online(START_S):
            raise EmulationError(f"the broker on port {port} does not answer: {client.reason}")
        most = 0, 0
        with board:
            while len(found) < pictures:
                ended = board.has_ended()
                event = None
                with suppress(queue.Empty):
                    event = read_event(inbox.get(timeout=0.5).payload)
                    if event and event.final:
                        tier = event.answered_by.tier if event.answered_by else event.type
                        found[event.picture] = Answer(event.text, event.tokens, tier, event.bytes_up)
                if board.is_running():
                    most = max(most, memory(board.pid))  # a board that is about to end has less
                if ended and event is None:
                    raise EmulationError(
                        f"{board.name} ended after {len(found)} of {pictures} pictures:\n{board.said()[-2000:]}"
                    )
    return found, most


def memory(pid: int) -> tuple[int, int]:
    """Resident megabytes of a process, and how many of them are the emulator's translated code."""
    total = translated = 0
    with suppress(OSError):  # it has just ended
        writes_code = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if mapping := re.match(r"[0-9a-f]+-[0-9a-f]+ (\S+)", line):
                writes_code = mapping[1].startswith("rwx")
            elif size := re.match(r"Rss: +(\d+) kB", line):
                total += int(size[1])
                translated += int(size[1]) if writes_code else 0
    return round(total / 1e3), round(translated / 1e3)


if __name__ == "__main__":
    sys.exit(main())
