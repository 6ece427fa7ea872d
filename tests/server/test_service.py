"""The service behind a real broker, asked by a board."""

import json
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edge_runtime.bundle import Bundle
from edge_runtime.config import MqttConfig
from edge_runtime.mqtt import Message, MqttClient, MqttSettings
from edge_runtime.wire import (
    ContentKind,
    Options,
    Paradigm,
    Reply,
    Request,
    Status,
    Tier,
    decode_reply,
    encode,
    encode_request,
    encode_tokens,
    topics,
)
from server.batcher import Batch
from server.config import Config, ServerConfig
from server.engine import Engine, Job
from server.gateway import Arrival, Gateway
from server.reply_cache import ReplyCache
from server.service import Service, readable_id, run_server
from tests.brokers import Mosquitto
from tests.bundles import random_symbols

SYMBOLS = random_symbols(16, seed=1)
PATIENCE_S = 60  # for what must come; a test that waits so long has failed


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


@pytest.fixture
def board(broker: Mosquitto) -> Iterator[Board]:
    def on_message(message: Message) -> None:
        if message.topic.endswith("/status"):
            board.status.put(json.loads(message.payload))
        else:
            board.replies.put(message.payload)

    settings = MqttSettings("127.0.0.1", broker.port, "b1")
    subscriptions = [(topics.reply("home", "b1"), 1), (topics.server_status("home", "s1"), 1)]
    board = Board("b1", MqttClient(settings, subscriptions=subscriptions, on_message=on_message))
    with board.client:
        assert board.client.wait_online(PATIENCE_S)
        yield board


def config(bundle: Bundle, port: int = 1, **changes: object) -> Config:
    return Config(ServerConfig(id="s1", bundle=str(bundle.path), **changes), MqttConfig(port=port))


@pytest.fixture
def server(broker: Mosquitto, board: Board, bundle: Bundle) -> Iterator[threading.Event]:
    """A running server; the event stops it."""
    stop = threading.Event()
    thread = threading.Thread(target=run_server, args=(config(bundle, broker.port), stop))
    thread.start()
    try:
        board.wait_for_status(state="online", share_proven=True)
        yield stop
    finally:
        stop.set()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


def request(bundle: Bundle, i: int = 0, draft: tuple[int, ...] = (), **changes: object) -> Request:
    """A latent's request, with room to change anything."""
    plain = Request(
        id=secrets.token_bytes(8),
        bundle=bundle.id,
        paradigm=Paradigm.SPECULATIVE if draft else Paradigm.SPLIT,
        age_ms=5,
        budget_ms=60_000,
        content_kind=ContentKind.LATENT,
        content=encode(SYMBOLS[i], bundle.tables),
        draft=encode_tokens(draft),
    )
    return msgspec.structs.replace(plain, **changes)


def test_split_and_speculative_requests_get_the_targets_own_text(server, board, bundle, engine) -> None:
    own = engine.answer([Job(SYMBOLS[3], wants_label=True)])[0]
    board.ask(request(bundle, 3))
    split = board.reply()
    board.ask(request(bundle, 3, draft=(*own.tokens[:4], 5, *own.tokens[5:])))
    speculative = board.reply()
    for reply in (split, speculative):
        assert (reply.status, tuple(reply.token_ids)) == (Status.OK, own.tokens)
        assert reply.text == bundle.text(list(own.tokens))
        assert (reply.tier, reply.server, reply.confidence) == (Tier.EDGE, "s1", own.confidence)
        assert (reply.label, reply.scores) == (next(iter(own.scores)), own.scores)
        assert reply.hops[0].server == "s1"
        assert set(reply.hops[0].stages_ms) == {"decode", "tail", "look", "passes"}
    assert (split.accepted, split.proposed, split.passes) == (0, 0, own.passes)
    assert 0 < speculative.accepted <= speculative.proposed
    assert speculative.passes < own.passes


