"""How to reach the broker. Everything is checked before the program starts; nothing here opens a connection."""

import ipaddress
import re
import ssl
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from edge_runtime.errors import ConfigError
from edge_runtime.logs import printable
from edge_runtime.password_file import read_password

MAX_PACKET = 512 << 10  # bytes, inbound, unless somebody expects pictures
TopicPrefix = Annotated[
    str,
    Meta(
        pattern=r"^(?=.{1,64}\Z)[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*\Z",
        description='a prefix of topics such as "homeassistant": up to 64 of the characters A-Z, a-z, 0-9, _, - and /',
    ),
]


class MqttConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """How to reach a broker: what an operator sets."""

    host: str = "127.0.0.1"  # a name or an address; an IPv6 address may stand in brackets
    port: Annotated[int, Meta(ge=1, le=65535)] = 1883
    username: str | None = None
    password_file: str | None = None  # its first line; secrets come from files only
    ca_file: str | None = None  # implies tls
    cert_file: str | None = None  # implies tls
    key_file: str | None = None  # with cert_file
    tls: bool = False  # true without ca_file: the system's authorities
    insecure: bool = False  # true allows plain text to a broker that is not on this machine
    keepalive_s: Annotated[int, Meta(ge=2, le=600)] = 10  # a dead link is seen after about 1.7 of these

    def settings(self, client_id: str, **limits: Any) -> "MqttSettings":
        """Raises ConfigError if no connection can ever work."""
        return MqttSettings(client_id=client_id, **msgspec.structs.asdict(self), **limits)


