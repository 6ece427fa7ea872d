"""CPU time and memory that live cameras take: if all frames are converted; if only those that are due are; the same
with OpenCV in a process of its own per camera, as the runtime does; and for all processes of a board that also answers.

The cameras are a process of their own, which serves frames of 1920 x 1080 pixels over HTTP: as MJPEG, which the runtime
reads without OpenCV, and as a video that OpenCV decodes (MPEG-4, as its wheels cannot encode H.264). Each way to read
them is a fresh process. They read for the same time, one after the other, in several rounds. The board has no server.
A second scene has noise and no motion: a board with a motion gate answers none of its frames. The video, in which each
twelfth frame is a key frame, is measured with `key_frames` too.
"""

import itertools
import json
import mmap
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle, islice
from math import inf
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
from numpy.typing import NDArray

from edge_runtime.capture import Counters
from edge_runtime.capture.live import live_frames
from edge_runtime.config import CameraConfig
from edge_runtime.inference.bundle import Bundle
from edge_runtime.shutdown import threads_in_driver
from testbed.broker import start_embedded
from testbed.processes import AiflowProcess

SIZE = 1920, 1080
FPS = 15
VIEWS = 30  # different frames, which repeat
SPARE_S = 15.0  # of the streams, for opening them
NOISE = 2.0  # standard deviation of the scene without motion, of 255
PATIENCE_S = 60.0
BOUNDARY = b"frame"
COMMAND = [sys.executable, "-m", "benchmarks.capture"]
ROOT = Path(__file__).parents[1]


def run(
    bundle: Bundle, pictures: Sequence[NDArray[np.uint8]], interval_s: float, seconds: float, cameras: int, rounds: int
) -> dict[str, Any]:
    """Figures by kind of stream, medians of the rounds. pictures: uint8 RGB [H, W, 3]. interval_s: of the frames that
    are due. rounds: the ways take turns, since other work on the machine changes the cost of all.
    """
    count = round(FPS * (seconds + SPARE_S))
    figures: dict[str, Any] = {"cameras": cameras, "interval_s": interval_s}
    with tempfile.TemporaryDirectory() as folder:
        board = partial(_board, bundle.path, interval_s=interval_s, seconds=seconds)
        write_streams(Path(folder), pictures, count)
        for kind, name in STREAMS.items():
            with served(Path(folder, name), count) as url:
                arguments = [url, *(str(value) for value in (interval_s, seconds, cameras))]
                boards = {
                    f"whole_{way}": partial(board, url, cameras=cameras, **keys) for way, keys in BOARDS[kind].items()
                }
                figures[kind] = _compare(arguments, boards, rounds)
        write_streams(Path(folder), pictures, count, moves=False)
        for kind, name in STREAMS.items():
            with served(Path(folder, name), count) as url:
                for way, keys in BOARDS[kind].items():
                    found = [board(url, cameras=1, motion={"enabled": True}, **keys)["ms"] for _ in range(rounds)]
                    figures[kind][f"still_{way}_cpu_share"] = round(statistics.median(found) * FPS / 1e3, 4)
    return figures


def _compare(
    arguments: list[str], boards: Mapping[str, Callable[[], dict[str, float]]], rounds: int
) -> dict[str, float]:
    """CPU milliseconds per frame of a stream, their ratio to the first way, and memory in MB, by way to read it."""
    figures = defaultdict[str, list[float]](list)
    for _ in range(rounds):
        first_ms = 0.0
        for way in [*WAYS, *boards]:
            found = boards[way]() if way in boards else _read_apart(way, arguments)
            first_ms = first_ms or found["ms"]
            for name, value in {**found, "ratio": found["ms"] / first_ms}.items():
                figures[f"{way}_{name}"].append(value)
    return {name: round(statistics.median(values), 3) for name, values in figures.items()}


