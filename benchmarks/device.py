"""A board's speed and memory on this machine: the time of each stage of a frame, and start and memory of the process.

Stages are timed in this process, through the real pipeline and MQTT client; start and memory in separate `aiflow run`
processes. The broker is real, and there is no server: benchmarks/gateway.py measures servers. Other work on the
machine affects all figures, so compare shares of the time, and runs made at the same time.
"""

import queue
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
from numpy.typing import NDArray

from edge_runtime.capture import Frame
from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.choice import Setup
from edge_runtime.inference.networks import load_networks
from edge_runtime.mqtt import Message, MqttClient, MqttConfig
from edge_runtime.pipeline import Pipeline
from edge_runtime.planning import FixedPlanner, Plan
from edge_runtime.reporting.events import Events
from edge_runtime.requests import RequestTracker
from edge_runtime.wire import topics
from testbed.broker import start_embedded
from testbed.processes import AiflowProcess, read_event

SITE, BOARD = "bench", "board"
CAMERA = (640, 480)  # width and height of the frames, as a cheap camera has
NETWORKS = ("head", "draft", "labels")  # the stages that run them
STARTS = 3
LONG_MS = 600_000  # so that no deadline and no resend interferes
PATIENCE_S = 120.0


def run(
    bundle: Bundle, frames: Sequence[NDArray[np.uint8]], backends: Sequence[str] = ("onnx", "litert"), count: int = 500
) -> dict[str, Any]:
    """Runs `count` frames, repeating these uint8 RGB [H, W, 3] ones, and returns the figures by backend."""
    sized = [np.asarray(cv2.resize(frame, CAMERA, interpolation=cv2.INTER_AREA), np.uint8) for frame in frames]
    return {
        "frames": count,
        **{
            backend: time_stages(bundle, sized, backend, count) | measure_process(bundle, sized, backend, count)
            for backend in backends
        },
    }


def time_stages(bundle: Bundle, frames: Sequence[NDArray[np.uint8]], backend: str, count: int) -> dict[str, Any]:
    """Median milliseconds of each stage, and the share of a frame's time outside the networks."""
    cv2.setNumThreads(1)  # as the runtime does
    networks = load_networks(bundle, Setup(backend, 1), has_labels=True)
    plan = Plan("speculative", "benchmark", LONG_MS)
    published: queue.Queue[float] = queue.Queue()
    timings: list[dict[str, float]] = []
    with start_embedded() as port, MqttClient(MqttConfig(port=port).settings(BOARD)) as client:
        client.wait_online(PATIENCE_S)
        events = Events(client, SITE, BOARD, lambda _: published.put(time.perf_counter()))
        with RequestTracker(client, bundle, SITE, BOARD, events, count, LONG_MS / 1e3) as tracker:
            pipeline = Pipeline(bundle, networks, FixedPlanner(plan), tracker, events)
            for pixels in islice(cycle(frames), count):
                # A fresh copy is in the CPU's caches, like a frame that a camera's decoder has just written.
                frame, started = Frame("camera", pixels.copy(), time.time(), time.monotonic()), time.perf_counter()
                stages_ms = pipeline.answer(frame).timings_ms
                # Request and event are published by another thread; its time counts too.
                total_ms = 1e3 * (published.get(timeout=PATIENCE_S) - started)
                timings.append({**stages_ms, "publish": total_ms - sum(stages_ms.values())})
    other = [sum(ms for stage, ms in t.items() if stage not in NETWORKS) for t in timings]
    shares = [ms / sum(t.values()) for ms, t in zip(other, timings, strict=True)]
    return {
        "stages_ms": {name: round(statistics.median(t[name] for t in timings), 3) for name in timings[0]},
        "other_ms": round(statistics.median(other), 3),
        "other_share": round(statistics.median(shares), 3),
    }


def measure_process(bundle: Bundle, frames: Sequence[NDArray[np.uint8]], backend: str, count: int) -> dict[str, Any]:
    """Median seconds from a process's start to its first event; resident megabytes after some frames."""
    with tempfile.TemporaryDirectory(prefix="aiflow-bench-") as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        for number, pixels in enumerate(frames):
            jpeg = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1]
            (folder / "photos" / f"{number:04}.jpg").write_bytes(jpeg.tobytes())
        starts = [_board(bundle, folder, backend, [1])[0] for _ in range(STARTS - 1)]
        first_s, megabytes = _board(bundle, folder, backend, sorted({1, min(100, count), count}))
    return {
        "first_event_s": round(statistics.median([*starts, first_s]), 2),
        "resident_mb": {f"after {at}": round(mb, 1) for at, mb in megabytes.items()},
    }


def _board(bundle: Bundle, folder: Path, backend: str, marks: Sequence[int]) -> tuple[float, dict[int, float]]:
    """Runs `aiflow run` until it has reported marks[-1] frames. Returns its start time and its memory at each mark."""
    reported: list[float] = []  # when each frame's first event came
    megabytes = {}

    def arrived(message: Message) -> None:
        if (event := read_event(message.payload)) and event.type == "new":
            reported.append(time.monotonic())

    camera = {"name": "camera", "source": str(folder / "photos"), "interval_s": 0.0, "repeat": True}
    board = {"id": BOARD, "site": SITE, "bundle": str(bundle.path), "backend": backend, "threads": 1}
    with start_embedded() as port:
        settings = MqttConfig(port=port).settings("user")
        with MqttClient(settings, subscriptions=[(topics.event(SITE, BOARD), 1)], on_message=arrived) as user:
            user.wait_online(PATIENCE_S)
            started = time.monotonic()
            with AiflowProcess("run", {"board": board, "cameras": [camera], "mqtt": {"port": port}}, folder) as process:
                for mark in marks:
                    process.wait_for(lambda mark=mark: len(reported) >= mark, PATIENCE_S + mark)  # type: ignore[misc]
                    megabytes[mark] = psutil.Process(process.pid).memory_info().rss / 1e6
    return reported[0] - started, megabytes
