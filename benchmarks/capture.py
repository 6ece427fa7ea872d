"""What a live camera costs a board in CPU time: all frames converted, against only those that are due.

The camera is a process of its own, which serves frames of 1920 x 1080 pixels over HTTP: as MJPEG, and as a video that
OpenCV decodes (MPEG-4, as its wheels cannot encode H.264). Both ways read it for the same time, one after the other.
"""

import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_runtime.capture import Counters
from edge_runtime.capture.live import live_frames
from edge_runtime.config import CameraConfig
from edge_runtime.shutdown import threads_in_driver

SIZE = 1920, 1080
FPS = 15
VIEWS = 30  # different frames, which repeat
SPARE_S = 15.0  # of the streams, for opening them
BOUNDARY = b"frame"


def run(pictures: Sequence[NDArray[np.uint8]], interval_s: float, seconds: float) -> dict[str, Any]:
    """Figures by kind of stream. pictures: uint8 RGB [H, W, 3]. interval_s: of the frames that are due."""
    cv2.setNumThreads(1)  # as the runtime does
    with tempfile.TemporaryDirectory() as folder:
        count = round(FPS * (seconds + SPARE_S))
        _write_streams(Path(folder), pictures, count)
        return {
            "interval_s": interval_s,
            **{kind: _compare(Path(folder) / name, count, interval_s, seconds) for kind, name in STREAMS.items()},
        }


def _compare(stream: Path, count: int, interval_s: float, seconds: float) -> dict[str, float]:
    """CPU milliseconds per frame of the stream, and their ratio."""
    with _served(stream, count) as url:
        converted, counters = Counters(), Counters()
        every_ms = _cpu_ms(lambda stop: _every_frame(url, stop, converted), seconds) / converted.frames
        camera = CameraConfig("bench", url, interval_s=interval_s)
        due_ms = _cpu_ms(lambda stop: live_frames(camera, stop, counters), seconds) / (counters.skipped + 1)
    ratio = round(due_ms / every_ms, 3)
    return {"all_converted_ms": round(every_ms, 2), "due_converted_ms": round(due_ms, 2), "ratio": ratio}


def _every_frame(url: str, stop: threading.Event, counters: Counters) -> Iterator[object]:
    """Decodes and converts each frame."""
    capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG)
    while not stop.is_set():
        ok, pixels = capture.read()
        assert ok, "the stream has ended"
        counters.frames += 1
        yield cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    capture.release()


def _cpu_ms(read: Callable[[threading.Event], Iterator[object]], seconds: float) -> float:
    """CPU time of this process, from the first frame on."""
    stop = threading.Event()
    frames = read(stop)
    next(frames)
    timer = threading.Timer(seconds, stop.set)
    started = time.process_time()
    timer.start()
    for _ in frames:
        pass
    cpu_ms = 1e3 * (time.process_time() - started)
    for thread in threads_in_driver():
        thread.join()
    return cpu_ms


# ---- the camera ----

STREAMS = {"mjpeg": "camera.mjpg", "video": "camera.mkv"}


def _write_streams(folder: Path, pictures: Sequence[NDArray[np.uint8]], count: int) -> None:
    """The bytes of both streams, `count` frames each: a moving section of a photo, as from a camera that turns."""
    large = cv2.resize(pictures[0], (SIZE[0] + 8 * VIEWS, SIZE[1]), interpolation=cv2.INTER_CUBIC)
    sections = (large[:, 8 * number :][:, : SIZE[0]] for number in range(VIEWS))
    views = [cv2.cvtColor(np.ascontiguousarray(section), cv2.COLOR_RGB2BGR) for section in sections]
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
def _served(stream: Path, count: int) -> Iterator[str]:
    """The address of a process that serves the stream at its own rate."""
    command = [sys.executable, "-m", "benchmarks.capture", str(stream), str(count)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=root, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/{stream.name}"
        process.terminate()


def _serve(stream: Path, count: int) -> None:
    """Sends each connection the stream, a frame's share of its bytes at a time; prints the port."""
    data, is_video = stream.read_bytes(), stream.suffix == ".mkv"
    kind = "video/x-matroska" if is_video else f"multipart/x-mixed-replace; boundary={BOUNDARY.decode()}"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            started, size = time.monotonic(), len(data) // count
            for number in range(count):
                time.sleep(max(0.0, started + number / FPS - time.monotonic()))
                try:
                    self.wfile.write(data[number * size :][:size])
                except OSError:
                    return

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
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