def _read_apart(way: str, arguments: list[str]) -> dict[str, float]:
    """Calls `_read` in a process of its own."""
    read = subprocess.run([*COMMAND, way, *arguments], stdout=subprocess.PIPE, cwd=ROOT, check=True)
    return dict(json.loads(read.stdout))


def _board(bundle: Path, url: str, interval_s: float, seconds: float, cameras: int, **keys: Any) -> dict[str, float]:
    """The same figures for `aiflow run` and its processes, measured once all cameras are live. keys: of each camera."""
    tables: dict[str, Any] = {
        "board": {"id": "board", "bundle": str(bundle), "backend": "onnx", "threads": 1, "paradigm": "device"},
        "cameras": [
            {"name": f"camera-{number}", "source": url, "interval_s": interval_s, **keys} for number in range(cameras)
        ],
    }
    with start_embedded() as port, tempfile.TemporaryDirectory() as folder:
        process = AiflowProcess("run", {**tables, "mqtt": {"port": port}}, Path(folder))
        with process:
            wait_live(process, cameras)
            board = psutil.Process(process.pid)
            processes = [board, *board.children(recursive=True)]
            cpu_s, started = sum(map(cpu_seconds, processes)), time.monotonic()
            time.sleep(seconds)
            cpu_s, taken_s = sum(map(cpu_seconds, processes)) - cpu_s, time.monotonic() - started
            memory = sum(one.memory_full_info().pss for one in processes)
    return {"ms": 1e3 * cpu_s / (FPS * taken_s * cameras), "mb": memory / 1e6}


def wait_live(board: AiflowProcess, cameras: int) -> None:
    board.wait_for(lambda: board.said().count("camera live") >= cameras, PATIENCE_S)


# ---- reading ----


def _read(way: str, url: str, interval_s: float, seconds: float, cameras: int) -> dict[str, float]:
    """CPU milliseconds per frame, from the first frame of each camera on, and the memory of all processes at the end.

    Memory is the proportional set size, in which processes share what they have in common.
    """
    cv2.setNumThreads(1)  # as the runtime does
    stop, counters, taken = threading.Event(), [Counters() for _ in range(cameras)], [0] * cameras
    streams = [WAYS[way](url, stop, counter, interval_s) for counter in counters]

    def take(number: int) -> None:
        for pixels in streams[number]:
            taken[number] += 1
            pixels.reshape(-1)[:: mmap.PAGESIZE].max()  # its memory counts for who uses it

    def received() -> int:
        return sum(taken) + sum(counter.skipped for counter in counters)

    for stream in streams:
        next(stream)
    threads = [threading.Thread(target=take, args=[number]) for number in range(cameras)]
    processes = [psutil.Process(), *psutil.Process().children()]
    cpu_s, frames = sum(map(cpu_seconds, processes)), received()
    for thread in threads:
        thread.start()
    stop.wait(seconds)
    cpu_s, frames = sum(map(cpu_seconds, processes)) - cpu_s, received() - frames
    memory = sum(process.memory_full_info().pss for process in processes)
    stop.set()
    for thread in [*threads, *threads_in_driver()]:
        thread.join()
    return {"ms": round(1e3 * cpu_s / frames, 2), "mb": round(memory / 1e6, 1)}


def cpu_seconds(process: psutil.Process) -> float:
    """Of all its threads. Linux has a clock of each process; psutil's times have steps of 10 ms, too coarse here."""
    return time.clock_gettime((~process.pid << 3) | 2)  # clock_getcpuclockid(3)


def _in_this_process(url: str, stop: threading.Event, counters: Counters, interval_s: float) -> Iterator[NDArray[Any]]:
    """Decodes each frame, and converts those that are due."""
    capture, due = cv2.VideoCapture(url, cv2.CAP_FFMPEG), -inf
    while not stop.is_set():
        assert capture.grab(), "the stream has ended"
        if time.monotonic() < due:
            counters.skipped += 1
            continue
        due = time.monotonic() + interval_s
        yield cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)
    capture.release()


_numbers = itertools.count()  # of cameras: each has a name of its own


