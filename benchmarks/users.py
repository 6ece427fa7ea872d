"""The cost of a site's users: memory of the live page after many events, and CPU time and memory of the boards.

The boards run at the same time, with the same photos, so that other work on the machine affects all of them alike:
some do nothing for users but report events, some also announce themselves to Home Assistant and are read by Prometheus,
and some also publish pictures. The page costs a board nothing, since it only subscribes.
"""

import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import cv2
import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.capture import cpu_seconds
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import MqttClient, MqttConfig
from edge_runtime.reporting.images import small_jpeg
from edge_runtime.wire import AnsweredBy, Event, EventHop, Explain, encode_event, topics
from testbed.broker import free_port, start_embedded
from testbed.processes import AiflowProcess, Process

SITE = "bench"
PAGE_BOARDS = 100  # with a camera each
PICTURE_FRAMES = 10  # one of this many frames comes with a picture
CAMERA = (640, 480)  # width and height of the boards' frames, as a cheap camera has
WARM_EVENTS = 10  # a board grows until it has handled some frames
SCRAPE_S = 15.0  # as in Prometheus's example configuration
PATIENCE_S = 60.0
KINDS: dict[str, dict[str, Any]] = {
    "events-only": {},
    "discovery-metrics": {"homeassistant": {}, "metrics": {}},
    "pictures-too": {"homeassistant": {"images": True}, "metrics": {}},
}


def run(
    bundle: Bundle, frames: Sequence[NDArray[np.uint8]], events: int, seconds: float, boards: int
) -> dict[str, Any]:
    """frames: uint8 RGB [H, W, 3]. events: for the page. seconds: that the boards run. boards: of each kind."""
    return {
        "events": events,
        "page": measure_page([small_jpeg(frame) for frame in frames], events),
        "boards": measure_boards(bundle, frames, seconds, boards),
    }


