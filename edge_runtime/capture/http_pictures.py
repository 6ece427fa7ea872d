"""Cameras that send JPEGs over HTTP: one per request (a snapshot address), or an endless answer of many (MJPEG).

The content type of the answer decides which it is, unless the user says that it is a snapshot address. Any other video
is left to OpenCV. Every wait, every size and the number of redirects have a bound.
"""

import http.client
import re
import socket
import ssl
import threading
import time
from contextlib import suppress
from urllib.parse import SplitResult, urljoin, urlsplit

from edge_runtime.capture.diagnosis import in_words, status_in_words
from edge_runtime.capture.frame import CameraError, Counters, NewestFrame, arrived, stalled
from edge_runtime.capture.jpeg_stream import JpegStream
from edge_runtime.capture.login import authorization, login_of, same_server, with_login
from edge_runtime.config import CameraConfig
from edge_runtime.config.camera_source import HTTP, PLACEHOLDERS
from edge_runtime.logs import printable
from edge_runtime.picture_checks import MAX_PICTURE_BYTES, starts_as_picture

ANSWER_S = 5.0  # for a connection, and for each part of the answer's headers
MAX_REDIRECTS = 3
MIN_POLL_S = 0.1  # between two requests for a snapshot, even without an interval
CHUNK_BYTES = 1 << 16
PAGES = ("text/html", "application/xhtml+xml")  # content types
NOT_PICTURES = ("text/", "application/json", "application/xml", *PAGES)
# How pages begin: most of the tags in the WHATWG's "MIME Sniffing", section 7.1, and the first line of XHTML.
PAGE_START = re.compile(
    rb"(?i)(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype\s+html|html|head|title|body|script)\b"
)
PAGE_START_BYTES, PAGE_START_S = 64, 2.0  # after blanks; enough to recognise a page