def _as_a_board_does(url: str, stop: threading.Event, counters: Counters, interval_s: float) -> Iterator[NDArray[Any]]:
    camera = CameraConfig(f"camera-{next(_numbers)}", url, interval_s=interval_s)
    return (frame.pixels for frame in live_frames(camera, stop, counters))


WAYS: dict[str, Callable[[str, threading.Event, Counters, float], Iterator[NDArray[Any]]]] = {
    "all_converted": lambda url, stop, counters, _: _in_this_process(url, stop, counters, 0.0),
    "due_converted": _in_this_process,
    "own_process": _as_a_board_does,
}


# ---- the camera ----

STREAMS = {"mjpeg": "camera.mjpg", "video": "camera.mkv"}
BOARDS: dict[str, dict[str, dict[str, Any]]] = {  # further keys of the cameras, by way and kind of stream
    "mjpeg": {"board": {}},
    "video": {"board": {}, "key_frames_board": {"key_frames": True}},
}


def write_streams(folder: Path, pictures: Sequence[NDArray[np.uint8]], count: int, moves: bool = True) -> None:
    """The bytes of both streams, `count` frames each: a section of a photo. It moves, as from a camera that turns, or
    it has noise only.
    """
    large = cv2.resize(pictures[0], (SIZE[0] + 8 * VIEWS, SIZE[1]), interpolation=cv2.INTER_CUBIC)
    sections = (large[:, 8 * number * moves :][:, : SIZE[0]] for number in range(VIEWS))
    views = [cv2.cvtColor(np.ascontiguousarray(section), cv2.COLOR_RGB2BGR) for section in sections]
    if not moves:
        rng = np.random.default_rng(0)
        views = [np.clip(view + rng.normal(0, NOISE, view.shape), 0, 255).astype(np.uint8) for view in views]
    fourcc = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(folder / STREAMS["video"]), fourcc, FPS, SIZE)
    for view in islice(cycle(views), count):
        writer.write(view)
    writer.release()
    with (folder / STREAMS["mjpeg"]).open("wb") as file:
        for view in islice(cycle(views), count):
            data = cv2.imencode(".jpg", view, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
            head = b"--%s\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % (BOUNDARY, len(data))
            file.write(head + data + b"\r\n")


@contextmanager
def served(stream: Path, count: int, sent: int | None = None) -> Iterator[str]:
    """The address of a process that serves the stream at its own rate.

    count: its frames. sent: after so many of them it sends nothing more, and keeps the connection; None: it sends all.
    """
    command = [*COMMAND, "serve", str(stream), str(count), str(count if sent is None else sent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/{stream.name}"
        process.terminate()


def _serve(stream: Path, count: int, sent: int) -> None:
    """Sends each connection the stream, a frame's share of its bytes at a time; prints the port."""
    data, is_video = stream.read_bytes(), stream.suffix == ".mkv"
    kind = "video/x-matroska" if is_video else f"multipart/x-mixed-replace; boundary={BOUNDARY.decode()}"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            started, size = time.monotonic(), len(data) // count
            for number in range(sent):
                time.sleep(max(0.0, started + number / FPS - time.monotonic()))
                try:
                    self.wfile.write(data[number * size : (number + 1) * size])
                except OSError:
                    return
            if sent < count:
                threading.Event().wait()

        def log_message(self, format: str, *args: object) -> None:
            pass

    ThreadingHTTPServer.daemon_threads = True
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    ended: queue.Queue[object] = queue.Queue()
    threading.Thread(target=lambda: ended.put(sys.stdin.read()), daemon=True).start()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ended.get()  # the benchmark has ended


if __name__ == "__main__":
    what, place, *numbers = sys.argv[1:]
    if what == "serve":
        _serve(Path(place), int(numbers[0]), int(numbers[1]))
    else:
        print(json.dumps(_read(what, place, float(numbers[0]), float(numbers[1]), int(numbers[2]))))
