"""`aiflow demo`: broker, server and board as separate processes on this machine, on real photos.

The demo is a user of the board: it shows the events that the board publishes over MQTT, as any subscriber could.
"""

import argparse
import queue
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_runtime.capture.picture_files import Picture
from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import Bundle, open_bundle
from edge_runtime.logs import printable
from edge_runtime.mqtt import Message, MqttClient, MqttConfig
from edge_runtime.wire import topics
from firmware_tools.demo_page import AtLevel, PhotoResult, Results, TaughtQuestion, page, summary
from firmware_tools.event_parts import answered_by, labels, marked, stages
from firmware_tools.teach import learn
from models import SHIPPED_BUNDLE
from testbed.argument_types import PHOTOS, new_file, number
from testbed.broker import start_embedded
from testbed.processes import START_S, AiflowProcess, interrupted_once, wait_serving
from testbed.sample_photos import TAUGHT, Photo, collect, write_taught
from testbed.terminal import print_figures

SITE, BOARD, SERVER = "demo", "demo-board", "demo-server"
QUESTION = "person"
LIMIT = 16
INTERVAL_S = 0.5  # between photos: slow enough to watch
DEADLINE_MS = 10_000
MAX_WAITING = 1000  # events that arrived and are not shown yet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", **PHOTOS, help="your photos, not the shipped ones")
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
    """Prints results as they arrive and then the summary, and writes the page."""
    bundle = open_bundle(args.bundle)
    photos = collect(args.images, args.limit)
    print("broker, server and board are starting ...", file=sys.stderr)
    with interrupted_once():
        results = play(args, photos)
    if results.question:
        print(results.question.summary(results.photos))
    print_figures(summary(results))
    note = f"{bundle.manifest.name}, {args.paradigm}" + ("" if args.paradigm == "device" else f", {args.tier} tier")
    levels = answers_at_levels(bundle, args.tier, photos) if args.paradigm != "device" else []
    args.html.write_text(page(results, "AI Flow at the network edge", note, levels), encoding="utf-8")
    print(f"page: {args.html}")


def play(args: argparse.Namespace, photos: Sequence[Photo]) -> Results:
    """Runs everything until each photo has its final event. Raises AiflowError."""
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
            raise AiflowError(f"the broker on port {port} does not answer: {client.reason}")
        processes: list[AiflowProcess] = []
        mqtt, bundle = {"port": port}, str(args.bundle.resolve())
        if args.paradigm != "device":
            server = {"id": SERVER, "site": SITE, "bundle": bundle, "tier": args.tier}
            tables: dict[str, Any] = {"server": server, "mqtt": mqtt}
            if not args.images and (views := write_taught(folder / "taught")):
                results.question = TaughtQuestion(QUESTION, TAUGHT, views)
                teach(args.bundle, folder)
                tables["questions"] = {QUESTION: str(folder / f"{QUESTION}.safetensors")}
            processes = [running.enter_context(AiflowProcess("serve", tables, folder))]
            wait_serving(processes[0], port, SITE, SERVER)
        board = {"id": BOARD, "site": SITE, "bundle": bundle, "paradigm": args.paradigm, "deadline_ms": DEADLINE_MS}
        questions = [QUESTION] if results.question else []
        photos_camera = {"name": "photos", "source": str(folder / "photos"), "interval_s": INTERVAL_S}
        tables = {"board": board, "cameras": [{**photos_camera, "questions": questions}], "mqtt": mqtt}
        processes.append(running.enter_context(AiflowProcess("run", tables, folder)))
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
                print_line(changed, results.question)
    return results


def teach(bundle: Path, folder: Path) -> None:
    """Writes the question into the folder, which has the photos for it in `taught`."""
    print(f"the question {QUESTION} is taught ...", file=sys.stderr)
    *_, question = learn(open_bundle(bundle), [folder / "taught"], "onnx")
    question.write(folder / f"{QUESTION}.safetensors")


def answers_at_levels(bundle: Bundle, tier: str, photos: Sequence[Photo]) -> list[list[AtLevel]]:
    """What the server says about each photo at every level; nothing for a bundle with one level."""
    from benchmarks.quality import RateLimit, proven_chain

    levels = range(len(bundle.manifest.latent.gains))
    if len(levels) < 2:
        return []
    print("the same photos at every rate ...", file=sys.stderr)
    chain = proven_chain(bundle, "speculative", tier, "onnx")
    answers: list[list[AtLevel]] = [[] for _ in photos]
    for level in levels:
        chain.rate = RateLimit(level=level)
        sent = [chain.send(Picture(photo.name, photo.data)) for photo in photos]
        assert chain.engine is not None
        jobs = [replace(chain.job(s, s.draft), wants_label=bool(bundle.manifest.classes)) for s in sent]
        for row, s, answer in zip(answers, sent, chain.engine.answer(jobs), strict=True):
            row.append(AtLevel(s.payload_bytes, bundle.text(list(answer.tokens)), answer.scores))
    return answers


def print_line(result: PhotoResult, question: TaughtQuestion | None) -> None:
    """Prints a photo's final event as a line. Words that are not in the draft are in brackets."""
    event = result.last
    if event is None or not result.is_final:
        return
    runs = marked(event.text, result.draft or event.text)
    parts = {
        "photo": result.photo.name,
        "draft": result.draft or "-",
        "text": " ".join(f"[{run}]" if differs else run for run, differs in runs),
        "labels": labels(event.scores) or "-",
        **({question.name: question.answer(result)} if question else {}),
        "bytes": f"{event.bytes_up} (JPEG {event.jpeg_bytes})",
        "ms": ", ".join(f"{stage} {ms:.1f}" for stage, ms in stages(event).items()),
        "by": answered_by(event),
    }
    print(" | ".join(f"{name}: {printable(value)}" for name, value in parts.items()), flush=True)
