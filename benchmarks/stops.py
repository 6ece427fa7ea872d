"""How boards with live cameras end on SIGTERM: their exit codes, and the seconds that it took.

Each board is a process of its own, with an MJPEG camera and one that OpenCV reads (benchmarks/capture.py), an outbox,
and requests that nobody answers. The signal comes at a random time after both cameras are live.
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

from benchmarks.capture import FPS, PATIENCE_S, STREAMS, served, wait_live, write_streams
from edge_runtime.inference.bundle import Bundle
from testbed.broker import start_embedded
from testbed.processes import AiflowProcess

LATEST_S = 1.0  # of the signal, after the cameras are live
STREAM_S = 30.0


def run(bundle: Bundle, pictures: Sequence[NDArray[np.uint8]], boards: int) -> dict[str, Any]:
    """Starts and ends as many boards, one after the other. pictures: uint8 RGB [H, W, 3]."""
    rng, codes, seconds = random.Random(0), Counter[int](), []
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder, count = Path(name), round(FPS * STREAM_S)
        write_streams(folder, pictures, count)
        urls = [running.enter_context(served(folder / stream, count)) for stream in STREAMS.values()]
        port = running.enter_context(start_embedded())
        tables = {
            "board": {"id": "board", "bundle": str(bundle.path), "backend": "onnx", "paradigm": "speculative"},
            "cameras": [{"name": f"camera-{i}", "source": url, "interval_s": 0.2} for i, url in enumerate(urls)],
            "mqtt": {"port": port},
            "outbox": {"file": str(folder / "outbox.sqlite")},
        }
        for number in range(boards):
            with AiflowProcess("run", tables, folder, f"board-{number}") as board:
                wait_live(board, len(urls))
                time.sleep(rng.uniform(0, LATEST_S))
                started = time.monotonic()
                board.process.send_signal(signal.SIGTERM)
                codes[board.process.wait(PATIENCE_S)] += 1
                seconds.append(time.monotonic() - started)
    return {
        "boards": boards,
        "exit_codes": {str(code): count for code, count in codes.items()},
        "median_s": round(sorted(seconds)[boards // 2], 2),
        "longest_s": round(max(seconds), 2),
    }
