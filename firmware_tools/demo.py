"""`aiflow demo`: broker, server and board as processes of their own on this machine, on real photos.

The demo is a user of the board: it shows the events that the board publishes over MQTT, as any subscriber could.
"""

import argparse
import queue
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import open_bundle
from edge_runtime.mqtt import Message, MqttClient, MqttConfig
from edge_runtime.wire import topics
from firmware_tools.demo_page import PhotoResult, Results, answered_by, marked, page, stages, summary
from models import SHIPPED_BUNDLE
from testbed.broker import start_embedded
from testbed.processes import START_S, AiflowProcess, interrupted_once, wait_serving
from testbed.sample_photos import Photo, collect
from testbed.terminal import new_file, number, print_figures, printable

SITE, BOARD, SERVER = "demo", "demo-board", "demo-server"
LIMIT = 16
INTERVAL_S = 0.5  # between photos: slow enough to watch
DEADLINE_S = 10.0
MAX_WAITING = 1000  # events that arrived and are not shown yet


class DemoError(AiflowError, ValueError):
    """The demo cannot go on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to show, how, and where to write the page."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--images", type=Path, nargs="+", metavar="DIR_OR_TAR", help="your photos, not the shipped ones")
    what.add_argument("--video", type=Path, metavar="FILE", help="a still of every second of a video")
    parser.add_argument("--limit", type=number, default=LIMIT, metavar="N", help=f"at most N photos (default: {LIMIT})")
    parser.add_argument(
        "--paradigm",
        choices=["device", "split", "speculative", "offload"],
        default="speculative",
        help="who does what (default: speculative)",
    )
    parser.add_argument("--tier", choices=["edge", "cloud"], default="cloud", help="who answers (default: cloud)")
    parser.add_argument("--bundle", type=Path, default=SHIPPED_BUNDLE, metavar="DIR", help="default: the shipped one")
    parser.add_argument("--html", type=new_file, default=Path("demo.html"), metavar="FILE", help="default: demo.html")


def run(args: argparse.Namespace) -> None:
    """Shows results as they arrive, prints the summary and writes the page."""
    bundle = open_bundle(args.bundle)
    photos = collect(args.images, args.video, args.limit)
    console = Console()
    with interrupted_once():
        if console.is_terminal:
            starting = Text("broker, server and board are starting ...")
            with Live(starting, console=console, transient=True) as live:
                results = play(args, photos, lambda results, _: live.update(table(results), refresh=True))
            console.print(table(results))
        else:
            results = play(args, photos, lambda _, changed: print_line(changed))
    print_figures(summary(results))
    note = f"{bundle.manifest.name}, {args.paradigm}" + ("" if args.paradigm == "device" else f", {args.tier} tier")
    args.html.write_text(page(results, "AI Flow at the network edge", note), encoding="utf-8")
    print(f"page: {args.html}")


def play(args: argparse.Namespace, photos: Sequence[Photo], show: Callable[[Results, PhotoResult], None]) -> Results:
    """Runs everything until each photo has its final event. `show` is told all results and the one that changed.

    Raises ProcessError, BrokerError, DemoError.
    """
    results = Results(photos)
    inbox: queue.Queue[tuple[float, Message]] = queue.Queue(MAX_WAITING)
    with ExitStack() as running:  # ends in the opposite order: board, server, broker
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="aiflow-demo-")))
        (folder / "photos").mkdir()
        for number, photo in enumerate(photos):
            # The same suffix for all formats: decoders look at the bytes.
            (folder / "photos" / f"{number:04}.jpg").write_bytes(photo.data)
        port = running.enter_context(start_embedded())
        client = MqttClient(
            MqttConfig(port=port).settings("demo-user"),
            subscriptions=[(topics.event(SITE, BOARD), 1)],
            on_message=lambda message: inbox.put_nowait((time.time(), message)),
        )
        if not running.enter_context(client).wait_online(START_S):
            raise DemoError(f"the broker on port {port} does not answer: {client.reason}")
        processes: list[AiflowProcess] = []
        if args.paradigm != "device":
            processes = [running.enter_context(AiflowProcess("serve", server_tables(args, port), folder))]
            wait_serving(processes[0], port, SITE, SERVER)
        board = AiflowProcess("run", board_tables(args, port, folder / "photos"), folder)
        processes.append(running.enter_context(board))
        while not results.all_final:
            # Check before reading: the board's last events may arrive after its end is seen.
            board_has_ended = [process.has_ended() for process in processes][-1]
            try:
                arrived, message = inbox.get(timeout=0.5)
            except queue.Empty:
                if board_has_ended:
                    break
                continue
            if changed := results.add(message.payload, arrived):
                show(results, changed)
    return results


def server_tables(args: argparse.Namespace, port: int) -> dict[str, dict[str, object]]:
    """The server's configuration."""
    server = {"id": SERVER, "site": SITE, "bundle": str(args.bundle.resolve()), "tier": args.tier}
    return {"server": server, "mqtt": {"port": port}}


def board_tables(args: argparse.Namespace, port: int, photos: Path) -> dict[str, object]:
    """The board's configuration."""
    board = {"id": BOARD, "site": SITE, "bundle": str(args.bundle.resolve()), "paradigm": args.paradigm}
    camera = {"name": "photos", "source": str(photos), "interval_s": INTERVAL_S}
    return {"board": board | {"deadline_ms": int(1e3 * DEADLINE_S)}, "cameras": [camera], "mqtt": {"port": port}}


def table(results: Results) -> Table:
    """All photos, also those without an answer yet."""
    shown = Table("photo", "draft, at once", "verified text", "bytes\nas JPEG", "ms", "answered by", show_lines=True)
    for result in results.photos:
        event = result.last
        if event is None:
            shown.add_row(printable(result.photo.name), "...")
            continue
        verified = Text()
        for run, differs in marked(event.text, result.draft or event.text) if result.is_final else ():
            verified.append(f"{printable(run)} ", style="bold green" if differs else "")
        shown.add_row(
            Text(printable(result.photo.name)),
            Text(printable(result.draft)),
            verified,
            f"{event.bytes_up or '-'}\n{event.jpeg_bytes}",
            "\n".join(f"{stage} {ms:.1f}" for stage, ms in stages(event).items()),
            Text(printable(answered_by(event))),
        )
    return shown


def print_line(result: PhotoResult) -> None:
    """Prints a photo's final event as a line, for logs. Words that are not in the draft are in brackets."""
    event = result.last
    if event is None or not result.is_final:
        return
    runs = marked(event.text, result.draft or event.text)
    parts = {
        "photo": result.photo.name,
        "draft": result.draft or "-",
        "text": " ".join(f"[{run}]" if differs else run for run, differs in runs),
        "bytes": f"{event.bytes_up} (JPEG {event.jpeg_bytes})",
        "ms": ", ".join(f"{stage} {ms:.1f}" for stage, ms in stages(event).items()),
        "by": answered_by(event),
    }
    print(" | ".join(f"{name}: {printable(value)}" for name, value in parts.items()), flush=True)
