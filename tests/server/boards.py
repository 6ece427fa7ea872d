"""Boards for tests of a server, at a broker and without one."""

import json
import queue
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import Message, MqttClient, MqttConfig, MqttSettings
from edge_runtime.wire import ContentKind, Paradigm, Reply, Request, decode_reply, encode_request, encode_tokens, topics
from edge_runtime.wire.bitstream import encode
from server.config import Config, ServerConfig
from server.gateway import Arrival
from server.service import Service
from tests.brokers import Mosquitto
from tests.bundles import random_symbols

SYMBOLS = random_symbols(16, seed=1)
PATIENCE_S = 60  # for what must come; a test that waits so long has failed
SCRIPT = (  # a server process; its configuration is the argument
    "import argparse, pathlib, sys, firmware_tools.serve\n"
    "sys.exit(firmware_tools.serve.run(argparse.Namespace(config=pathlib.Path(sys.argv[1]), engine=None)))"
)


@dataclass
class Board:
    """A board's end of the wire, which keeps every reply as bytes."""

    name: str
    client: MqttClient
    replies: "queue.Queue[bytes]" = field(default_factory=queue.Queue)
    status: "queue.Queue[dict[str, object]]" = field(default_factory=queue.Queue)

    def ask(self, payload: bytes | Request) -> None:
        data = payload if isinstance(payload, bytes) else encode_request(payload)
        self.client.publish(topics.request("home", self.name), data)

    def reply(self) -> Reply:
        return decode_reply(self.replies.get(timeout=PATIENCE_S))

    def wait_for_status(self, **wanted: object) -> dict[str, object]:
        while True:
            status = self.status.get(timeout=PATIENCE_S)
            if wanted.items() <= status.items():
                return status


@contextmanager
def board_of(broker: Mosquitto, name: str) -> Iterator[Board]:
    """A board that is online, and reads the status of the server s1."""

    def on_message(message: Message) -> None:
        if message.topic.endswith("/status"):
            board.status.put(json.loads(message.payload))
        else:
            board.replies.put(message.payload)

    settings = MqttSettings("127.0.0.1", broker.port, client_id=name)
    subscriptions = [(topics.reply("home", name), 1), (topics.server_status("home", "s1"), 1)]
    board = Board(name, MqttClient(settings, subscriptions=subscriptions, on_message=on_message))
    with board.client:
        assert board.client.wait_online(PATIENCE_S)
        yield board


def config(bundle: Bundle, port: int = 1, **changes: object) -> Config:
    return Config(ServerConfig(id="s1", bundle=str(bundle.path), **changes), MqttConfig(port=port))


def request(bundle: Bundle, i: int = 0, draft: tuple[int, ...] = (), **changes: object) -> Request:
    """A latent's request, with room to change anything."""
    plain = Request(
        id=secrets.token_bytes(8),
        bundle=bundle.id,
        paradigm=Paradigm.SPECULATIVE if draft else Paradigm.SPLIT,
        age_ms=5,
        budget_ms=60_000,
        content_kind=ContentKind.LATENT,
        content=encode(SYMBOLS[i], bundle.tables, bundle.tables.levels - 1),
        draft=encode_tokens(draft),
    )
    return msgspec.structs.replace(plain, **changes)


class Lane:
    """Arrivals of one board, and what came of them."""

    def __init__(self, name: str = "b1") -> None:
        self.name, self.replies, self.accepted = name, [], 0

    def arrival(self, asked: Request) -> Arrival:
        data = encode_request(asked)
        return Arrival(
            self.name, data, time.monotonic(), self._accept, lambda reply, _: self.replies.append(decode_reply(reply))
        )

    def _accept(self) -> None:
        self.accepted += 1


def is_balanced(service: Service) -> bool:
    counts, status = service.counts, service.status()
    ended = sum(count for (name, _), count in counts.items() if name in ("replies", "repeated", "joined"))
    return counts["received", ""] == ended + status["queue"]["waiting"] + status["asked_above"]
