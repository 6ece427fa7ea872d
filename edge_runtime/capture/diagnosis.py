"""Why a source cannot be opened. OpenCV does not say, so this asks the source itself, once, with bounded waits."""

import base64
import http.client
import os
import socket
import ssl
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import (
    AbstractDigestAuthHandler,
    HTTPPasswordMgrWithDefaultRealm,
    Request,
    parse_http_list,
    parse_keqv_list,
)

DIAGNOSIS_S = 3.0  # for each wait of the network
MAX_STATUS_BYTES = 256
PORTS = {"http": 80, "https": 443, "mms": 1755, "rtmp": 1935, "rtmps": 443, "rtsp": 554, "rtsps": 322, "tcp": 0}
WORDS: dict[type[OSError], str] = {
    FileNotFoundError: "it does not exist: is it plugged in or mounted, and is the path right?",
    PermissionError: "permission denied: let this user read it; for a camera, add the user to the group video",
    TimeoutError: f"no answer within {DIAGNOSIS_S:g} s: is the camera on, and is the address right?",
    ConnectionRefusedError: "connection refused: is the camera on, and is the port right?",
}
HINTS = {  # by status code of HTTP and RTSP
    400: "the address may be wrong",
    401: "check the user name and the password in its address",
    403: "check the user name and the password in its address",
    404: "check the path in its address",
    454: "check the path in its address",
}


def why_not_opened(source: str) -> str:
    """The reason in words, for a log line, for a source that OpenCV could not open. Takes some seconds at most.

    Never contains the source's address, which may contain a password.
    """
    try:
        return _path(source) if "://" not in source else _address(urlsplit(source))
    except OSError as error:
        known = next((words for kind, words in WORDS.items() if isinstance(error, kind)), None)
        return known or error.strerror or str(error)
    except (ValueError, http.client.HTTPException) as error:  # an address or an answer that cannot be understood
        return str(error) or type(error).__name__


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
    if code == 401 and parts.username is not None and (challenge := headers.get("WWW-Authenticate")):
        code, reason, _ = _ask(parts, _authorization(parts, challenge))
    hint = HINTS.get(code, "but it sends no video that OpenCV can decode" if code == 200 else "")
    return f"the camera answers {code} {reason}" + (f": {hint}" if hint else "")


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


def _authorization(parts: SplitResult, challenge: str) -> str:
    """The header that answers a challenge: RFC 7617 (Basic) or RFC 7616 (Digest)."""
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    scheme, _, values = challenge.partition(" ")
    if scheme.lower() != "digest":
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    passwords = HTTPPasswordMgrWithDefaultRealm()
    passwords.add_password(None, "http://camera/", user, password)
    method, target = _request(parts)
    request = Request("http://camera/", method=method)
    request.selector = target
    answer = AbstractDigestAuthHandler(passwords).get_authorization(request, parse_keqv_list(parse_http_list(values)))
    return f"Digest {answer}"
