"""One POST or GET to another server within bounds of time and bytes, and checks of its address.

Knows nothing of what is asked, of retries and prices.

http.client has a timeout per read only, so a server that sends a byte now and then could hold a call for ever. Hence a
timer, which shuts the connection down when the whole time is up. Each call has a connection of its own: a kept one may
be dead, and then nobody knows whether the request arrived. Redirects are not followed, since the key must not follow.
"""

import http
import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Literal
from urllib.parse import urlsplit

from edge_runtime.errors import AiflowError, ConfigError

CONNECT_S = 5.0  # for TCP and TLS; the system's resolver has a limit of its own
STALL_S = 10.0  # between two parts of a body that has begun
MAX_RESPONSE = 1 << 20  # bytes of a body; a text of 8,192 characters and its envelope have some 20 KB
CHUNK = 64 << 10  # bytes per read

Kind = Literal[
    "no_connection",  # the request was not sent
    "timeout",
    "cut_off",  # the connection ended inside the response, or the response breaks HTTP
    "too_long",
    "rate_limited",
    "server_error",
    "refused",  # any other status but 200
    "no_answer",  # a body that is not what the API promises
    "paused",  # no call was made: an earlier one said to wait
    "over_budget",  # no call was made
    "too_late",  # no call was made: the time that is left is too short for an answer
    "given_up",  # no call was made: enough calls for the same may have been billed
    "stopped",
]
# It gets no better by itself, so another try is in vain.
PERMANENT: frozenset[Kind] = frozenset({"refused", "too_long", "no_answer"})
# Another try of ours may end better.
TEMPORARY: frozenset[Kind] = frozenset({"no_connection", "timeout", "cut_off", "rate_limited", "server_error"})
# The other server may have worked for nothing, and may bill it.
MAY_BE_BILLED: frozenset[Kind] = frozenset({"timeout", "cut_off", "too_long", "no_answer", "stopped"})


