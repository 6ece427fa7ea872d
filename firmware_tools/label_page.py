"""A page on this machine that shows frames one by one, with a button per class, and copies them into class folders.

Only this machine can reach it: it listens on loopback, answers no other host name (a page elsewhere could point its own
name here), and takes only forms that it made itself. Nothing is loaded from anywhere else.
"""

import base64
import logging
import re
import secrets
import shutil
from collections.abc import Sequence
from html import escape
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from edge_runtime.capture.picture_files import SUFFIXES
from edge_runtime.logs import printable
from edge_runtime.picture_checks import PictureError, decode_picture
from testbed.sample_photos import shrunk_jpeg

logger = logging.getLogger(__name__)

MAX_FORM = 64 * 1024  # bytes
TIMEOUT_S = 5.0  # of a read: a browser opens connections that it does not use
SHOWN_PIXELS = 960
# In names of copies: hyphens beside others or at an end, control characters, bytes that are not UTF-8, and %.
ESCAPED = re.compile(r"-(?=-)|^-|-\Z|[%\x00-\x1f\x7f\udc80-\udcff]")
STYLE = """
:root{color-scheme:light dark}
body{font:18px/1.4 system-ui,sans-serif;max-width:62rem;margin:auto;padding:1rem;text-align:center}
img{max-width:100%;max-height:70vh;border-radius:.5rem}
button{font:inherit;padding:.6rem 1.4rem;margin:.3rem;border-radius:.5rem;border:1px solid #8888}
small{opacity:.75}
"""


class Labels:
    """The frames below a folder that are in no class folder of `out` yet, in the order of their names."""

    def __init__(self, frames: Path, classes: Sequence[str], out: Path) -> None:
        """Raises PictureError if there is no frame."""
        self.frames, self.classes, self.out = frames, tuple(classes), out
        found = sorted(path for path in frames.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise PictureError(
                f"{frames} holds no picture ({', '.join(SUFFIXES)}): name the folder of a camera's frames"
            )
        self.left = [path for path in found if not any((out / name / self._name(path)).exists() for name in classes)]

    def show(self) -> bytes | None:
        """The next frame as a JPEG; None: all are done. Frames that cannot be read are left out."""
        while self.left and (picture := _shown(self.left[0])) is None:
            self.left.pop(0)
        return picture if self.left else None

    def put(self, name: str, label: str) -> None:
        """What the user says of the frame of this name. Anything else than one of the classes skips it."""
        if not self.left or name != self._name(self.left[0]):
            return  # a second click, or a page that was left open
        path = self.left.pop(0)
        if label in self.classes:
            (self.out / label).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, self.out / label / name)

    @property
    def name(self) -> str:
        return self._name(self.left[0])

    def _name(self, path: Path) -> str:
        """A name of the frame alone, from its path below the folder: 2024-05-01/7.jpg is 2024-05-01--7.jpg.

        So that no other path has the same, parts with hyphens that could be taken for those between parts have them as
        %2D. Characters that a form of a page does not bring back as they were are written in the same way.
        """
        parts = path.relative_to(self.frames).parts
        return "--".join(ESCAPED.sub(lambda found: f"%{ord(found[0]) & 0xFF:02X}", part) for part in parts)


def _shown(path: Path) -> bytes | None:
    try:
        return shrunk_jpeg(decode_picture(path.read_bytes()), SHOWN_PIXELS, 85)
    except (PictureError, OSError) as error:
        logger.warning("frame left out name=%s error=%s", printable(str(path)), printable(str(error)))
        return None


class LabelServer(HTTPServer):
    """Serves the page until `is_done`."""

    timeout = 0.5  # seconds after which it looks at `is_done` again, without a request

    def __init__(self, labels: Labels) -> None:
        self.labels, self.token, self.is_done = labels, secrets.token_urlsafe(16), False
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def serve_until_done(self) -> None:
        while not self.is_done:
            self.handle_request()

    def page(self) -> bytes:
        """Of the next frame; after the last one, the page says so, and the server ends."""
        picture = self.labels.show()
        if picture is None:
            self.is_done = True
            body = "<h1>All frames are sorted.</h1><p>You may close this page.</p>"
        else:
            data = base64.b64encode(picture).decode()
            buttons = "".join(
                f'<button name="class" value="{escape(label)}">{escape(label)}</button>'
                for label in self.labels.classes
            )
            name = escape(self.labels.name)
            body = (
                f'<form method="post"><p><img alt="{name}" src="data:image/jpeg;base64,{data}"></p><p>{buttons}'
                '<button name="class" value="">skip</button> <button name="end" value="1">end</button></p>'
                f'<input type="hidden" name="token" value="{self.token}">'
                f'<input type="hidden" name="name" value="{name}">'
                f"</form><p><small>{name}, {len(self.labels.left)} left</small></p>"
            )
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Sort frames</title>'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<style>{STYLE}</style></head><body>{body}</body></html>"
        ).encode()


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        if self._is_ours():
            self._send(200, self.server.page())

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not self._is_ours():
            return
        if not length.isdecimal() or int(length) > MAX_FORM:
            self.send_error(413)
            return
        form = parse_qs(self.rfile.read(int(length)).decode(errors="replace"))
        values = {key: found[0] for key, found in form.items()}
        if not secrets.compare_digest(values.get("token", "").encode(), self.server.token.encode()):
            self.send_error(403)
            return
        if "end" in values:
            self.server.is_done = True
            self._send(200, b"<!doctype html><p>Ended. You may close this page.</p>")
            return
        self.server.labels.put(values.get("name", ""), values.get("class", ""))
        self.send_response(303)
        self.send_header("Location", "/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing: each click would be a line."""

    def _is_ours(self) -> bool:
        """Whether the browser means this page. Otherwise the answer is sent."""
        is_ours = self.headers.get("Host") == self.server.address[7:-1] and self.path == "/"
        if not is_ours:
            self.send_error(404)
        return is_ours

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'",
        )
        self.end_headers()
        self.wfile.write(body)
