"""Writes the configuration of a site's Mosquitto: accounts, rights, limits and certificates.

The rights are those of docs/protocol.md, section 2, with this site's names. Three rules keep one bad client from
harming the others, on Mosquitto 2.0.11 and newer (docs/adr/0016-dynamic-security.md):

- The dynamic security plugin checks subscriptions too. An acl_file grants every subscription and drops messages only
  at delivery, so that any board could join the servers' `$share` and swallow their requests.
- `use_username_as_clientid`: a client cannot disconnect another one by using its client id. So each account is for one
  connection.
- No right to write has a wildcard. So the number of retained messages is bounded, and all memory with it:
  `memory_limit` is only the last barrier.

The result depends on the site's names, on random passwords, and on the files of an earlier run: existing passwords and
certificates are kept.
"""

import base64
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edge_runtime.errors import AiflowError
from edge_runtime.mqtt.settings import TopicPrefix
from edge_runtime.password_file import MAX_PASSWORD_BYTES
from edge_runtime.wire import MAX_ENVELOPE, TopicError, topics
from firmware_tools import certificates

BOARD_SWITCHES = ("paradigm", "quality_floor", "paused")
CAMERA_SWITCHES = ("{}_enabled", "{}_motion", "{}_prompt")
BROKER_FOLDER = "/etc/mosquitto/aiflow"  # on the broker's machine
PLUGIN = "mosquitto_dynamic_security.so"  # the loader finds it in the system's library folders
MAX_ACCOUNTS = 1000
MAX_RIGHTS_BYTES = 32 << 20  # of an earlier run's rights file
MAX_PICTURE = 8 << 20  # bytes on down/frame
PACKET_OVERHEAD = 1024  # bytes: topic and properties
QUEUE_BYTES = 4 << 20  # waiting for one client; the broker drops what comes later
MIN_QUEUE = 100  # messages
NO_TLS = "no TLS, the broker listens on 127.0.0.1 alone"
BASE_MEMORY = 64 << 20  # bytes: what the broker itself and new connections need
# Passwords have 192 random bits, so slow hashing protects nothing; a broker on a small machine hashes at each login.
HASH_ROUNDS = 101


