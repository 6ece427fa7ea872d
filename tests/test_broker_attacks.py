"""One bad account against a broker that `aiflow broker config` has set up: the rest of the site goes on as before."""

import json
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Queue
from typing import Any

import msgspec
import psutil
import pytest
import tomli_w

from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import Message, MqttClient, MqttConfig, MqttSettings, Outcome, Publish
from edge_runtime.wire import topics
from firmware_tools.cli import main
from firmware_tools.site_broker import MAX_PICTURE, Board, Site
from server.gateway import Arrival, Gateway
from tests.brokers import Mosquitto
from tests.edge_runtime.test_app import photo
from tests.listener import PATIENCE_S, QUICK, until
from tests.sites import login, site_broker

SITE = Site("home", (Board("porch", ("front",)), Board("gate")), ("attic", "cellar"), ("anna", "tablet"))
REQUESTS = 60


@dataclass
class Running:
    """A site's broker, and clients with the passwords that were made for it."""

    folder: Path
    broker: Mosquitto
    stack: ExitStack

    def settings(self, name: str, client_id: str | None = None, **others: Any) -> MqttSettings:
        return login(self.folder, name, self.broker.port).settings(client_id or name, **others)

    def client(self, name: str, *filters: str, online: bool = True, **options: Any) -> MqttClient:
        """A connected client of an account."""
        settings = self.settings(name, options.pop("client_id", None), **options.pop("limits", {}))
        client = MqttClient(settings, subscriptions=[(name, 1) for name in filters], timing=QUICK, **options)
        self.stack.enter_context(client)
        assert not online or client.wait_online(PATIENCE_S), client.trouble
        return client

    def memory(self) -> int:
        """Bytes that the broker holds."""
        return int(psutil.Process(self.broker.process.pid).memory_info().rss)


@dataclass
class Options:
    """What is different at a test's broker."""

    pictures: bool = False
    memory_limit: int = 0  # bytes; 0: as the command writes it


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    """The parameter, if there is one, says what is different."""
    options = getattr(request, "param", Options())
    broker = site_broker(tmp_path, replace(SITE, takes_pictures=options.pictures))
    if options.memory_limit:
        conf = tmp_path / f"mosquitto-{broker.port}.conf"
        conf.write_text(re.sub(r"memory_limit \d+", f"memory_limit {options.memory_limit}", conf.read_text()))
    with broker, ExitStack() as stack:
        yield Running(tmp_path, broker, stack)


@dataclass
class Server:
    """A server that answers each request with its own bytes."""

    gateway: Gateway
    asked: list[str] = field(default_factory=list)  # boards


@pytest.fixture
def server(site: Running) -> Server:
    def answer(arrival: Arrival) -> None:
        server.asked.append(arrival.board)
        arrival.reply(arrival.payload, 10.0)
        arrival.acknowledge()

    settings = site.settings("attic", receive_maximum=64)
    server = Server(Gateway(settings, "home", "attic", SITE.pool, answer, dict))
    site.stack.enter_context(server.gateway)
    assert server.gateway.is_proven.wait(PATIENCE_S)
    return server