def test_a_picture_is_answered_as_its_latent_would_be(server, board, bundle, engine) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    webp = cv2.imencode(".webp", pixels[:, :, ::-1], [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()  # 101: lossless
    own = engine.answer([Job(engine.symbols(pixels))])[0]
    offload = msgspec.structs.replace(request(bundle), bundle=bytes(8), paradigm=Paradigm.OFFLOAD)  # no head, no bundle
    board.ask(msgspec.structs.replace(offload, content_kind=ContentKind.WEBP, content=webp))
    assert tuple(board.reply().token_ids) == own.tokens
    damaged = msgspec.structs.replace(
        offload, id=bytes(8), content_kind=ContentKind.JPEG, content=b"\xff\xd8 no picture"
    )
    board.ask(damaged)
    reply = board.reply()
    assert (reply.status, "picture" in reply.error) == (Status.BAD_REQUEST, True)


def test_a_repeated_id_gets_the_same_bytes_and_no_second_computation(server, board, bundle) -> None:
    asked = request(bundle, 1)
    board.ask(asked)
    first = board.replies.get(timeout=PATIENCE_S)
    board.ask(msgspec.structs.replace(asked, age_ms=900, budget_ms=1000))
    assert board.replies.get(timeout=PATIENCE_S) == first  # its times too: nothing was computed again


def test_every_request_that_cannot_be_answered_is_refused_by_name(server, board, bundle) -> None:
    good = request(bundle)
    damaged = bytearray(good.content)
    damaged[20] ^= 1
    asked = {
        "unknown version": encode_request(good).replace(b"\x01", b"\x63", 1),
        "bundle": msgspec.structs.replace(good, bundle=b"\x00" * 8),
        "tier": msgspec.structs.replace(good, options=Options(tier=Tier.CLOUD)),
        "temperature": msgspec.structs.replace(good, options=Options(temperature=0.7)),
        "bitstream": msgspec.structs.replace(good, content=bytes(damaged)),
        "bytes": msgspec.structs.replace(good, content=good.content[:40]),
    }
    wanted = dict.fromkeys(asked, Status.BAD_REQUEST) | {"bundle": Status.UNKNOWN_BUNDLE}
    for name, payload in asked.items():
        board.ask(payload)
        reply = board.reply()
        assert (reply.id, reply.status) == (good.id, wanted[name]), name
        assert reply.error
    for garbage in (b"", b"\xff" * 100, b"\x90"):
        board.ask(garbage)
        reply = board.reply()
        assert (reply.id, reply.status) == (bytes(8), Status.BAD_REQUEST)
    board.ask(good)
    assert board.reply().status is Status.OK


def test_a_request_without_time_left_is_stale(server, board, bundle) -> None:
    board.ask(request(bundle, budget_ms=0))
    assert board.reply().status is Status.STALE


def test_a_stopping_server_answers_what_it_accepted_and_says_offline(server, board, bundle) -> None:
    asked = [request(bundle, i) for i in range(5)]
    for one in asked:
        board.ask(one)
    first = board.reply()
    server.set()
    replies = [first, *(board.reply() for _ in asked[1:])]
    assert {reply.id for reply in replies} == {one.id for one in asked}
    assert {reply.status for reply in replies} <= {Status.OK, Status.BUSY}
    board.wait_for_status(state="offline")


def test_a_server_process_ends_well_on_sigterm(board: Board, bundle: Bundle, broker: Mosquitto, tmp_path: Path) -> None:
    text = f'[server]\nid = "s1"\nbundle = "{bundle.path}"\n[mqtt]\nport = {broker.port}\n'
    (tmp_path / "server.toml").write_text(text)
    code = (
        "import sys, pathlib, edge_runtime.config as c, server.config as s, server.service as r\n"
        "r.run_until_signal(c.load_toml(pathlib.Path(sys.argv[1]), s.Config))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "server.toml")]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
        try:
            board.wait_for_status(state="online", share_proven=True)
            board.ask(request(bundle, 2))
            assert board.reply().status is Status.OK
            process.terminate()
            board.wait_for_status(state="offline")
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def test_a_broker_that_comes_back_empty_finds_the_server_again(server, board, bundle, broker) -> None:
    broker.kill()
    broker.start()
    board.wait_for_status(state="online", share_proven=True)
    assert board.client.wait_online(PATIENCE_S)
    board.ask(request(bundle, 2))
    assert board.reply().status is Status.OK


# ---- without a broker: the service as a value, its two threads played by the test ----


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


@pytest.fixture
def make_service(bundle: Bundle, engine: Engine) -> Callable[..., Service]:
    return lambda **changes: Service(config(bundle, **changes).server, bundle, engine, ReplyCache())


def is_balanced(service: Service) -> bool:
    counts = service.counts
    ended = sum(counts[name] for name in (*(s.name.lower() for s in Status), "repeated", "joined"))
    return counts["received"] == ended + len(service.batcher)


def test_a_full_queue_says_busy_at_once_and_when_to_come_back(make_service, bundle) -> None:
    service, lane = make_service(queue=2), Lane()
    for i in range(3):
        service.receive(lane.arrival(request(bundle, i)))
    assert [reply.status for reply in lane.replies] == [Status.BUSY]
    assert lane.replies[0].retry_after_ms > 0
    assert lane.accepted == 3  # to the broker all are done with: the board was told
    assert is_balanced(service)
    service.answer(service.batcher.take(0))
    assert [reply.status for reply in lane.replies[1:]] == [Status.OK, Status.OK]
    assert is_balanced(service)


def test_a_flooding_board_cannot_keep_a_quiet_one_out(make_service, bundle) -> None:
    service, flood, quiet = make_service(queue=4), Lane("flood"), Lane("quiet")
    for i in range(6):
        service.receive(flood.arrival(request(bundle, i)))
    service.receive(quiet.arrival(request(bundle, 7)))
    assert [reply.status for reply in flood.replies] == [Status.BUSY] * 3
    service.answer(service.batcher.take(0))
    assert [reply.status for reply in quiet.replies] == [Status.OK]
    assert is_balanced(service)


def test_a_request_that_comes_again_while_it_is_served_is_not_started_again(make_service, bundle) -> None:
    service, lane, asked = make_service(), Lane(), request(bundle)
    service.receive(lane.arrival(asked))
    service.receive(lane.arrival(asked))
    assert len(service.batcher) == 1
    service.answer(service.batcher.take(0))
    service.receive(lane.arrival(asked))
    assert len(lane.replies) == 2
    assert lane.replies[0] == lane.replies[1]
    assert (service.counts["joined"], service.counts["repeated"]) == (1, 1)
    assert is_balanced(service)


def test_a_repeat_that_crosses_its_reply_gets_the_reply_again(make_service, bundle) -> None:
    service, lane, asked = make_service(), Lane(), request(bundle)
    first = lane.arrival(asked)

    def reply_and_ask_again(data: bytes, expiry_s: float) -> None:
        first.reply(data, expiry_s)
        service.receive(lane.arrival(asked))

    service.receive(replace(first, reply=reply_and_ask_again))
    service.answer(service.batcher.take(0))
    assert len(lane.replies) == 2
    assert lane.replies[0] == lane.replies[1]


def test_the_same_id_of_another_board_is_another_request(make_service, bundle) -> None:
    service, one, other, asked = make_service(), Lane("b1"), Lane("b2"), request(bundle)
    service.receive(one.arrival(asked))
    service.receive(other.arrival(asked))
    service.answer(service.batcher.take(0))
    assert (len(one.replies), len(other.replies)) == (1, 1)


def test_a_busy_reply_is_not_remembered(make_service, bundle) -> None:
    service, lane, asked = make_service(queue=1), Lane(), request(bundle)
    service.receive(lane.arrival(request(bundle, 1)))
    service.receive(lane.arrival(asked))
    service.answer(service.batcher.take(0))
    service.receive(lane.arrival(asked))
    service.answer(service.batcher.take(0))
    assert [reply.status for reply in lane.replies] == [Status.BUSY, Status.OK, Status.OK]


def test_an_engine_that_breaks_fails_its_batch_by_name_and_the_next_is_served(
    make_service, bundle, monkeypatch
) -> None:
    service, lane = make_service(), Lane()
    service.receive(lane.arrival(request(bundle, 0)))

    def broken(_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(service.engine, "answer", broken)
        service.answer(service.batcher.take(0))
    service.receive(lane.arrival(request(bundle, 1)))
    service.answer(service.batcher.take(0))
    assert [reply.status for reply in lane.replies] == [Status.FAILED, Status.OK]
    assert is_balanced(service)


def test_stopping_finishes_what_was_accepted(make_service, bundle) -> None:
    service, lane, stop = make_service(), Lane(), threading.Event()
    for i in range(11):  # more than one batch
        service.receive(lane.arrival(request(bundle, i)))
    stop.set()
    service.serve(stop, lambda: True)
    assert [reply.status for reply in lane.replies] == [Status.OK] * 11
    assert is_balanced(service)


def test_stopping_without_time_left_still_answers_everybody(make_service, bundle) -> None:
    service, lane, stop = make_service(stop_s=0.0), Lane(), threading.Event()
    for i in range(3):
        service.receive(lane.arrival(request(bundle, i)))
    stop.set()
    service.serve(stop, lambda: True)
    service.receive(lane.arrival(request(bundle, 4)))
    assert [reply.status for reply in lane.replies] == [Status.BUSY] * 4
    assert is_balanced(service)
    assert service.answer(Batch()) is None


def test_the_status_names_bundle_queue_prices_and_numerics(make_service, bundle, engine) -> None:
    service, lane = make_service(), Lane()
    service.receive(lane.arrival(request(bundle)))
    assert service.status()["queue"] == {"waiting": 1, "capacity": 64}
    service.answer(service.batcher.take(0))
    status = json.loads(json.dumps(service.status()))
    assert status["bundles"] == {bundle.id.hex(): bundle.manifest.name}
    assert status["queue"]["waiting"] == 0
    assert status["numerics"] == engine.proof.numerics
    assert status["price_ms"]["batch"] > status["price_ms"]["pass"] > 0
    assert status["counts"] == {"received": 1, "ok": 1}


@pytest.mark.parametrize("payload", [b"", b"\x90", b"\x92\x01\xc4\x04abcd", b"\xdd\xff\xff\xff\xff", b"[1]"])
def test_an_unreadable_request_has_the_zero_id(payload: bytes) -> None:
    assert readable_id(payload) == bytes(8)


def test_probes_of_other_servers_are_dropped_and_never_answered(server, board, broker) -> None:
    board.ask(b"probe of another server")
    board.ask(b"")
    assert board.reply().status is Status.BAD_REQUEST
    assert board.replies.empty()


def test_a_gateway_is_unproven_until_its_own_probe_returns(broker: Mosquitto) -> None:
    arrivals: list[Arrival] = []
    with ExitStack() as stack:
        settings = MqttSettings("127.0.0.1", broker.port, "s2")
        gateway = stack.enter_context(Gateway(settings, "home", "s2", "servers", arrivals.append, dict))
        assert gateway.is_proven.wait(PATIENCE_S)
        assert gateway.heartbeat()
    assert arrivals == []