def host_of(url: str) -> str | None:
    """The host of an http or https address. None for anything else, also for one with a login, ? or #."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError if it is no number
    except ValueError:
        return None
    is_address = parts.scheme in ("http", "https") and re.fullmatch("[!-~]+", url)
    has_more = "@" in parts.netloc or parts.query or parts.fragment
    return parts.hostname if is_address and not has_more else None


def check_ca_file(path: str | None, owner: str) -> None:
    """owner: whose setting it is, for the message. Raises ConfigError if no certificates can be read from it."""
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:  # ssl.SSLError is an OSError
        raise ConfigError(f"{owner} ca_file = {path}: cannot be read as PEM: {error.strerror or error}") from error


class CallError(AiflowError):
    """A call without an answer. Its text never contains what the other server sent: that may quote the key."""

    def __init__(self, kind: Kind, text: str, retry_after: str | None = None, status: int | None = None) -> None:
        """retry_after: the header of that name, unchecked. status: of the response, if one has arrived."""
        super().__init__(text)
        self.kind, self.retry_after, self.status = kind, retry_after, status


class Endpoint:
    """Where calls go. Any number of threads may call at the same time."""

    def __init__(
        self,
        url: str,
        ca_file: str | None = None,
        remedies: Mapping[int, str] | None = None,
        *,
        checks_certificate: bool = True,
    ) -> None:
        """url: http or https, with a host. ca_file: whose certificates are trusted; None: the system's authorities.
        remedies: what to do about a status, for the message.

        The first two were checked with the configuration.
        """
        parts = urlsplit(url)
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path.rstrip("/")
        self._remedies = remedies or {}
        self._tls = None
        if parts.scheme == "https":
            self._tls = (
                ssl.create_default_context(cafile=ca_file) if checks_certificate else ssl._create_unverified_context()
            )
        self._lock = threading.Lock()  # over the next two
        self._open: set[socket.socket] = set()
        self._is_closed = False

    def post(self, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> bytes:
        """The body of the response to a POST of JSON, if its status is 200. Raises CallError, within timeout_s."""
        return self._call("POST", path, body, {"Content-Type": "application/json", **headers}, timeout_s)

    def get(self, path: str, headers: Mapping[str, str], timeout_s: float) -> bytes:
        """The same for a GET."""
        return self._call("GET", path, None, headers, timeout_s)

    def _call(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float) -> bytes:
        until = time.monotonic() + timeout_s
        connection = self._connect(min(CONNECT_S, timeout_s))
        sock = connection.sock
        timer = threading.Timer(max(0.0, until - time.monotonic()), _shut, (sock,))
        timer.daemon = True
        timer.start()
        try:
            with self._listed(sock):
                # A model may think all the time before it answers.
                sock.settimeout(max(0.001, until - time.monotonic()))
                headers = {"Accept": "application/json", **headers, "Connection": "close"}
                connection.request(method, self._path + path, body, headers)
                with connection.getresponse() as response:
                    _check_status(response, self._remedies)
                    sock.settimeout(max(0.001, min(STALL_S, until - time.monotonic())))
                    received = _read(response)
                if self._is_closed or time.monotonic() >= until:  # it may have been shut down in the middle
                    raise CallError("cut_off", "the response was shut down")
                return received
        except (CallError, OSError, http.client.HTTPException, ValueError) as error:
            # First, since a connection that this side shuts down looks as if it had ended by itself.
            if self._is_closed:
                raise CallError("stopped", "this server stops") from error
            if isinstance(error, TimeoutError) or time.monotonic() >= until:
                raise CallError("timeout", f"no whole response within {timeout_s:.1f} s") from error
            if isinstance(error, CallError):
                raise
            raise CallError("cut_off", f"the response broke off: {type(error).__name__}") from error
        finally:
            timer.cancel()
            connection.close()
            sock.close()

    def close(self) -> None:
        """Ends the calls that are being made, and all later ones, with CallError."""
        with self._lock:
            self._is_closed = True
            for sock in self._open:
                _shut(sock)

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        connection = (
            http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=self._tls)
            if self._tls
            else http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        )
        try:
            connection.connect()
        except (OSError, UnicodeError) as error:  # also of TLS and of the resolver; a name such as "a..b"
            connection.close()
            why = getattr(error, "strerror", None) or error
            raise CallError("no_connection", f"no connection to {self._host}: {why}") from error
        return connection

    @contextmanager
    def _listed(self, sock: socket.socket) -> Iterator[None]:
        """`close` ends this connection too."""
        with self._lock:
            self._open.add(sock)
            if self._is_closed:
                _shut(sock)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(sock)


def _check_status(response: http.client.HTTPResponse, remedies: Mapping[int, str]) -> None:
    """Raises CallError unless it is 200."""
    status = response.status
    if status == http.HTTPStatus.OK:
        return
    said = f"the other server says {status} {http.client.responses.get(status, '')}".strip()
    retry_after = response.getheader("Retry-After")
    if status == http.HTTPStatus.TOO_MANY_REQUESTS:
        raise CallError("rate_limited", said, retry_after, status)
    if status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
        raise CallError("server_error", said, retry_after, status)
    hint = remedies.get(status, "see that server's log")
    raise CallError("refused", f"{said}: {hint}", status=status)


def _read(response: http.client.HTTPResponse) -> bytes:
    """The body, if all of it came. Raises CallError, OSError and HTTPException."""
    body, chunk = bytearray(), memoryview(bytearray(CHUNK))
    # Not read(): it trusts the lengths that the other server states.
    while count := response.readinto(chunk):
        body += chunk[:count]
        if len(body) > MAX_RESPONSE:
            raise CallError("too_long", f"a response of more than {MAX_RESPONSE} bytes: is the address right?")
    if not body:  # a header that breaks off looks like one that ends
        raise CallError("cut_off", "the response has no body")
    if response.length:  # what is missing of its Content-Length
        raise CallError("cut_off", f"the response is {response.length} bytes shorter than it claims")
    return bytes(body)


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):  # it may have ended by itself
        sock.shutdown(socket.SHUT_RDWR)