class Board(NamedTuple):
    """A board, and the cameras whose remote settings people change over this broker."""

    name: str
    cameras: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Site:
    """The accounts of a site. Each name is an account, and an account is for one connection."""

    name: str
    boards: Sequence[Board]
    servers: Sequence[str]
    people: Sequence[str] = ()  # people and programs that watch events and change boards' settings
    pool: str = "servers"
    takes_pictures: bool = False  # people may publish pictures for boards to answer, of up to 8 MB
    home_assistants: Sequence[str] = ()  # people who also see the boards' announcements and pictures
    discovery_prefix: str = "homeassistant"  # of these announcements

    def __post_init__(self) -> None:
        """Raises AiflowError."""
        accounts = list(self.accounts())
        try:
            for name in accounts:
                topics.request(self.name, name)
            topics.request_share(self.pool, self.name)
            for board in self.boards:
                self._board(board)  # the names of its cameras
        except TopicError as error:
            raise AiflowError(
                f"{error}; want names of 1 to 32 characters a-z, 0-9 and -, and none that is called server"
            ) from error
        try:
            msgspec.convert(self.discovery_prefix, TopicPrefix)
        except msgspec.ValidationError as error:
            raise AiflowError(
                f"discovery prefix {self.discovery_prefix[:64]!r}: want up to 64 of the characters A-Z, a-z, 0-9, _, - "
                "and /, as in Home Assistant's MQTT settings"
            ) from error
        if twice := sorted({name for name in accounts if accounts.count(name) > 1}):
            raise AiflowError(
                f"{', '.join(twice)}: named twice, but two connections with one account end each other: give each "
                "board, server, person and program a name of its own"
            )
        if len(accounts) > MAX_ACCOUNTS:
            raise AiflowError(f"{len(accounts)} accounts, want at most {MAX_ACCOUNTS}: make two sites")
        if not (self.boards and self.servers):
            raise AiflowError("want at least one board and one server: see --boards and --servers")

    def accounts(self) -> Iterator[str]:
        yield from (board.name for board in self.boards)
        yield from self.servers
        yield from self.people
        yield from self.home_assistants

    def rights(self) -> dict[str, "Rights"]:
        """By account."""
        return (
            {board.name: self._board(board) for board in self.boards}
            | {server: self._server(server) for server in self.servers}
            | dict.fromkeys(self.people, self._person())
            | dict.fromkeys(self.home_assistants, self._home_assistant())
        )

    def _board(self, board: Board) -> "Rights":
        site, name = self.name, board.name
        kinds = (topics.request, topics.event, topics.last, topics.status, topics.bundle_state)
        writes = [kind(site, name) for kind in kinds]
        writes += [topics.state(site, name, switch) for switch in _switches(board)]
        subscribes = [topics.reply(site, name), topics.server_statuses(site), f"{topics.ROOT}/{site}/{name}/down/set/+"]
        subscribes += [topics.bundle_offer(site, name), topics.bundle_chunk(site, name)]
        subscribes.append(topics.status(site, name))  # `aiflow doctor` asks whether a board with this id runs
        if self.takes_pictures:
            subscribes += [topics.frame(site, name), f"{topics.frame(site, name)}/#"]
        if self.home_assistants:
            announcement = topics.discovery(self.discovery_prefix, site, name)
            writes += [announcement, *(topics.image(site, name, camera) for camera in board.cameras)]
            subscribes += [announcement, topics.discovery_status(self.discovery_prefix)]
        return Rights(tuple(writes), tuple(subscribes))

    def _server(self, server: str) -> "Rights":
        site = self.name
        askers = (*(board.name for board in self.boards), *self.servers)  # servers send probes back to each other
        writes = [topics.reply(site, asker) for asker in askers]
        writes += [topics.server_status(site, server), topics.request(site, server)]
        reads = (topics.reply(site, server), topics.server_setting(site, server, "questions"))
        return Rights(tuple(writes), (topics.request_share(self.pool, site), *reads))

    def _person(self) -> "Rights":
        site = self.name
        writes = [topics.setting(site, board.name, switch) for board in self.boards for switch in _switches(board)]
        writes += [topics.bundle_install(site, board.name) for board in self.boards]
        writes += [topics.server_setting(site, server, "questions") for server in self.servers]
        # Anybody may offer a bundle: its signature decides.
        writes += [
            kind(site, board.name) for board in self.boards for kind in (topics.bundle_offer, topics.bundle_chunk)
        ]
        if self.takes_pictures:
            frames = [(topics.frame(site, board.name), board.cameras) for board in self.boards]
            writes += [topic for topic, _ in frames]
            writes += [f"{topic}/{camera}" for topic, cameras in frames for camera in cameras]
        any_board = f"{topics.ROOT}/{site}/+/up"
        reads = [f"{any_board}/{kind}" for kind in ("event", "last", "status", "state/+", "bundle")]
        return Rights(tuple(writes), (*reads, topics.server_statuses(site)), may_narrow=True)

    def _home_assistant(self) -> "Rights":
        """A person's, and Home Assistant's own topics. It deletes the announcement of a board that is removed there."""
        person, prefix = self._person(), self.discovery_prefix
        writes = [topics.discovery(prefix, self.name, board.name) for board in self.boards]
        reads = (f"{prefix}/#", f"{topics.ROOT}/{self.name}/+/up/image/+")
        return Rights(
            (*person.writes, *writes, topics.discovery_status(prefix)), (*person.subscribes, *reads), may_narrow=True
        )


def _switches(board: Board) -> list[str]:
    return [*BOARD_SWITCHES, *(kind.format(camera) for camera in board.cameras for kind in CAMERA_SWITCHES)]


@dataclass(frozen=True, slots=True)
class Rights:
    """The rights of one account. Everything else is refused."""

    writes: tuple[str, ...]  # topics, never with a wildcard, so that the number of retained messages is bounded
    subscribes: tuple[str, ...]  # filters; the account gets what they match
    may_narrow: bool = False  # may also subscribe to a part of a filter, such as one board instead of +

    def acls(self) -> list[dict[str, Any]]:
        """In the format of the dynamic security plugin."""
        subscribe = "subscribePattern" if self.may_narrow else "subscribeLiteral"
        received = [re.sub(r"^\$share/[^/]+/", "", name) for name in self.subscribes]
        kinds = {"publishClientSend": self.writes, "publishClientReceive": received, subscribe: self.subscribes}
        return [
            {"acltype": kind, "topic": topic, "priority": 0, "allow": True}
            for kind, names in kinds.items()
            for topic in names
        ]


class Login(msgspec.Struct, frozen=True):
    """A hashed password, in the format of the plugin."""

    username: str
    password: str  # base64 of 64 bytes, PBKDF2 with SHA-512
    salt: str  # base64 of 12 bytes
    iterations: int

    @classmethod
    def of(cls, username: str, password: str, salt: bytes | None = None, iterations: int = HASH_ROUNDS) -> "Login":
        salt = secrets.token_bytes(12) if salt is None else salt
        digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations)
        return cls(username, base64.b64encode(digest).decode(), base64.b64encode(salt).decode(), iterations)

    def fits(self, password: str) -> bool:
        again = Login.of(self.username, password, base64.b64decode(self.salt), self.iterations)
        return hmac.compare_digest(again.password, self.password)


