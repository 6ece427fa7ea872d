"""A camera's user name and password: read from its file at each try, and put where each protocol wants them."""

import base64
from dataclasses import dataclass, field
from http.client import HTTPMessage
from urllib.parse import quote, urlsplit
from urllib.request import (
    AbstractDigestAuthHandler,
    HTTPPasswordMgrWithDefaultRealm,
    Request,
    parse_http_list,
    parse_keqv_list,
)

from edge_runtime.config import CameraConfig
from edge_runtime.config.camera_source import PLACEHOLDERS
from edge_runtime.password_file import read_password

DIGESTS = ("MD5", "SHA")  # algorithms of RFC 7616 that every Python since 3.10 knows
INCOMPLETE = "the camera asks for a digest login, but its challenge is incomplete"


@dataclass(frozen=True, slots=True)
class Login:
    """A user of a camera."""

    username: str
    password: str = field(repr=False)


def login_of(camera: CameraConfig) -> Login | None:
    """None: the camera has none. Raises ConfigError if its file cannot be used."""
    if camera.username is None or camera.password_file is None:
        return None
    return Login(camera.username, read_password(camera.password_file, f"camera {camera.name}"))


def with_login(source: str, login: Login | None) -> str:
    """The address with the login in it: for libraries that take it from nowhere else. Never to be logged."""
    if login is None:
        return source
    username, password = quote(login.username, safe=""), quote(login.password, safe="")
    if any(placeholder in source for placeholder in PLACEHOLDERS):
        return source.replace(PLACEHOLDERS[0], username).replace(PLACEHOLDERS[1], password)
    return source.replace("://", f"://{username}:{password}@", 1)


def authorization(login: Login, answer: HTTPMessage, method: str, target: str) -> str:
    """The header that answers a 401: RFC 7616 (Digest) if it is offered, else RFC 7617 (Basic).

    answer: the headers of the 401. Raises ValueError if the server wants another scheme.
    """
    challenges = [challenge.partition(" ") for challenge in answer.get_all("WWW-Authenticate", [])]
    for scheme, _, values in challenges:
        if scheme.lower() == "digest":
            try:
                parameters = parse_keqv_list(parse_http_list(values))
            except IndexError as error:  # a parameter without a value
                raise ValueError(INCOMPLETE) from error
            if parameters.get("algorithm", "MD5").upper() in DIGESTS:
                return f"Digest {_digest(login, parameters, method, target)}"
    if any(scheme.lower() == "basic" for scheme, _, _ in challenges):
        return "Basic " + base64.b64encode(f"{login.username}:{login.password}".encode()).decode()
    raise ValueError("the camera wants a login that is not supported: let it use Basic, or Digest with MD5")


def _digest(login: Login, parameters: dict[str, str], method: str, target: str) -> str:
    passwords = HTTPPasswordMgrWithDefaultRealm()
    passwords.add_password(None, "http://camera/", login.username, login.password)
    request = Request("http://camera/", method=method)
    request.selector = target
    # None for parameters that make no sense, such as a missing nonce.
    values = AbstractDigestAuthHandler(passwords).get_authorization(request, parameters)
    if values is None:
        raise ValueError(INCOMPLETE)
    return str(values)


def same_server(first: str, second: str) -> bool:
    """Whether both addresses lead to one server, so that a login for one may be sent to the other."""
    one, other = urlsplit(first), urlsplit(second)
    return (one.hostname, one.port) == (other.hostname, other.port) and (one.scheme, other.scheme) != ("https", "http")
