"""How to reach the broker, checked whole before anything starts. Raises MqttConfigError; opens no connection."""

import ipaddress
import re
import ssl
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import AiflowError

MAX_PASSWORD_BYTES = 4096


class MqttConfigError(AiflowError, ValueError):
    """Settings that can never work; found when the client is built."""


@dataclass(frozen=True, slots=True)
class MqttSettings:
    """Raises MqttConfigError for what can never work. Files are read again at each connection: they may be rotated."""

    host: str
    port: int  # 1..65535
    client_id: str  # fixed per board or server: a random one would leave a session behind at every start
    username: str | None = None
    password_file: str | None = None  # first line, at most 4 KiB
    ca_file: str | None = None  # None with tls: the system's authorities
    cert_file: str | None = None
    key_file: str | None = None
    tls: bool = False  # implied by ca_file or cert_file
    insecure: bool = False  # True allows plain text to a broker that is not on this machine
    keepalive_s: int = 10  # a dead link is seen after about 1.7 of these; one message must pass the link within one
    window: int = 8  # publishes in flight at once
    queue_messages: int = 1024  # waiting, on top of the window: a broker that stalls for seconds costs no event
    queue_bytes: int = 8 << 20  # payload bytes waiting
    max_publish_bytes: int = 512 << 10  # one payload
    max_inbound_bytes: int = 512 << 10  # one packet; the broker drops larger ones silently (MQTT 5, 3.1.2.11.4)
    receive_maximum: int | None = None  # inbound QoS 1 messages not acknowledged yet; None: the protocol's 65535

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise MqttConfigError(f"mqtt port = {self.port}, want 1 to 65535 (usual: 1883 plain, 8883 TLS)")
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", self.client_id):
            raise MqttConfigError(f"mqtt client id {self.client_id!r}: want 1 to 64 of A-Z a-z 0-9 _ . -")
        if not self.host:
            raise MqttConfigError("mqtt host is empty, want the broker's name or address")
        for name in ("keepalive_s", "window", "queue_messages", "queue_bytes", "max_publish_bytes"):
            if getattr(self, name) < 1:
                raise MqttConfigError(f"mqtt {name} = {getattr(self, name)}, want at least 1")
        if not self.uses_tls and not self.insecure and not is_loopback(self.host):
            raise MqttConfigError(
                f"mqtt broker {self.host} is not on this machine and TLS is off: everybody on the way could read and "
                "forge messages; set ca_file (or tls = true), or insecure = true on a network that you trust"
            )
        if self.cert_file and not self.key_file:
            raise MqttConfigError(f"mqtt cert_file {self.cert_file} has no key_file beside it: name both or neither")
        try:
            self.password(), self.tls_context()
        except (OSError, UnicodeDecodeError) as error:  # ssl.SSLError is an OSError
            raise MqttConfigError(f"mqtt credentials cannot be read: {error}") from error

    @property
    def uses_tls(self) -> bool:
        return bool(self.tls or self.ca_file or self.cert_file)

    def password(self) -> str | None:
        """Raises OSError where the file cannot be read."""
        if self.password_file is None:
            return None
        with Path(self.password_file).open("rb") as file:
            lines = file.read(MAX_PASSWORD_BYTES).splitlines()
        return lines[0].decode() if lines else ""

    def tls_context(self) -> ssl.SSLContext | None:
        """TLS 1.2 or newer, certificate and host name always checked. Raises OSError for files that do not fit."""
        if not self.uses_tls:
            return None
        context = ssl.create_default_context(cafile=self.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.cert_file:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. The defaults are for the field; tests shorten them."""

    backoff_base: float = 1.0
    backoff_cap: float = 60.0
    refused_cap: float = 300.0  # wrong login: the credentials may be rotated in place, so keep asking, slowly
    stable: float = 30.0  # so long ONLINE and the next backoff starts from the base again
    handshake: float = 5.0  # each: TCP and TLS; CONNACK and SUBACK
    degraded: float = 3.0  # in flight without any PUBACK
    short_session: float = 10.0
    # Wait when another client uses our id: two evictions a minute at most, and back within one when it has gone.
    duplicate_id: tuple[float, float] = (30.0, 55.0)
