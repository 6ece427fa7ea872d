"""A network camera (MJPEG over HTTP) that can disappear, stop sending, or repeat one picture."""

import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle

from testbed.broker import free_port

FPS = 10.0
BOUNDARY = "frame"


class MjpegServer:
    """Serves JPEGs in turn during the `with` block, except between `close` and `open`."""

    def __init__(self, photos: Sequence[bytes]) -> None:
        self.stalls, self.repeats = threading.Event(), threading.Event()
        self.opened = 0  # number of connections so far
        self.port = free_port()
        self._photos: Iterator[bytes] = cycle(photos)
        self._gone = threading.Event()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/camera.mjpg"

    def open(self) -> None:
        camera, gone = self, threading.Event()

        class Stream(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                camera.opened += 1
                self.send_response(200)
                self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={BOUNDARY}")
                self.end_headers()
                picture = next(camera._photos)
                while not gone.wait(1 / FPS):
                    if camera.stalls.is_set():
                        continue
                    if not camera.repeats.is_set():
                        picture = next(camera._photos)
                    head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                    try:
                        self.wfile.write(head.encode() + picture + b"\r\n")
                    except OSError:
                        return

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._gone = gone
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Stream)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="camera", daemon=True).start()

    def close(self) -> None:
        """Closes all connections and the port."""
        self._gone.set()
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> "MjpegServer":
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