def measure_page(pictures: Sequence[bytes], events: int) -> dict[str, float]:
    """Resident megabytes of `aiflow ui`, which a browser looks at, after each board's first frame and at the end."""
    port, resident = free_port(), []
    with tempfile.TemporaryDirectory(prefix="aiflow-bench-") as folder, start_embedded() as broker:
        options = ["--site", SITE, "--broker-port", str(broker), "--port", str(port)]
        command, address = [sys.executable, "-m", "firmware_tools", "ui", *options], f"http://127.0.0.1:{port}/"
        with (
            Process(command, Path(folder, "ui.log"), "aiflow ui") as page,
            MqttClient(MqttConfig(port=broker).settings("boards", queue_messages=1024)) as client,
        ):
            page.wait_for(lambda: address in page.said(), PATIENCE_S)
            threading.Thread(target=_read_updates, args=[address], daemon=True).start()
            for frame in range(max(1, events // 2 // PAGE_BOARDS)):
                for number in range(PAGE_BOARDS):
                    board, words = f"board-{number}", f"frame{frame} of{number}end"
                    for event in _events(f"{frame:08x}", words):
                        client.publish(topics.event(SITE, board), encode_event(event))
                    if frame % PICTURE_FRAMES == 0:
                        client.publish(topics.image(SITE, board, "front"), pictures[number % len(pictures)], qos=0)
                # The broker queues a thousand messages for the page: let it read these before the next ones come.
                page.wait_for(partial(_found, address, words), PATIENCE_S)
                resident.append(psutil.Process(page.pid).memory_info().rss / 1e6)
    return {"first_mb": round(resident[0], 1), "last_mb": round(resident[-1], 1)}


def _events(frame: str, words: str) -> list[Event]:
    """A draft and its verified text, with what a board of the shipped bundle says about them."""
    fields: dict[str, Any] = {
        "frame": frame,
        "camera": "front",
        "captured": datetime.now(timezone.utc),
        "label": "Egyptian cat",
        "scores": {"Egyptian cat": 0.9, "tiger cat": 0.05, "tabby cat": 0.04},
        "paradigm": "speculative",
        "explain": Explain(
            "speculative", "shortest expected time", {"device": 8.0, "split": 90.0, "speculative": 60.0}
        ),
        "jpeg_bytes": 8651,
        "timings_ms": {"resize": 1.0, "head": 3.4, "draft": 1.4, "answer": 60.0},
    }
    draft = Event(type="new", text=f"a cat sitting on a teddy bear {words}", after_ms=8.0, **fields)
    hops, by = [EventHop("cloud", "attic", 1.0, 40.0)], AnsweredBy("cloud", "attic")
    text = f"a cat sitting on top of a sink {words}"
    answered: dict[str, Any] = {"answered_by": by, "hops": hops, "after_ms": 68.0, "bytes_up": 468, "final": True}
    return [draft, Event(type="update", text=text, **fields, **answered)]


def _read_updates(address: str) -> None:
    """A browser that reads all updates until the page ends."""
    with suppress(OSError), urlopen(f"{address}api/updates") as updates:
        for _ in updates:
            pass


def _found(address: str, words: str) -> bool:
    with urlopen(f"{address}api/search?q={quote(words)}", timeout=PATIENCE_S) as found:
        return bool(json.load(found)["answers"])


def measure_boards(
    bundle: Bundle, frames: Sequence[NDArray[np.uint8]], seconds: float, count: int
) -> dict[str, dict[str, float]]:
    """By kind: percent of a core that a board takes with a frame per second, and resident megabytes at the end."""
    with tempfile.TemporaryDirectory(prefix="aiflow-bench-") as name, start_embedded() as port, ExitStack() as running:
        folder, events = Path(name), Counter[str]()
        for number, pixels in enumerate(frames):
            sized = cv2.resize(pixels, CAMERA, interpolation=cv2.INTER_AREA)
            cv2.imwrite(str(folder / f"{number:04}.jpg"), cv2.cvtColor(sized, cv2.COLOR_RGB2BGR))
        camera = {"name": "camera", "source": name, "interval_s": 1.0, "repeat": True}
        user = MqttClient(
            MqttConfig(port=port).settings("user"),
            subscriptions=[(f"{topics.ROOT}/{SITE}/+/up/event", 1)],
            on_message=lambda message: events.update([message.topic.split("/")[2]]),
        )
        running.enter_context(user).wait_online(PATIENCE_S)
        boards: dict[str, tuple[str, AiflowProcess]] = {}
        scraped = []
        for kind, number in itertools.product(KINDS, range(count)):
            board = f"{kind}-{number}"
            tables = {
                "board": {"id": board, "site": SITE, "bundle": str(bundle.path), "backend": "onnx", "threads": 1},
                "cameras": [camera],
                "mqtt": {"port": port},
                **KINDS[kind],
            }
            if "metrics" in tables:
                tables["metrics"] = {"port": free_port()}
                scraped.append(f"http://127.0.0.1:{tables['metrics']['port']}/metrics")
            boards[board] = kind, running.enter_context(AiflowProcess("run", tables, folder, board))
        for board, (_, process) in boards.items():
            process.wait_for(partial(_has_reported, events, board), PATIENCE_S)
        before = {board: cpu_seconds(psutil.Process(process.pid)) for board, (_, process) in boards.items()}
        started = time.monotonic()
        while (left := started + seconds - time.monotonic()) > 0:
            for address in scraped:
                urlopen(address, timeout=PATIENCE_S).read()
            time.sleep(min(SCRAPE_S, left))
        took = time.monotonic() - started
        cpu, memory = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
        for board, (kind, process) in boards.items():
            process.check_running()
            cpu[kind].append(100 * (cpu_seconds(psutil.Process(process.pid)) - before[board]) / took)
            memory[kind].append(psutil.Process(process.pid).memory_info().rss / 1e6)
    return {
        kind: {
            "cpu_percent": round(statistics.median(cpu[kind]), 3),
            "resident_mb": round(statistics.median(memory[kind]), 1),
        }
        for kind in KINDS
    }


def _has_reported(events: Counter[str], board: str) -> bool:
    return events[board] >= WARM_EVENTS
