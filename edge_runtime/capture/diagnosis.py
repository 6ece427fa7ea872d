"""Why a source cannot be opened. OpenCV does not say, so this asks the source itself, once, with bounded waits."""

import http.client
import os
import socket
import ssl
from urllib.parse import SplitResult, unquote, urlsplit

from edge_runtime.capture.login import Login, authorization

DIAGNOSIS_S = 3.0  # for each wait of the network
MAX_STATUS_BYTES = 256
PORTS = {"http": 80, "https": 443, "mms": 1755, "rtmp": 1935, "rtmps": 443, "rtsp": 554, "rtsps": 322, "tcp": 0}
WORDS: dict[type[Exception], str] = {
    FileNotFoundError: "it does not exist: is it plugged in or mounted, and is the path right?",
    PermissionError: "permission denied: let this user read it; for a camera, add the user to the group video",
    TimeoutError: f"no answer within {DIAGNOSIS_S:g} s: is the camera on, and is the address right?",
    ConnectionRefusedError: "connection refused: is the camera on, and is the port right?",
    ConnectionError: "it closed the connection: are protocol and port of the address right?",
    http.client.BadStatusLine: "its answer is not HTTP: are protocol and port of the address right?",
}
HINTS = {  # by status code of HTTP and RTSP
    400: "the address may be wrong",
    401: "check username and password_file",
    403: "check username and password_file",
    404: "check the path in its address",
    454: "check the path in its address",
}


def why_not_opened(source: str) -> str:
    """The reason in words, for a log line, for a source that OpenCV could not open. Takes some seconds at most.

    Never contains the source's address, which may contain a password.
    """
    try:
        return _path(source) if "://" not in source else _address(urlsplit(source))
    except (OSError, ValueError, http.client.HTTPException) as error:
        return in_words(error)


def in_words(error: Exception) -> str:
    """The reason of an error of the system, of an address or of an answer, as an operator understands it."""
    known = next((words for kind, words in WORDS.items() if isinstance(error, kind)), None)
    return known or getattr(error, "strerror", None) or str(error) or type(error).__name__


def status_in_words(code: int, reason: str) -> str:
    """What an HTTP or RTSP status other than success means."""
    hint = HINTS.get(code)
    return f"the camera answers {code} {reason[:MAX_STATUS_BYTES]}".strip() + (f": {hint}" if hint else "")


def _path(source: str) -> str:
    os.close(os.open(source, os.O_RDONLY | os.O_NONBLOCK))
    if source.startswith("/dev/"):
        return "the device sends no pictures: is it a camera, and does no other program use it?"
    return "the file is no video that OpenCV can decode"


def _address(parts: SplitResult) -> str:
    if parts.scheme in ("http", "https", "rtsp", "rtsps"):
        return _status(parts)
    if parts.scheme in PORTS:
        _connect(parts).close()
        return "the address takes connections, but sends no video that OpenCV can decode"
    return "nothing arrives that OpenCV can decode"


def _connect(parts: SplitResult) -> socket.socket:
    connection = socket.create_connection((parts.hostname or "", parts.port or PORTS[parts.scheme]), DIAGNOSIS_S)
    if parts.scheme in ("https", "rtsps"):  # FFmpeg does not check certificates either
        return ssl._create_unverified_context().wrap_socket(connection, server_hostname=parts.hostname)
    return connection


def _status(parts: SplitResult) -> str:
    """What an HTTP or RTSP server answers to a request for this address."""
    code, reason, headers = _ask(parts, "")
    if code == 401 and parts.username is not None and "WWW-Authenticate" in headers:
        login = Login(unquote(parts.username), unquote(parts.password or ""))
        code, reason, _ = _ask(parts, authorization(login, headers, *_request(parts)))
    said = status_in_words(code, reason)
    return f"{said}: but it sends no video that OpenCV can decode" if code == 200 else said


def _ask(parts: SplitResult, authorization: str) -> tuple[int, str, http.client.HTTPMessage]:
    """Status code, reason and headers. Raises OSError, ValueError, HTTPException."""
    protocol = "RTSP/1.0" if parts.scheme.startswith("rtsp") else "HTTP/1.0"
    method, target = _request(parts)
    lines = [f"{method} {target} {protocol}", f"Host: {parts.hostname}", "CSeq: 1", "Accept: */*"]
    if authorization:
        lines.append(f"Authorization: {authorization}")
    with _connect(parts) as connection, connection.makefile("rb") as answer:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        status = answer.readline(MAX_STATUS_BYTES).decode("latin-1").split(None, 2)
        if len(status) < 2 or not status[0].startswith(protocol[:5]) or not status[1].isdecimal():
            raise ValueError(f"the address takes connections, but its answer is not {protocol[:4]}")
        return int(status[1]), "".join(status[2:]).strip(), http.client.parse_headers(answer)


def _request(parts: SplitResult) -> tuple[str, str]:
    """Method and target of a request, without user name and password."""
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if parts.scheme.startswith("http"):
        return "GET", path
    return "DESCRIBE", f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"
