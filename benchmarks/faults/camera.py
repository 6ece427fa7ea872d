"""A network camera (MJPEG over HTTP) that can disappear, stop sending, or repeat one picture."""

import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle

from testbed.broker import free_port

FPS = 10.0
BOUNDARY = "frame"


class MjpegServer:
    """Serves JPEGs in turn during the `with` block, except while it has a fault: "lost", "stalled" or "frozen"."""

    def __init__(self, photos: Sequence[bytes]) -> None:
        self.opened = 0  # number of connections so far
        self.fault = ""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/camera.mjpg"
        self._photos: Iterator[bytes] = cycle(photos)
        self._gone = threading.Event()

    def fail(self, fault: str) -> None:
        """Has this fault until `heal`. "lost" closes all connections and the port."""
        self.fault = fault
        if fault == "lost":
            self._close()

    def heal(self) -> None:
        if self.fault == "lost":
            self._open()
        self.fault = ""

    def __enter__(self) -> "MjpegServer":
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _open(self) -> None:
        camera, gone = self, threading.Event()

        class Stream(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                camera.opened += 1
                self.send_response(200)
                self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={BOUNDARY}")
                self.end_headers()
                picture = next(camera._photos)
                while not gone.wait(1 / FPS):
                    if camera.fault == "stalled":
                        continue
                    if camera.fault != "frozen":
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

    def _close(self) -> None:
        if not self._gone.is_set():
            self._gone.set()
            self._server.shutdown()
            self._server.server_close()