class _Written(msgspec.Struct, frozen=True):
    """The part of an earlier run's rights file that is read again."""

    clients: tuple[Login, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """The accounts that a run has written or removed."""

    new: tuple[str, ...]  # accounts with a new password
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    listener: str  # says whom the broker listens to, and for which names its certificate is
    has_authority: bool  # ca.pem has signed the certificate


def write_site(
    out: Path,
    site: Site,
    *,
    make_tls: Sequence[str] = (),
    tls_files: tuple[Path, Path] | None = None,
    no_tls: bool = False,
    remove: Sequence[str] = (),
    port: int | None = None,
    broker_folder: str = BROKER_FOLDER,
    plugin: str = PLUGIN,
) -> Result:
    """Write everything into `out`. Passwords and certificates of an earlier run are kept if they still fit.

    make_tls: the broker's names and addresses, to make an authority and a certificate for them. tls_files: instead, an
    existing certificate and its key. Neither: the certificate of an earlier run, unless no_tls; without one, plain text
    on loopback only. port: None is an earlier run's for the same kind of listener. remove: accounts that lose access.
    Raises AiflowError, and OSError if the folder cannot be written.
    """
    broker, passwords = out / "broker", out / "passwords"
    known = _known_logins(broker / "rights.json")
    named, gone = set(site.accounts()), set(remove)
    if both := sorted(named & gone):
        raise AiflowError(f"{', '.join(both)}: named as an account and in --remove: want one of them")
    if lost := sorted(known.keys() - named - gone):
        raise AiflowError(
            f"{out} has accounts that are not named now: {', '.join(lost)}: name them again, or take their access "
            f"away with --remove {','.join(lost)}"
        )
    if port is not None and not 1 <= port <= 65535:
        raise AiflowError(f"--port {port}: want 1 to 65535, usually 8883")
    for folder in (out, broker, passwords):
        folder.mkdir(mode=0o700, exist_ok=True, parents=True)
    had_tls, had_port = _known_listener(broker / "aiflow.conf")
    present = broker / "broker.pem", broker / "broker.key"
    earlier_hosts = certificates.hosts_of(present[0]) if had_tls else ""
    keeps_tls = had_tls and not (make_tls or tls_files or no_tls)
    files = present if keeps_tls else tls_files
    pair = certificates.made(out, site.name, make_tls) if make_tls else files and certificates.checked(*files)
    if pair:
        for path, data in zip(present, pair, strict=True):
            _write(path, data)
    if bool(pair) == had_tls:
        port = port or had_port
    logins = {name: _login(name, passwords / name, known.get(name)) for name in site.accounts()}
    rights = _rights_json(site, [login for login, _ in logins.values()])
    _write(broker / "rights.json", msgspec.json.format(msgspec.json.encode(rights)))
    _write(broker / "aiflow.conf", mosquitto_conf(site, bool(pair), port, broker_folder, plugin).encode())
    for name in gone:
        (passwords / name).unlink(missing_ok=True)
    return Result(
        tuple(name for name, (_, is_new) in logins.items() if is_new),
        tuple(name for name, (_, is_new) in logins.items() if not is_new),
        tuple(sorted(known.keys() & gone)),
        _listener(certificates.hosts_of(present[0]) or "no name", earlier_hosts) if pair else NO_TLS,
        bool(make_tls) or (keeps_tls and (out / "ca.pem").exists()),
    )


def mosquitto_conf(site: Site, has_tls: bool, port: int | None, folder: str, plugin: str) -> str:
    """The text of aiflow.conf: one listener, and a bound for everything that the broker stores for a client."""
    rights = site.rights()
    max_packet = (MAX_PICTURE if site.takes_pictures else MAX_ENVELOPE) + PACKET_OVERHEAD
    topic_count = len({topic for right in rights.values() for topic in right.writes})  # each may be retained
    queue = max(MIN_QUEUE, topic_count)  # so that a new subscription gets all retained messages
    # All retained messages fit. Many large packets to a client that does not read can still reach the limit. Then large
    # packets fail first, and the broker closes the connection that sends them.
    memory = BASE_MEMORY + topic_count * max_packet + len(rights) * 2 * QUEUE_BYTES
    listener = f"listener {port or 8883}" if has_tls else f"listener {port or 1883} 127.0.0.1"
    certificate = [f"certfile {folder}/broker.pem", f"keyfile {folder}/broker.key"]
    lines = [
        "# Written by `aiflow broker config`: change it by running that again.",
        listener,
        *(certificate if has_tls else ()),
        "# An account is for one connection, and nobody can evict another account's.",
        "use_username_as_clientid true",
        f"max_connections {100 + 2 * len(rights)}",
        "",
        "allow_anonymous false",
        f"plugin {plugin}",
        f"plugin_opt_config_file {folder}/rights.json",
        "",
        "# The largest packet, what waits for one client, and all memory together.",
        f"max_packet_size {max_packet}",
        f"max_queued_messages {queue}",
        f"max_queued_bytes {QUEUE_BYTES}",
        f"max_inflight_bytes {max(QUEUE_BYTES, max_packet)}",
        f"memory_limit {memory}",
        "set_tcp_nodelay true",
    ]
    return "\n".join(lines) + "\n"


def instructions(out: Path, site: Site, result: Result, folder: str) -> str:
    """Says which file to copy where, for the user of the command."""
    counts = [f"{len(result.new)} new passwords", f"{len(result.kept)} kept"]
    counts += [f"access taken from {', '.join(result.removed)}"] if result.removed else []
    lines = [
        f"{out} is written: {', '.join(counts)}; {result.listener}.",
        f"  broker/           -> {folder} on the broker's machine",
        *(
            ["  ca.pem            -> /etc/aiflow/ca.pem on every board, server and person's machine"]
            * result.has_authority
        ),
    ]
    stations = [(board.name, "board") for board in site.boards] + [(server, "server") for server in site.servers]
    for name, kind in stations:
        lines.append(f"  passwords/{name:<7} -> /etc/aiflow/password on {kind} {name}; username there: {name}")
    lines += [f"  passwords/{name:<7} -> {name}; username: {name}, one connection at a time" for name in site.people]
    lines += [
        f"  passwords/{name:<7} -> Home Assistant, MQTT integration; username there: {name}"
        for name in site.home_assistants
    ]
    if site.pool != "servers":
        lines.append(f'  on each server, in [server] of server.toml: pool = "{site.pool}"')
    return "\n".join(
        [
            *lines,
            "Then, as root on the broker's machine:",
            f"  chown -R mosquitto: {folder} && chmod -R go= {folder}",
            f"  ln -sf {folder}/aiflow.conf /etc/mosquitto/conf.d/aiflow.conf",
            "  systemctl restart mosquitto",
            f"Keep {out} where nobody else can read it: it holds the passwords"
            + (" and ca.key, with which anybody can pose as the broker." if result.has_authority else "."),
        ]
    )


def _rights_json(site: Site, logins: Sequence[Login]) -> dict[str, Any]:
    """In the file format of the plugin, which mosquitto_ctrl also writes."""
    closed = ("publishClientSend", "publishClientReceive", "subscribe")
    return {
        "defaultACLAccess": dict.fromkeys(closed, False) | {"unsubscribe": True},
        "clients": [
            msgspec.structs.asdict(login) | {"roles": [{"rolename": login.username, "priority": 0}]} for login in logins
        ],
        "roles": [{"rolename": name, "acls": rights.acls()} for name, rights in site.rights().items()],
    }


def _listener(hosts: str, earlier_hosts: str) -> str:
    replaced = f" in place of one for {earlier_hosts}" if earlier_hosts not in ("", hosts) else ""
    return f"TLS with a certificate for {hosts}{replaced}"


def _known_listener(path: Path) -> tuple[bool, int | None]:
    """Whether an earlier run's listener has TLS, and its port."""
    text = _read(path, MAX_RIGHTS_BYTES).decode(errors="replace") if path.exists() else ""
    port = re.search(r"^listener ([0-9]{1,5})\b", text, re.MULTILINE)
    return "\ncertfile " in text, int(port[1]) if port else None


def _known_logins(path: Path) -> dict[str, Login]:
    """The accounts of an earlier run."""
    if not path.exists():
        return {}
    try:
        written = msgspec.json.decode(_read(path, MAX_RIGHTS_BYTES), type=_Written)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise AiflowError(f"{path}: not a file that this command has written ({error}): move it away") from error
    return {login.username: login for login in written.clients}


def _login(name: str, secret_file: Path, known: Login | None) -> tuple[Login, bool]:
    """The account's login, and whether its password is new. If the password's file was moved away, it stays valid."""
    if secret_file.exists():
        lines = _read(secret_file, MAX_PASSWORD_BYTES).splitlines()  # clients take the first line too
        try:
            password = lines[0].decode() if lines else ""
        except UnicodeDecodeError:
            password = ""
        if not password:
            raise AiflowError(f"{secret_file}: want a password in UTF-8: delete the file for a new one")
        return (known if known and known.fits(password) else Login.of(name, password)), False
    if known:
        return known, False
    password = secrets.token_urlsafe(24)
    _write(secret_file, password.encode() + b"\n")
    return Login.of(name, password), True


def _read(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise AiflowError(f"{path}: larger than {max_bytes} bytes: not a file that this command has written")
    return data


def _write(path: Path, data: bytes) -> None:
    """Atomically, and from the first byte on readable by its owner only."""
    half = path.with_name(f".{path.name}.new")
    with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
    half.replace(path)