@contextmanager
def a_good_board_is_answered(site: Running, server: Server) -> Iterator[None]:
    """Requests of another board, half of them before the attack and half after it: all of them are answered."""
    answers: Queue[Message] = Queue()
    board = site.client("gate", topics.reply("home", "gate"), on_message=answers.put)

    def ask(numbers: range) -> None:
        for number in numbers:
            board.publish(topics.request("home", "gate"), b"%d" % number)
        assert {int(answers.get(timeout=PATIENCE_S).payload) for _ in numbers} == set(numbers)

    ask(range(REQUESTS // 2))
    yield
    ask(range(REQUESTS // 2, REQUESTS))
    assert server.gateway.client.stats()["connects"] == 1
    assert server.gateway.client.stats()["losses"] == 0
    assert board.stats()["connects"] == 1
    assert server.gateway.heartbeat()
    assert server.gateway.summary()["probes"]["missing"] == 0


# ---- subscriptions ----

FORBIDDEN = (
    "$share/servers/aiflow/home/+/up/request",
    "$share/servers/aiflow/home/gate/up/request",
    "$share/servers/aiflow/+/+/up/request",
    "$share/servers/aiflow/home/+/up/#",
    "$share/servers/#",
    "$share/servers/+/+/+/+/+",
    "$share/other/aiflow/home/+/up/request",
    "$share/servers/aiflow/home/gate/down/reply",
    "$queue/aiflow/home/+/up/request",
    "aiflow/home/+/up/request",
    "aiflow/home/gate/down/reply",
    "aiflow/#",
    "+/#",
    "#",
    "$SYS/#",
    "$CONTROL/#",
)


@pytest.mark.parametrize("account", ["porch", "anna"])
def test_nobody_but_a_server_can_join_the_share_or_read_requests(site: Running, server: Server, account: str) -> None:
    swallowed = list[Message]()
    with a_good_board_is_answered(site, server):
        for name in FORBIDDEN:
            client = site.client(account, name, online=False, on_message=swallowed.append)
            until(lambda client=client: client.trouble != "")  # type: ignore[misc]
            assert "refused to subscribe" in client.trouble, (name, client.trouble)
            assert "aiflow/home/" not in name or f"is username = {account} " in client.trouble, (name, client.trouble)
            assert server.gateway.heartbeat()  # a probe: something that it could swallow
            client.close()
    assert swallowed == []


def test_a_board_cannot_fill_the_broker_with_subscriptions(site: Running, server: Server) -> None:
    with a_good_board_is_answered(site, server):
        before = site.memory()
        with Raw(site, "porch") as board:
            for number in range(50):
                filters = [f"aiflow/home/porch/down/set/{number}-{other}-{'x' * 200}" for other in range(100)]
                assert set(board.subscribe(filters)) == {0x80}
        assert site.memory() - before < 4 << 20


# ---- client ids ----


@pytest.mark.parametrize("account", ["porch", "anna"])
def test_nobody_can_evict_a_server_or_board_with_its_client_id(site: Running, server: Server, account: str) -> None:
    with a_good_board_is_answered(site, server):
        for attacked in ("attic", "gate"):
            for _ in range(5):
                with Raw(site, account, client_id=attacked):
                    pass
            site.client(account, client_id=attacked).close()


def test_an_account_is_for_one_connection(site: Running) -> None:
    first = site.client("anna", client_id="watch-1")
    site.client("anna", client_id="watch-2")
    until(lambda: first.stats()["losses"] > 0)


def test_a_wrong_password_and_no_password_are_refused(site: Running) -> None:
    (site.folder / "wrong").write_text("attic")
    for config in (MqttConfig(), MqttConfig(username="attic", password_file=str(site.folder / "wrong"))):
        settings = MqttConfig(
            port=site.broker.port, username=config.username, password_file=config.password_file
        ).settings("attic")
        with MqttClient(settings, timing=QUICK) as client:
            until(lambda client=client: client.trouble != "")  # type: ignore[misc]
            assert "refused the login" in client.trouble


# ---- bounds ----


def test_a_board_cannot_fill_the_broker_with_retained_messages(site: Running, server: Server) -> None:
    """10 KB each, under the board's own topics: as many as it has topics are kept."""
    with a_good_board_is_answered(site, server):
        before = site.memory()
        board = site.client("porch")
        outcomes: Queue[Outcome] = Queue()
        own = topics.status("home", "porch").removesuffix("status")
        for number in range(2000):
            for name in (f"{own}x/{number}", f"{own}state/x{number}", f"{own}event/{number}")[number % 3 :][:1]:
                board.publish(name, bytes(10_000), retain=True, on_outcome=outcomes.put)
            if number % 100 == 99:
                assert {outcomes.get(timeout=PATIENCE_S) for _ in range(100)} == {Outcome.REFUSED}
        assert site.memory() - before < 8 << 20


def test_connections_of_strangers_are_bounded_and_end_no_other(site: Running, server: Server) -> None:
    (conf,) = site.folder.glob("mosquitto-*.conf")
    limit = int(re.findall(r"(?m)^max_connections (\d+)$", conf.read_text())[0])
    with ExitStack() as held, a_good_board_is_answered(site, server):
        strangers = [
            held.enter_context(socket.create_connection(("127.0.0.1", site.broker.port))) for _ in range(limit + 50)
        ]
        until(lambda: sum(map(is_closed, strangers)) >= 50)
    site.client("anna")


def is_closed(connection: socket.socket) -> bool:
    """By the other side."""
    try:
        return not connection.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_a_packet_of_150_megabytes_ends_its_connection_and_nothing_else(site: Running, server: Server) -> None:
    with a_good_board_is_answered(site, server):
        before = site.memory()
        with Raw(site, "porch") as board:
            assert board.send_huge(0x30, 150 << 20) < 8 << 20  # what the sockets take before it is closed
        with Raw(site) as stranger:
            assert stranger.send_huge(0x10, 150 << 20) < 8 << 20
        assert site.memory() - before < 8 << 20


def test_events_for_a_reader_that_stands_still_do_not_fill_the_broker(site: Running, server: Server) -> None:
    """250 KB each, 150 MB at either QoS; about 25 MB may wait for one reader."""
    with a_good_board_is_answered(site, server), Raw(site, "anna") as person:
        person.subscribe(["aiflow/home/+/up/event"])
        board, before = site.client("porch"), site.memory()
        for qos in (0, 1):
            outcomes: Queue[Outcome] = Queue()
            for _ in range(20):
                for _ in range(30):
                    board.publish(topics.event("home", "porch"), bytes(250_000), qos=qos, on_outcome=outcomes.put)
                assert {outcomes.get(timeout=PATIENCE_S) for _ in range(30)} == {Outcome.DELIVERED}
        assert site.memory() - before < 64 << 20
        assert board.stats()["losses"] == 0


@pytest.mark.parametrize("site", [Options(memory_limit=8 << 20)], indirect=True)
def test_when_all_memory_is_taken_the_board_that_takes_it_is_cut_off_and_no_other(
    site: Running, server: Server
) -> None:
    with a_good_board_is_answered(site, server), Raw(site, "anna") as person:
        person.subscribe(["aiflow/home/+/up/event"])
        board, before = site.client("porch"), site.memory()

        def is_cut_off() -> bool:
            board.publish(topics.event("home", "porch"), bytes(250_000), qos=0)
            return board.stats()["losses"] > 0

        until(is_cut_off)
        assert site.memory() - before < 16 << 20
        board.close(0.0)


# ---- what must go on working ----


def test_people_set_switches_and_see_what_boards_say(site: Running) -> None:
    heard: Queue[Message] = Queue()
    names = ("front_enabled", "front_motion", "front_prompt", "paused", "paradigm", "quality_floor")
    filters = [topics.reply("home", "porch"), topics.server_statuses("home"), "aiflow/home/porch/down/set/+"]

    def obey(message: Message) -> None:
        name = message.topic.rsplit("/", 1)[1]
        board.publish(topics.state("home", "porch", name), message.payload, retain=True)

    board = site.client("porch", *filters, on_message=obey)
    watched = (f"aiflow/home/porch/up/{kind}" for kind in ("state/+", "event", "last", "status"))
    person = site.client("tablet", *watched, on_message=heard.put)
    for name in names:
        person.publish(topics.setting("home", "porch", name), name.encode())
    assert {heard.get(timeout=PATIENCE_S).payload.decode() for _ in names} == set(names)
    for topic in (kind("home", "porch") for kind in (topics.event, topics.last, topics.status)):
        board.publish(topic, b"{}", retain=topic.endswith("last"))
        assert heard.get(timeout=PATIENCE_S).topic == topic
    late: Queue[Message] = Queue()
    site.client("anna", "aiflow/home/+/up/state/+", "aiflow/home/+/up/last", on_message=late.put)
    assert len({late.get(timeout=PATIENCE_S).topic for _ in range(len(names) + 1)}) == len(names) + 1


def test_servers_of_a_pool_share_requests_and_return_each_others_probes(site: Running, server: Server) -> None:
    with a_good_board_is_answered(site, server):
        settings = site.settings("cellar", receive_maximum=64)
        arrivals: Queue[Arrival] = Queue()
        with Gateway(settings, "home", "cellar", SITE.pool, arrivals.put, dict) as other:
            assert other.is_proven.wait(PATIENCE_S)
            before = [gateway.client.stats()["received"] for gateway in (other, server.gateway)]
            for _ in range(10):
                for gateway in (other, server.gateway):
                    gateway.heartbeat()
            until(lambda: not other._probes._open and not server.gateway._probes._open)
            after = [gateway.client.stats()["received"] for gateway in (other, server.gateway)]
            assert sum(after) - sum(before) == 40  # each of the 20 probes once, and back once
            assert all(now - then > 10 for now, then in zip(after, before, strict=True))  # both servers get some
            assert other.summary()["probes"]["missing"] == 0


@pytest.mark.parametrize("site", [Options(pictures=True)], indirect=True)
def test_camera_software_sends_a_large_picture_where_that_is_allowed(site: Running) -> None:
    heard: Queue[Message] = Queue()
    limits = {"max_publish_bytes": MAX_PICTURE, "queue_bytes": MAX_PICTURE, "max_inbound_bytes": MAX_PICTURE + 1024}
    topic = topics.frame("home", "porch")
    for name in (topic, f"{topic}/#"):
        board = site.client("porch", name, limits=limits, on_message=heard.put)
        person = site.client("anna", limits=limits)
        for sent_to in (topic, f"{topic}/front")[: 1 + name.endswith("#")]:
            person.publish(sent_to, bytes(5 << 20), qos=0)
            message = heard.get(timeout=PATIENCE_S)
            assert (message.topic, len(message.payload)) == (sent_to, 5 << 20)
        for client in (board, person):
            client.close()


def test_people_cannot_speak_for_a_board_and_boards_cannot_speak_for_another(site: Running) -> None:
    for account, forbidden in (
        ("anna", [topics.request("home", "gate"), topics.event("home", "gate"), topics.reply("home", "gate")]),
        ("porch", [topics.request("home", "gate"), topics.event("home", "gate"), topics.reply("home", "porch")]),
        ("porch", [topics.setting("home", "porch", "paused"), topics.server_status("home", "attic"), "$CONTROL/x"]),
        ("attic", [topics.event("home", "gate"), topics.request("home", "gate"), topics.server_status("home", "b")]),
    ):
        client = site.client(account)
        outcomes: Queue[Outcome] = Queue()
        for topic in forbidden:
            client.publish(topic, b"{}", on_outcome=outcomes.put)
        assert {outcomes.get(timeout=PATIENCE_S) for _ in forbidden} == {Outcome.REFUSED}
        client.close()


def test_a_boards_last_will_cannot_say_that_a_server_is_offline(site: Running, server: Server) -> None:
    status = topics.server_status("home", "attic")
    site.client("porch", will=Publish(status, b'{"state": "offline"}', retain=True)).close()
    heard: Queue[Message] = Queue()
    site.client("anna", topics.server_statuses("home"), on_message=heard.put)
    assert json.loads(heard.get(timeout=PATIENCE_S).payload)["state"] == "online"


class Raw:
    """A connection by hand, in MQTT 3.1.1, for what a real client does not do; `with` closes it."""

    def __init__(self, site: Running, account: str | None = None, client_id: str | None = None) -> None:
        """account None: sends no CONNECT."""
        self._socket = socket.create_connection(("127.0.0.1", site.broker.port), PATIENCE_S)
        if account is not None:
            password = (site.folder / "passwords" / account).read_text().strip()
            words = [_text(client_id or account), _text(account), _text(password)]
            self._socket.sendall(_packet(0x10, _text("MQTT"), bytes([4, 0xC2, 0, 60]), *words))
            assert self._read(4) == bytes([0x20, 2, 0, 0])

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def subscribe(self, filters: list[str]) -> bytes:
        """The broker's answers, 0x80 for a refusal."""
        self._socket.sendall(_packet(0x82, b"\0\1", *(_text(name) + b"\1" for name in filters)))
        head = self._read(2)
        assert head[0] == 0x90
        assert head[1] < 0x80
        return self._read(head[1])[2:]

    def send_huge(self, kind: int, size: int) -> int:
        """How much of a packet the broker took until it closed the connection."""
        sent = 0
        with self._socket as sock:
            try:
                sock.sendall(bytes([kind]) + _length(size))
                while sent < size:
                    sent += sock.send(bytes(1 << 16))
            except ConnectionError:
                pass
        return sent

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            received = self._socket.recv(size - len(data))
            assert received, "the broker has closed the connection"
            data += received
        return data


def _text(text: str) -> bytes:
    return struct.pack(">H", len(text.encode())) + text.encode()


def _packet(kind: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return bytes([kind]) + _length(len(body)) + body


def _length(value: int) -> bytes:
    """MQTT 5, section 1.5.5."""
    low, value = value & 127, value >> 7
    return bytes([low | 128]) + _length(value) if value else bytes([low])


def test_validate_connects_with_the_rights_of_the_accounts(site: Running, board_bundle: Bundle, capsys: Any) -> None:
    (site.folder / "photo.jpg").write_bytes(photo(1))
    for name, table in (("porch", "board"), ("attic", "server")):
        account = msgspec.structs.asdict(login(site.folder, name, site.broker.port))
        tables: dict[str, Any] = {
            table: {"id": name, "bundle": str(board_bundle.path)},
            "mqtt": {key: value for key, value in account.items() if value is not None},
        }
        if table == "board":
            tables["cameras"] = [{"name": "front", "source": str(site.folder / "photo.jpg")}]
        (site.folder / f"{table}.toml").write_text(tomli_w.dumps(tables))
        assert main(["validate", "--connect", str(site.folder / f"{table}.toml")]) == 0, capsys.readouterr().out
