"""What the tests of this room share: pictures of one shade, and a network camera that shows what a test tells it."""

import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from edge_runtime.capture import Frame
from tests.listener import PATIENCE_S

T = TypeVar("T")


def grey(shade: int, size: int = 16) -> np.ndarray:
    return np.full((size, size, 3), shade, np.uint8)


def jpeg(shade: int) -> bytes:
    return cv2.imencode(".jpg", grey(shade))[1].tobytes()


def large_jpeg(shade: int) -> bytes:
    """16 KB: FFmpeg looks for a picture's end 2 KB at a time."""
    noise = np.random.default_rng(shade).integers(-10, 10, (160, 160, 3))
    return cv2.imencode(
        ".jpg", (grey(shade, 160) + noise).clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 95]
    )[1].tobytes()


def shade_of(frame: Frame) -> int:
    """The nearest multiple of ten: JPEG and video are not exact."""
    return round(float(frame.pixels.mean()) / 10) * 10


def write_photos(folder: Path, *shades: int) -> str:
    folder.mkdir()
    for number, shade in enumerate(shades):
        (folder / f"{number}.jpg").write_bytes(jpeg(shade))
    return str(folder)


class MjpegCamera:
    """A network camera: each connection gets the pictures that the test shows it, and hangs in between."""

    def __init__(self, says_length: bool = True) -> None:
        self.connections: queue.Queue[MjpegCamera.Connection] = queue.Queue()
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                connection = MjpegCamera.Connection()
                camera.connections.put(connection)
                while (picture := connection.pictures.get()) is not None:
                    length = b"Content-Length: %d\r\n" % len(picture) if says_length else b""
                    head = b"--frame\r\nContent-Type: image/jpeg\r\n" + length + b"\r\n"
                    try:
                        self.wfile.write(head + picture + b"\r\n")
                    except OSError:  # the board went away
                        connection.hung_up.set()
                        return

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.url = f"http://127.0.0.1:{self.server.server_port}/video.mjpg"
        self.all: list[MjpegCamera.Connection] = []

    class Connection:
        def __init__(self) -> None:
            self.pictures: queue.Queue[bytes | None] = queue.Queue()
            self.hung_up = threading.Event()

        def show(self, *shades: int) -> None:
            for shade in shades:
                self.pictures.put(jpeg(shade))

    def connection(self) -> "MjpegCamera.Connection":
        self.all.append(self.connections.get(timeout=PATIENCE_S))
        return self.all[-1]

    def __enter__(self) -> "MjpegCamera":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        while not self.connections.empty():
            self.connection()
        for connection in self.all:
            connection.pictures.put(None)
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def in_background(frames: Iterator[T]) -> "queue.Queue[T]":
    """Takes frames, or what is made of them, as they come."""
    taken: queue.Queue[T] = queue.Queue()
    threading.Thread(target=lambda: [taken.put(frame) for frame in frames], daemon=True).start()
    return taken
