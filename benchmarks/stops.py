"""How boards end on SIGTERM, in several states: their exit codes, and the seconds that it took.

Each board is a process of its own, with an MJPEG camera and one that OpenCV reads (benchmarks/capture.py), or with a
watched folder. It has an outbox, and nobody answers its requests. The signal comes at a random time after the board has
come into its state.
"""

import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.capture import FPS, PATIENCE_S, STREAMS, served, write_streams
from edge_runtime.inference.bundle import Bundle
from testbed.broker import free_port, start_embedded
from testbed.processes import AiflowProcess

LATEST_S = 1.0  # of the signal, after the board is in its state
STREAM_S = 30.0
FRAMES = 2 * FPS  # before a camera stalls
STATES = {  # what a board's log says in this state, and of how many cameras
    "live": ("camera live", 2),
    "opening": ("mqtt online", 1),  # the cameras take the connection, and send nothing
    "stalled": ("camera stalled", 2),
    "broker-away": ("camera live", 2),
    "folder": ("camera waiting", 1),  # a watched one, into which nothing comes
}


def run(bundle: Bundle, pictures: Sequence[NDArray[np.uint8]], boards: int, states: Sequence[str]) -> dict[str, Any]:
    """Starts and ends as many boards in each state, one after the other. pictures: uint8 RGB [H, W, 3]."""
    with tempfile.TemporaryDirectory() as name:
        write_streams(Path(name), pictures, round(FPS * STREAM_S))
        (Path(name) / "drop").mkdir()
        return {"boards": boards, **{state: _ended(state, bundle, Path(name), boards) for state in states}}


def _ended(state: str, bundle: Bundle, folder: Path, boards: int) -> dict[str, Any]:
    """The figures of one state."""
    rng, codes, seconds = random.Random(0), Counter[int](), []
    said, times = STATES[state]
    sent = {"opening": 0, "stalled": FRAMES}.get(state)
    with ExitStack() as running:
        streams = [folder / stream for stream in STREAMS.values()]
        sources = [running.enter_context(served(stream, round(FPS * STREAM_S), sent)) for stream in streams]
        if state == "folder":
            sources = [f"watch:{folder / 'drop'}"]
        port = free_port() if state == "broker-away" else running.enter_context(start_embedded())
        cameras = [{"name": f"camera-{i}", "source": source, "interval_s": 0.2} for i, source in enumerate(sources)]
        tables = {
            "board": {"id": "board", "bundle": str(bundle.path), "backend": "onnx", "paradigm": "speculative"},
            "cameras": [{**camera, "stall_s": 1.0} for camera in cameras] if state == "stalled" else cameras,
            "mqtt": {"port": port},
            "outbox": {"file": str(folder / "outbox.sqlite")},
        }
        for number in range(boards):
            with AiflowProcess("run", tables, folder, f"{state}-{number}") as board:
                board.wait_for(lambda: board.said().count(said) >= times, PATIENCE_S)
                time.sleep(rng.uniform(0, LATEST_S))
                started = time.monotonic()
                board.process.send_signal(signal.SIGTERM)
                codes[board.process.wait(PATIENCE_S)] += 1
                seconds.append(time.monotonic() - started)
    return {
        "exit_codes": {str(code): count for code, count in codes.items()},
        "median_s": round(sorted(seconds)[boards // 2], 2),
        "longest_s": round(max(seconds), 2),
    }
