"""A web server in place of a network camera: it answers each request as the test says."""

import base64
import hashlib
import queue
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER, PASSWORD, REALM, NONCE = "viewer", "s3cret/@:", "camera", "abc"
BASIC = f'Basic realm="{REALM}"'
DIGEST = f'Digest realm="{REALM}", qop="auth", algorithm=MD5, nonce="{NONCE}"'
Answer = tuple[int, Mapping[str, str], bytes]


class HttpCamera:
    """Open while `with` lasts. `asked` has the requests as they came."""

    def __init__(self, answer: Callable[["Request"], Answer | None]) -> None:
        """answer: on a thread of its own. None: it has written the answer itself, if there is one."""
        self.asked: queue.Queue[Request] = queue.Queue()
        self.closed = threading.Event()
        camera = self

        class Handler(Request):
            def do_GET(self) -> None:
                self.camera = camera
                camera.asked.put(self)
                given = answer(self)
                if given:
                    self.give(*given)

        ThreadingHTTPServer.daemon_threads = True
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/snapshot.jpg?channel=1"

    def __enter__(self) -> "HttpCamera":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Request(BaseHTTPRequestHandler):
    """One request; the base class has `path` and `headers`."""

    camera: HttpCamera

    def give(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):  # the board has hung up
            self.wfile.write(body)

    @property
    def is_authorized(self) -> bool:
        """RFC 7617, and RFC 7616 with qop=auth."""
        given = self.headers.get("Authorization", "")
        if given.startswith("Basic"):
            return given == "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        values = dict(re.findall(r'(\w+)="?([^",]*)"?', given))
        if not {"nonce", "nc", "cnonce", "qop", "uri", "response"} <= values.keys() or values["uri"] != self.path:
            return False
        first, second = (_md5(text) for text in (f"{USER}:{REALM}:{PASSWORD}", f"GET:{self.path}"))
        parts = (first, NONCE, values["nc"], values["cnonce"], values["qop"], second)
        return values["response"] == _md5(":".join(parts))

    def log_message(self, *_: object) -> None:
        pass


def _md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def picture(data: bytes, **headers: str) -> Answer:
    """The usual answer of a snapshot address."""
    return 200, {"Content-Type": "image/jpeg", "Content-Length": str(len(data)), **headers}, data