class HttpPictures:
    """One try to read such a camera; see live.Capture."""

    def __init__(self, camera: CameraConfig, counters: Counters) -> None:
        self._camera, self._counters = camera, counters
        self._socket: socket.socket | None = None
        self._abandoned = threading.Event()
        self._unchanged_if: dict[str, str] = {}  # headers that ask for a picture only if it is a new one

    def hang_up(self) -> None:
        """Ends a wait for the camera. Only the look-up of its name cannot be ended."""
        if connection := self._socket:
            with suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)

    def run(self, slot: NewestFrame, abandoned: threading.Event) -> bool:
        """False if the answer is neither a picture nor MJPEG. Raises CameraError with the reason."""
        self._abandoned = abandoned
        try:
            asked = time.monotonic()
            with self._get() as answer:
                kind = _content_type(answer)
                if kind.startswith("multipart/") and not self._camera.snapshot:
                    self._read_stream(answer, slot)
                    return True
                if not (self._camera.snapshot or kind.startswith(("image/", *NOT_PICTURES))):
                    _refuse_page(kind, self._first_bytes(answer))
                    return False
                answered = time.monotonic()  # the picture is no newer than this, however long it takes to arrive
                picture = self._read_picture(answer, asked)
            self._poll(slot, picture, asked, answered)
            return True
        except TimeoutError as error:
            raise CameraError(f"cannot be opened: no answer within {ANSWER_S:g} s: is the camera on?") from error
        except http.client.InvalidURL as error:  # its text shows the address, which may contain a password
            raise CameraError("cannot be opened: its address contains a space or a control character") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, CameraError):
                raise
            raise CameraError(f"cannot be opened: {in_words(error)}") from error

    # ---- pictures ----

    def _read_stream(self, answer: http.client.HTTPResponse, slot: NewestFrame) -> None:
        stall_s, stream = self._camera.stall_s, JpegStream()
        self._wait_at_most(stall_s)
        silent_at = time.monotonic() + stall_s
        try:
            while not self._abandoned.is_set() and (data := answer.read1(CHUNK_BYTES)):
                for picture in stream.feed(data):
                    slot.put(arrived(self._camera.name, picture))
                    silent_at = time.monotonic() + stall_s
                if time.monotonic() > silent_at:  # bytes come, and no picture
                    raise stalled(stall_s)
        except TimeoutError:
            raise stalled(stall_s) from None

    def _poll(self, slot: NewestFrame, first: bytes, asked: float, answered: float) -> None:
        """Asks for a picture whenever one is due. One that has not changed is skipped."""
        last = b""
        picture: bytes | None = first
        while True:
            pause_s = max(self._camera.min_interval_s, MIN_POLL_S)
            if picture is None or picture == last:
                self._counters.skipped += 1
            elif slot.put(arrived(self._camera.name, picture, answered)):
                last = picture
            else:  # too early, so it has still to be answered
                self._unchanged_if, pause_s = {}, MIN_POLL_S
            if not self._wait_until_due(slot, asked + pause_s):
                return
            asked = time.monotonic()
            with self._get() as answer:
                answered = time.monotonic()
                picture = None if answer.status == http.client.NOT_MODIFIED else self._read_picture(answer, asked)

    def _wait_until_due(self, slot: NewestFrame, following: float) -> bool:
        """Waits until this time, and until a frame is due. False: the camera is closed."""
        # `due` moves when the last frame is taken, which may be while this waits.
        while (left := max(following, slot.due) - time.monotonic()) > 0:
            slot.quiet_until(time.monotonic() + left + ANSWER_S)
            if self._abandoned.wait(left):
                return False
        return True

    def _read_picture(self, answer: http.client.HTTPResponse, asked: float) -> bytes:
        """A whole answer. Raises CameraError if it is a page or another text.

        With `snapshot` its type may be wrong, so that its first bytes decide.
        """
        kind, stall_s, data = _content_type(answer), self._camera.stall_s, bytearray()
        if kind.startswith(NOT_PICTURES) and not self._camera.snapshot:
            raise _no_picture(kind, is_page=kind in PAGES)
        self._wait_at_most(stall_s)
        too_slow = f"does not complete its picture within {stall_s:g} s: let it send a smaller one, or raise stall_s"
        try:
            while chunk := answer.read1(CHUNK_BYTES):
                data += chunk
                if len(data) > MAX_PICTURE_BYTES:
                    raise CameraError(
                        f"sends a picture of more than {MAX_PICTURE_BYTES} bytes: is it an endless answer?"
                    )
                if time.monotonic() - asked > ANSWER_S + stall_s:
                    raise CameraError(too_slow)
        except TimeoutError:
            raise CameraError(too_slow) from None
        if not data or answer.length:  # fewer bytes than it said
            raise CameraError("hangs up in the middle of a picture")
        picture = bytes(data)
        _refuse_page(kind, picture)
        if kind.startswith(NOT_PICTURES) and not starts_as_picture(picture):
            raise _no_picture(kind, is_page=kind in PAGES)
        unchanged = {
            "If-None-Match": answer.headers.get("ETag"),
            "If-Modified-Since": answer.headers.get("Last-Modified"),
        }
        # Folded and foreign ones could not be sent back.
        self._unchanged_if = {k: v for k, v in unchanged.items() if v and v.isascii() and v.isprintable()}
        return picture

    def _first_bytes(self, answer: http.client.HTTPResponse) -> bytes:
        """Enough to recognise a page; less if the camera sends less within PAGE_START_S."""
        data, until = b"", time.monotonic() + PAGE_START_S
        with suppress(OSError, http.client.HTTPException):  # OpenCV asks again, and says what is wrong
            while len(data.lstrip()) < PAGE_START_BYTES and len(data) < CHUNK_BYTES:
                self._wait_at_most(max(0.01, until - time.monotonic()))
                if time.monotonic() > until or not (more := answer.read1(CHUNK_BYTES)):
                    break
                data += more
        return data

    # ---- requests ----

    def _get(self) -> http.client.HTTPResponse:
        """The answer 200 or 304, after redirects and with the login if the camera asks for it."""
        source, login = self._camera.source, login_of(self._camera)
        if any(placeholder in source for placeholder in PLACEHOLDERS):
            source, login = with_login(source, login), None
        address = source
        for _ in range(1 + MAX_REDIRECTS):
            answer = self._ask(urlsplit(address), {})
            if answer.status == http.client.UNAUTHORIZED and login and same_server(source, address):
                answer.close()
                parts = urlsplit(address)
                header = authorization(login, answer.headers, "GET", _target(parts))
                answer = self._ask(parts, {"Authorization": header})
            if answer.status in (http.client.OK, http.client.NOT_MODIFIED):
                return answer
            answer.close()
            location = answer.headers.get("Location")
            if not (300 <= answer.status < 400 and location):
                raise CameraError(f"cannot be opened: {status_in_words(answer.status, printable(answer.reason))}")
            address = urljoin(address, location)
            if urlsplit(address).scheme not in HTTP:
                raise CameraError("cannot be opened: the camera redirects to an address that is not HTTP")
        raise CameraError(
            f"cannot be opened: the camera redirects more than {MAX_REDIRECTS} times: use its last address"
        )

    def _ask(self, parts: SplitResult, headers: dict[str, str]) -> http.client.HTTPResponse:
        if not parts.hostname:
            raise ValueError("its address has no host")
        if parts.scheme == "https":
            # Most cameras sign their certificates themselves. FFmpeg does not check them either.
            context = ssl._create_unverified_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=ANSWER_S, context=context
            )
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=ANSWER_S)
        try:
            connection.connect()
            self._socket = connection.sock
            if self._abandoned.is_set():  # between the look-up and now, when hang_up had nothing to end
                raise CameraError("was closed while it was opened")
            headers = {"Accept": "*/*", "Connection": "close"} | self._unchanged_if | headers
            connection.request("GET", _target(parts), headers=headers)
            return connection.getresponse()  # which closes the connection when it is closed itself
        except BaseException:
            connection.close()
            raise

    def _wait_at_most(self, seconds: float) -> None:
        if self._socket:
            self._socket.settimeout(seconds)


def _content_type(answer: http.client.HTTPResponse) -> str:
    """Empty if the camera sends none: get_content_type() of the headers would return text/plain."""
    return answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _refuse_page(kind: str, data: bytes) -> None:
    """Raises CameraError for the beginning of a page, whatever its type."""
    if PAGE_START.match(data):
        raise _no_picture(kind, is_page=True)


def _no_picture(kind: str, is_page: bool) -> CameraError:
    kind = printable(kind, 64)
    what = (f"a page ({kind})" if kind else "a page") if is_page else kind
    return CameraError(
        f"the camera answers with {what}, not with a picture: does it want a login, and is the path in its address "
        "right?"
    )


def _target(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