class MqttSettings(MqttConfig, frozen=True, kw_only=True):
    """Raises ConfigError for what can never work. Its files are read again at each connection: they may be rotated."""

    client_id: str  # the same at every start: a random one would leave a session behind each time
    window: int = 8  # publishes in flight at once
    queue_messages: int = 1024  # that wait besides the window: a broker that stalls for seconds costs no event
    queue_bytes: int = 8 << 20  # of payloads that wait
    max_publish_bytes: int = 512 << 10  # one payload
    max_inbound_bytes: int = MAX_PACKET  # one packet; the broker drops larger ones silently (MQTT 5, 3.1.2.11.4)
    receive_maximum: int | None = None  # inbound QoS 1 messages not acknowledged yet; None: the protocol's 65535

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "host", checked_host(self.host))
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"mqtt port = {self.port}, want 1 to 65535 (usual: 1883 plain, 8883 TLS)")
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", self.client_id):
            raise ConfigError(f"mqtt client id {self.client_id[:80]!r}, want 1 to 64 of A-Z, a-z, 0-9, _, . and -")
        for name in ("keepalive_s", "window", "queue_messages", "queue_bytes", "max_publish_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mqtt {name} = {getattr(self, name)}, want at least 1")
        if not self.uses_tls and not self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"mqtt broker {self.host} is not on this machine and TLS is off: everybody on the way could read and "
                "forge messages; set ca_file (or tls = true), or insecure = true on a network that you trust"
            )
        if self.password_file and self.username is None:
            raise ConfigError(f"mqtt password_file = {self.password_file} without a username: set username")
        if bool(self.cert_file) != bool(self.key_file):
            raise ConfigError(
                f"mqtt cert_file = {self.cert_file}, key_file = {self.key_file}: a certificate needs both, or leave "
                "out both"
            )
        self.password()
        try:
            self.tls_context()
        except OSError as error:  # ssl.SSLError is an OSError
            files = {key: value for key in ("ca_file", "cert_file", "key_file") if (value := getattr(self, key))}
            names = ", ".join(f"{key} = {value}" for key, value in files.items())
            raise ConfigError(f"mqtt {names}: cannot be read as PEM: {error.strerror or error}") from error

    @property
    def uses_tls(self) -> bool:
        return bool(self.tls or self.ca_file or self.cert_file)

    def password(self) -> str | None:
        """The first line of the file, without a byte order mark. Raises ConfigError."""
        return None if self.password_file is None else read_password(self.password_file, "mqtt")

    def login_advice(self) -> str:
        """After a refused login: which settings have the user and the password. Never shows the password."""
        place = "in the table [mqtt] of this broker, or by the options --username and --password-file"
        if self.username is None:
            return f": set username and password_file, {place}"
        password = f"the first line of {self.password_file}" if self.password_file else "no password_file"
        return f": check username = {self.username} with {password}, {place}"

    def topic_advice(self, topic: str) -> str:
        """After a forbidden subscription: which settings may not fit. Empty for a topic that is not ours."""
        parts = re.search(r"(?:^|/)aiflow/([^/]+)/([^/]+)/(down/)?", topic)
        if parts is None:
            return ""
        account = "a client without a login" if self.username is None else f"username = {self.username}"
        whose = f"the account of {parts[2]}" if parts[3] else "an account that may read this"
        return (
            f': is site = "{parts[1]}" right, and is {account} {whose}? `aiflow broker config` gives each account its '
            "own topics"
        )

    def tls_context(self) -> ssl.SSLContext | None:
        """TLS 1.2 or newer; certificate and host name are always checked. Raises OSError for files that do not fit."""
        if not self.uses_tls:
            return None
        context = ssl.create_default_context(cafile=self.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.cert_file:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context


def checked_host(host: str) -> str:
    """The host without the brackets of an IPv6 address. Raises ConfigError, whose text has no password."""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    # All before the last @ is the login: a password may contain / and @.
    url = re.fullmatch(r"(?is)(?:([a-z][a-z0-9+.-]*)://)?(?:(.*)@)?(\[[^]]*\]|[^:/]*):?([0-9]*).*", host)
    if url and any(url.group(1, 2, 4)):
        raise ConfigError(_more_than_a_host(*url.groups("")))
    if not 1 <= len(host) <= 253 or re.search(r"[\s/:@\[\]]", host) or not can_be_name(host):
        shown = printable(host.rpartition("@")[2], 128)
        raise ConfigError(f'mqtt host = "{shown}", want the name or address of the broker, such as "192.0.2.7"')
    return host


def _more_than_a_host(scheme: str, login: str, name: str, port: str) -> str:
    """What to write in place of a URL, or of a host with a port or a login. Does not show the password."""
    shown = f"{scheme}://" * bool(scheme) + "...@" * bool(login) + name[:128] + f":{port[:5]}" * bool(port)
    uses_tls = scheme.lower() in ("mqtts", "ssl", "tls", "wss")
    is_wrong = bool(port) and (len(port) > 5 or not 1 <= int(port) <= 65535)
    if is_wrong or not port:
        port = "8883" if uses_tls else "1883"
    wanted = f'host = "{name[:128]}", port = {port}{", tls = true" * uses_tls}'
    options = f"--broker {name[:128]} --broker-port {port}{' --tls' * uses_tls}"
    if login:
        user = login.partition(":")[0][:128]
        wanted += f', username = "{user}" and password_file = "/etc/aiflow/password" with the password in it'
        options += f" --username {user} --password-file FILE"
    limits = "; a port is a number from 1 to 65535" * is_wrong
    return f'mqtt host = "{shown}" is more than a host, want {wanted}; as options: {options}{limits}'


def can_be_name(host: str) -> bool:
    """Whether a resolver takes it: with an empty label, or one of over 63 characters, Python's raises UnicodeError."""
    try:
        return host.isprintable() and bool(host.encode("idna"))
    except UnicodeError:
        return False


def is_loopback(host: str) -> bool:
    """Whether the host is this machine; also for an IPv6 address in brackets."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. The defaults are for the field; tests shorten them."""

    backoff_base: float = 1.0
    backoff_cap: float = 60.0
    refused_cap: float = 300.0  # after a refused login: the credentials may be replaced, so keep trying, but slowly
    stable: float = 30.0  # after this time ONLINE the next backoff starts from the base again
    handshake: float = 5.0  # for TCP and TLS, and again for CONNACK and SUBACK
    degraded: float = 3.0  # in flight without any PUBACK
    short_session: float = 10.0
    # Pause when another client uses our id: at most two evictions per minute, and back within one when it has gone.
    duplicate_id: tuple[float, float] = (30.0, 55.0)
