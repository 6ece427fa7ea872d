"""The page's HTTP server: files of the page, updates as server-sent events, search, pictures. It only reads the site.

On loopback it answers no other host name: a page elsewhere could point its own name here (DNS rebinding). With a token
it asks for a login, and any name may lead here, such as that of a proxy. Every answer forbids the browser to load, to
run or to frame anything else. docs/ui-openapi.json describes the answers.
"""

import hmac
import logging
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from edge_runtime.errors import AiflowError
from edge_runtime.logs import is_told
from firmware_tools.ui.history import FOUND, History, SearchError
from firmware_tools.ui.live import MAX_BROWSERS, FullError, Live
from firmware_tools.ui.meaning import Meaning, NoModelError
from firmware_tools.ui.rows import Answers, Error

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = MAX_BROWSERS + 32  # each has a thread
TIMEOUT_S = 10.0  # of a read, and of a write to a browser that does not read
HTTP_PORT = 80
MAX_FORM = 4096  # bytes
MAX_AGE_S = 30 * 86_400  # of a login, if this process runs so long
COOKIE = "aiflow"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/login": ("login.html", "text/html"),
}
PUBLIC = ("/login", "/page.css", "/icon.svg")
PICTURE = re.compile(r"/api/picture/([a-z0-9-]{1,32})/([A-Za-z0-9_-]{1,32})")
# Of a search. Its texts may be anything.
PARAMETERS = {"board": r"[a-z0-9-]{1,32}", "before": r"[0-9]{1,16}", "by": "words|meaning"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class WebServer(ThreadingHTTPServer):
    """`with` opens and closes its socket; `serve_forever` serves until `shutdown`, on another thread."""

    daemon_threads = True  # one that waits for a browser ends with the process
    block_on_close = False
    request_queue_size = MAX_CONNECTIONS

    def __init__(
        self, address: tuple[str, int], live: Live, history: History, meaning: Meaning, token: str | None = None
    ) -> None:
        """token: for the login; None: no login. Raises OSError if the address cannot be used."""
        self.live, self.history, self.meaning, self.token = live, history, meaning, token
        self.session = secrets.token_urlsafe(32)  # the cookie's value; everybody's is the same
        folder = files(__package__).joinpath("page")
        self.files = {path: folder.joinpath(name).read_bytes() for path, (name, _) in PAGE_FILES.items()}
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._refused = 0
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    @property
    def hosts(self) -> set[str]:
        """The page's host name in a browser on this machine. It leaves out port 80."""
        ports = (f":{self.server_port}", "") if self.server_port == HTTP_PORT else (f":{self.server_port}",)
        return {name + port for name in ("localhost", "127.0.0.1", "[::1]", self.host) for port in ports}

    @property
    def host(self) -> str:
        """The address that it listens on, as part of a URL."""
        address = str(self.server_address[0])
        return f"[{address}]" if ":" in address else address

    def verify_request(self, *_: object) -> bool:
        if self._free.acquire(blocking=False):
            return True
        self._refused += 1
        if is_told(self._refused):
            logger.warning("connections refused, too many are open count=%d", self._refused)
        return False

    def process_request(self, *request: Any) -> None:
        try:
            super().process_request(*request)
        except BaseException:  # there is no thread to be had at present
            self._free.release()
            raise

    def process_request_thread(self, *request: Any) -> None:
        try:
            super().process_request_thread(*request)
        finally:
            self._free.release()

    def handle_error(self, *_: object) -> None:
        is_browsers = isinstance(sys.exc_info()[1], OSError)  # it has closed the connection
        logger.log(logging.DEBUG if is_browsers else logging.ERROR, "request broke", exc_info=True)


class RefusedError(AiflowError):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    """One request of one connection."""

    server: WebServer
    timeout = TIMEOUT_S
    server_version, sys_version = "aiflow", ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, method: Callable[[str, str], None]) -> None:
        try:
            url = urlsplit(self.path)
            self._check_origin(url.path)
            method(url.path, url.query)
        except RefusedError as refused:
            self.send_error(refused.status, str(refused))
        except ValueError as error:  # of the address or the query
            self.send_error(400, f"not a request that can be read: {error}")

    def _check_origin(self, path: str) -> None:
        """Raises RefusedError if another site's page has sent the browser here."""
        if self.server.token is None and self.headers.get("Host", "") not in self.server.hosts:
            address = f"http://{self.server.host}:{self.server.server_port}/"
            raise RefusedError(403, f"this host name is not known: open {address}")
        if path.startswith("/api/") and self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise RefusedError(403, "another site's page asks for this: open the page itself")

    def _get(self, path: str, query: str) -> None:
        if path not in PUBLIC and not self._is_logged_in():
            if path != "/":
                raise RefusedError(401, "log in first, on /login")
            self._redirect("/login")
        elif path in PAGE_FILES:
            self._send(200, self.server.files[path], f"{PAGE_FILES[path][1]}; charset=utf-8")
        elif path == "/api/updates":
            self._send_updates()
        elif path == "/api/search":
            self._search(
                {
                    name: values[-1]
                    for name, values in parse_qs(query, keep_blank_values=True, max_num_fields=16).items()
                }
            )
        elif picture := PICTURE.fullmatch(unquote(path)):
            if (data := self.server.live.picture(*picture.groups())) is None:
                raise RefusedError(404, "no picture of this camera has come")
            self._send(200, data, "image/jpeg")
        else:
            raise RefusedError(404, "there is no such page")

    def _search(self, query: Mapping[str, str]) -> None:
        for name, pattern in PARAMETERS.items():
            if name in query and not re.fullmatch(pattern, query[name]):
                raise RefusedError(400, f"{name}={query[name][:64]}, want {pattern}")
        words, label, board = (query.get(name, "") for name in ("q", "label", "board"))
        is_by_meaning = query.get("by") == "meaning" and bool(words.strip())
        try:
            if is_by_meaning:
                found = self.server.meaning.search(words, label, board)
            else:
                found = self.server.history.search(words, label, board, int(query.get("before", 2**53)))
        except SearchError as error:
            raise RefusedError(404 if isinstance(error, NoModelError) else 400, str(error)) from error
        self._send_json(200, Answers(found, len(found) == FOUND and not is_by_meaning))

    def _send_updates(self) -> None:
        try:
            with self.server.live.updates() as next_update:
                self._begin(200, {"Content-Type": "text/event-stream"})
                while (update := next_update()) is not None:
                    self.wfile.write(b"data: " + update + b"\n\n")
        except FullError as error:
            raise RefusedError(503, str(error)) from error
        except TimeoutError:  # the browser connects again, and then gets everything
            logger.info("browser disconnected, it did not read for %.0f s", TIMEOUT_S)

    def _post(self, path: str, _: str) -> None:
        """The login, which is all that is posted."""
        if path != "/login":
            raise RefusedError(405, "want GET")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_FORM:
            raise RefusedError(413, f"want a form of at most {MAX_FORM} bytes, with its Content-Length")
        form = parse_qs(self.rfile.read(int(length)).decode(errors="replace"))
        given = form.get("token", [""])[0]
        if self.server.token is None or not hmac.compare_digest(given.encode(), self.server.token.encode()):
            self._redirect("/login#wrong")
            return
        attributes = f"HttpOnly; SameSite=Strict; Path=/; Max-Age={MAX_AGE_S}"
        self._redirect("/", {"Set-Cookie": f"{COOKIE}={self.server.session}; {attributes}"})

    def _is_logged_in(self) -> bool:
        if self.server.token is None:
            return True
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self.server.session.encode())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Also called by the base class, for requests that it cannot read."""
        if code == 501:  # a method without a function here
            code, message = 405, "want GET"
        self._send_json(code, Error(message or explain or "refused"), {"Allow": "GET"} if code == 405 else {})

    def log_message(self, *_: object) -> None:
        """Nothing: each picture would be a line."""

    def _redirect(self, to: str, headers: Mapping[str, str] | None = None) -> None:
        self._begin(303, {"Location": to, "Content-Length": "0", **(headers or {})})

    def _send_json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, msgspec.json.encode(value), "application/json", headers)

    def _send(self, status: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self._begin(status, {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in (HEADERS | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
