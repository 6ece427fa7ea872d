"""The service behind a real broker, asked by a board."""

import json
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edge_runtime.config import MetricsConfig, MqttConfig
from edge_runtime.inference.bundle import MANIFEST, Bundle, BundleError, FileRecord, file_hash
from edge_runtime.mqtt.client import Message, MqttClient, MqttSettings
from edge_runtime.wire import (
    ContentKind,
    Options,
    Paradigm,
    Reply,
    Request,
    Status,
    Tier,
    decode_reply,
    decode_request,
    encode,
    encode_reply,
    encode_request,
    encode_tokens,
    topics,
)
from server.batcher import Batch
from server.config import Config, ServerConfig, UpstreamConfig
from server.engine import Engine, Job
from server.gateway import Arrival, Gateway
from server.loading import load_engine
from server.reply_cache import ReplyCache
from server.service import Service, load, readable_id, run_server
from server.upstream import Upstream
from testbed.broker import free_port
from tests.brokers import Mosquitto
from tests.bundles import MAX_TOKENS, random_symbols

SYMBOLS = random_symbols(16, seed=1)
PATIENCE_S = 60  # for what must come; a test that waits so long has failed
SCRIPT = (  # a server process; its configuration is the argument
    "import argparse, pathlib, sys, firmware_tools.serve\n"
    "sys.exit(firmware_tools.serve.run(argparse.Namespace(config=pathlib.Path(sys.argv[1]))))"
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
    answers = [engine.answer([Job(symbols, wants_label=True)])[0] for symbols in SYMBOLS[:8]]
    i, own = next((i, answer) for i, answer in enumerate(answers) if len(answer.tokens) > 6)
    board.ask(request(bundle, i))
    split = board.reply()
    board.ask(request(bundle, i, draft=(*own.tokens[:4], 5, *own.tokens[5:])))
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


def test_who_lets_the_server_propose_gets_the_same_texts_in_fewer_passes(server, board, bundle) -> None:
    passes = {False: 0, True: 0}
    for i in range(len(SYMBOLS)):
        texts = []
        for propose in passes:
            board.ask(request(bundle, i, options=Options(propose=propose)))
            reply = board.reply()
            assert (reply.status, reply.proposed) == (Status.OK, 0)  # of a draft's words
            passes[propose] += reply.passes
            texts.append(reply.token_ids)
        assert texts[0] == texts[1]
    assert passes[True] < passes[False]


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
        "loop": msgspec.structs.replace(good, options=Options(via=("e0", "s1"))),
        "too many tiers": msgspec.structs.replace(good, options=Options(via=("e0", "e1", "e2", "e3"))),
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
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "server.toml")]
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


def test_a_servers_counters_are_exported_with_its_connections(board, bundle, broker) -> None:
    port, stop = free_port(), threading.Event()
    exporting = msgspec.structs.replace(config(bundle, broker.port, max_batch=1), metrics=MetricsConfig(port=port))
    thread = threading.Thread(target=run_server, args=(exporting, stop))
    thread.start()
    try:
        board.wait_for_status(state="online", share_proven=True)
        board.ask(b"")
        assert board.reply().status is Status.BAD_REQUEST
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as response:
            lines = response.read().decode().splitlines()
        assert 'aiflow_server_replies_total{status="bad_request"} 1.0' in lines
        assert 'aiflow_server_mqtt_total{what="connects"} 1.0' in lines
        assert {"aiflow_server_undelivered_total 0.0", "aiflow_server_foreign_topics_total 0.0"} <= set(lines)
    finally:
        stop.set()
        thread.join(PATIENCE_S)


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
    return counts["received"] == ended + len(service.batcher) + service.status()["asked_above"]


@pytest.mark.parametrize("options", [Options(tier=Tier.CLOUD), Options(min_confidence=1.0)])
def test_a_server_without_a_tier_above_answers_with_what_it_has(make_service, bundle, engine, options) -> None:
    service, lane = make_service(), Lane()
    service.receive(lane.arrival(request(bundle, options=options)))
    service.answer(service.batcher.take(0))
    (reply,) = lane.replies
    assert (reply.status, reply.tier, reply.server, reply.final) == (Status.OK, Tier.EDGE, "s1", True)
    assert tuple(reply.token_ids) == engine.answer([Job(SYMBOLS[0])])[0].tokens
    assert service.counts["alone_no_upstream"] == 1
    assert is_balanced(service)


def test_a_request_that_passed_this_server_before_is_counted_as_a_loop(make_service, bundle) -> None:
    service, lane = make_service(), Lane()
    service.receive(lane.arrival(request(bundle, options=Options(via=("s1",)))))
    assert "s1 -> s1" in lane.replies[0].error
    assert (service.counts["loop"], service.counts["bad_request"]) == (1, 1)
    assert is_balanced(service)


def test_a_picture_that_is_small_to_send_and_large_to_decode_is_refused(make_service, bundle) -> None:
    service, lane = make_service(), Lane()
    content = cv2.imencode(".png", np.zeros((2001, 2000), np.uint8))[1].tobytes()
    offload = request(bundle, paradigm=Paradigm.OFFLOAD, content_kind=ContentKind.JPEG, content=content)
    service.receive(lane.arrival(offload))
    service.answer(service.batcher.take(0))
    assert lane.replies[0].status is Status.BAD_REQUEST
    assert "claims 2000 x 2001 pixels, at most 4000000 are decoded" in lane.replies[0].error


def test_a_vocabulary_that_is_none_is_found_at_start(bundle, tmp_path) -> None:
    for file in bundle.path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    words = tmp_path / "vocabulary.txt"
    words.unlink()
    words.write_text("<pad>\n")
    files = bundle.manifest.files | {words.name: FileRecord(file_hash(words), words.stat().st_size)}
    (tmp_path / MANIFEST).unlink()
    (tmp_path / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(bundle.manifest, files=files)))
    with pytest.raises(BundleError, match="has 1 words, the manifest says 40"):
        load(ServerConfig("s1", str(tmp_path), max_batch=1))


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


def test_a_request_that_cannot_be_answered_in_time_is_told_so_at_once(make_service, bundle) -> None:
    """Under overload a full queue would answer everything too late."""
    service, lane, other = make_service(max_batch=1), Lane(), Lane("other")
    service.receive(lane.arrival(request(bundle, 0)))
    service.answer(service.batcher.take(0))
    service._prices["batch"].clear()
    service._prices["batch"].append(1000.0)
    for i in (1, 2, 3):
        service.receive(lane.arrival(request(bundle, i, budget_ms=2500)))
    assert [(reply.status, reply.retry_after_ms) for reply in lane.replies[1:]] == [(Status.BUSY, 3000)]
    assert "3000 ms now" in lane.replies[1].error
    service.receive(other.arrival(request(bundle, 4, budget_ms=2500)))  # its turn comes sooner
    assert not other.replies
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


# ---- tiers: board -> broker -> edge server -> another broker -> cloud server ----

WANTS_CLOUD = Options(tier=Tier.CLOUD)


@dataclass
class Sites:
    """Two sites, and what runs a server between them."""

    bundle: Bundle
    engine: Engine
    below: Mosquitto
    above: Mosquitto

    def up(self, broker: Mosquitto | None = None, site: str = "hq", **changes: object) -> UpstreamConfig:
        """The table [upstream] to the upper site, with nothing going up that is not asked for."""
        quiet = {"min_confidence": 0.0, "max_share": 1.0, "explore": 0.0} | changes
        return UpstreamConfig(MqttConfig(port=(broker or self.above).port), site=site, **quiet)

    @contextmanager
    def serving(
        self, name: str, tier: str, broker: Mosquitto, site: str = "home", up: UpstreamConfig | None = None
    ) -> Iterator[Service]:
        """A server on a thread, as `run_server` puts it together, once its brokers have answered."""
        own = load_engine(self.bundle, (tier,))  # an engine is for one thread
        own.proof = self.engine.proof
        upstream = Upstream(up, name) if up else None
        settings = ServerConfig(id=name, bundle="", site=site, tier=tier)
        service, stop = Service(settings, self.bundle, own, ReplyCache(), upstream), threading.Event()
        with ExitStack() as stack:
            client = MqttSettings("127.0.0.1", broker.port, name, receive_maximum=64)
            gateway = Gateway(client, site, name, "servers", service.receive, service.status)
            stack.enter_context(gateway)
            if upstream:
                stack.enter_context(upstream)
                assert upstream.wait_online(PATIENCE_S)
            thread = threading.Thread(target=service.serve, args=(stop, gateway.heartbeat))
            thread.start()
            stack.callback(thread.join)
            stack.callback(stop.set)
            assert gateway.is_proven.wait(PATIENCE_S)
            yield service

    @contextmanager
    def process(self, folder: Path, text: str) -> Iterator["subprocess.Popen[bytes]"]:
        (folder / "tiers.toml").write_text(text)
        command = [sys.executable, "-c", SCRIPT, str(folder / "tiers.toml")]
        with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
            try:
                yield process
            finally:
                process.kill()

    def own_text(self, tier: str, i: int) -> tuple[int, ...]:
        return self.engine.answer([Job(SYMBOLS[i], tier=tier)])[0].tokens


@pytest.fixture
def sites(bundle: Bundle, engine: Engine, broker: Mosquitto, start_broker: Callable[..., Mosquitto]) -> Sites:
    return Sites(bundle, engine, broker, start_broker())


def test_the_board_gets_the_edges_text_at_once_and_then_the_clouds_own(sites: Sites, board: Board) -> None:
    with (
        sites.serving("c1", "cloud", sites.above, "hq") as cloud,
        sites.serving("e1", "edge", sites.below, up=sites.up()) as edge,
    ):
        differing = sum(sites.own_text("edge", i) != sites.own_text("cloud", i) for i in range(4))
        for i in range(4):
            asked = request(sites.bundle, i, draft=(5, 6, 7), options=WANTS_CLOUD)
            board.ask(asked)
            first, last = board.reply(), board.reply()
            assert (first.id, first.tier, first.server, first.final) == (asked.id, Tier.EDGE, "e1", False)
            assert tuple(first.token_ids) == sites.own_text("edge", i)
            assert (last.id, last.tier, last.server, last.final) == (asked.id, Tier.CLOUD, "c1", True)
            assert tuple(last.token_ids) == sites.own_text("cloud", i)
            assert last.text == sites.bundle.text(last.token_ids)
            assert [(hop.tier, hop.server) for hop in last.hops] == [(Tier.EDGE, "e1"), (Tier.CLOUD, "c1")]
            # The edge's text was the draft, not the board's; its last token could not be followed by the end.
            assert last.proposed == min(len(first.token_ids), MAX_TOKENS - 1)
        board.ask(request(sites.bundle, 5))  # nobody wants more
        only = board.reply()
        assert (only.tier, only.final) == (Tier.EDGE, True)
        assert is_balanced(edge)
        assert is_balanced(cloud)
    assert (edge.counts["escalated"], edge.counts["escalated_tier"], edge.counts["answered_above"]) == (4, 4, 4)
    assert edge.counts["changed"] == edge.counts["changed_tier"] == differing
    assert edge.counts["unchanged"] == 4 - differing
    assert (edge.counts["ok"], cloud.counts["ok"]) == (5, 4)
    status = json.loads(json.dumps(edge.status()))["upstream"]
    assert status["requests"]["answered"] == 4
    assert status["round_trip_ms"]["p95"] > 0


@pytest.mark.parametrize(
    ("reason", "bounds", "options"),
    [
        ("confidence", {"min_confidence": 1.0}, None),
        ("confidence", {}, Options(min_confidence=1.0)),
        ("explore", {"explore": 1.0}, None),
    ],
)
def test_an_unsure_answer_goes_up_and_so_does_a_share_of_the_others(sites, board, reason, bounds, options) -> None:
    with (
        sites.serving("c1", "cloud", sites.above, "hq"),
        sites.serving("e1", "edge", sites.below, up=sites.up(**bounds)) as edge,
    ):
        board.ask(request(sites.bundle, 1, options=options))
        assert [(reply.tier, reply.final) for reply in (board.reply(), board.reply())] == [
            (Tier.EDGE, False),
            (Tier.CLOUD, True),
        ]
    assert edge.counts[f"escalated_{reason}"] == 1


def test_three_tiers_tell_the_board_three_texts_and_the_last_is_the_highests_own(sites: Sites, board: Board) -> None:
    with (
        sites.serving("c1", "cloud", sites.above, "hq"),
        sites.serving("r1", "edge", sites.above, "region", up=sites.up()),
        sites.serving("e1", "edge", sites.below, up=sites.up(site="region")) as edge,
    ):
        board.ask(request(sites.bundle, 2, options=WANTS_CLOUD))
        replies = [board.reply() for _ in range(3)]
        assert is_balanced(edge)
    assert [(reply.server, reply.final) for reply in replies] == [("e1", False), ("r1", False), ("c1", True)]
    assert tuple(replies[-1].token_ids) == sites.own_text("cloud", 2)
    assert [hop.server for hop in replies[-1].hops] == ["e1", "r1", "c1"]


def test_only_the_last_word_is_kept_and_a_board_that_asks_meanwhile_gets_the_first_again(sites, board) -> None:
    cloud_topic = topics.request("hq", "e1")
    requests: queue.Queue[Message] = queue.Queue()
    settings = MqttSettings("127.0.0.1", sites.above.port, "c1")
    with (
        MqttClient(settings, subscriptions=[(cloud_topic, 1)], on_message=requests.put) as cloud,
        sites.serving("e1", "edge", sites.below, up=sites.up()) as edge,
    ):
        assert cloud.wait_online(PATIENCE_S)
        asked = request(sites.bundle, 3, options=WANTS_CLOUD)
        board.ask(asked)
        first = board.replies.get(timeout=PATIENCE_S)
        board.ask(asked)
        assert board.replies.get(timeout=PATIENCE_S) == first
        up = decode_request(requests.get(timeout=PATIENCE_S).payload)
        assert up.options == Options(tier=Tier.CLOUD, via=("e1",))
        answer = Reply(id=up.id, status=Status.OK, tokens=encode_tokens([9]), tier=Tier.CLOUD, server="c1")
        cloud.publish(topics.reply("hq", "e1"), encode_reply(answer))
        last = board.replies.get(timeout=PATIENCE_S)
        assert (decode_reply(last).token_ids, decode_reply(last).final) == ([9], True)
        board.ask(asked)
        assert board.replies.get(timeout=PATIENCE_S) == last
        assert is_balanced(edge)
    assert (edge.counts["joined"], edge.counts["repeated"], edge.counts["escalated"]) == (1, 1, 1)


def test_without_a_cloud_on_its_broker_the_edge_has_the_last_word(sites: Sites, board: Board) -> None:
    with sites.serving("e1", "edge", sites.below, up=sites.up()) as edge:
        board.ask(request(sites.bundle, 1, budget_ms=3000, options=WANTS_CLOUD))
        first, last = board.reply(), board.reply()
        assert (last.tier, last.server, last.final) == (Tier.EDGE, "e1", True)
        assert last == msgspec.structs.replace(first, final=True)
        assert edge.counts["alone_no_reply"] == 1
        board.ask(request(sites.bundle, 2, budget_ms=2500, options=WANTS_CLOUD))
        assert board.reply().final  # in less time there would be no reply either
        assert edge.counts["alone_too_late"] == 1
        assert is_balanced(edge)


def test_a_refusal_from_above_leaves_the_edges_text(sites: Sites, board: Board) -> None:
    with (
        sites.serving("c1", "cloud", sites.above, "hq") as cloud,
        sites.serving("e1", "edge", sites.below, up=sites.up()) as edge,
    ):
        board.ask(request(sites.bundle, 1, options=Options(tier=Tier.CLOUD, via=("c1",))))
        first, last = board.reply(), board.reply()
        assert last == msgspec.structs.replace(first, final=True)
    assert (cloud.counts["loop"], edge.counts["alone_bad_request"]) == (1, 1)


def test_a_server_whose_tier_above_is_itself_refuses_the_loop_and_answers(sites: Sites, board: Board) -> None:
    itself = sites.up(sites.below, "home")
    with sites.serving("e1", "edge", sites.below, up=itself) as edge:
        board.ask(request(sites.bundle, 1, options=WANTS_CLOUD))
        first, last = board.reply(), board.reply()
        assert (first.final, last) == (False, msgspec.structs.replace(first, final=True))
        assert (edge.counts["loop"], edge.counts["alone_bad_request"], edge.counts["ok"]) == (1, 1, 1)
        assert is_balanced(edge)


def test_a_frozen_broker_above_costs_the_update_and_never_the_answer(sites: Sites, board: Board) -> None:
    with (
        sites.serving("c1", "cloud", sites.above, "hq"),
        sites.serving("e1", "edge", sites.below, up=sites.up()) as edge,
    ):
        sites.above.freeze()
        while not edge.counts["alone_offline"]:  # it is online until it has been silent for long enough
            board.ask(request(sites.bundle, 1, budget_ms=2000, options=WANTS_CLOUD))
            while not (reply := board.reply()).final:
                pass
            assert (reply.tier, reply.server) == (Tier.EDGE, "e1")
        sites.above.thaw()
        assert edge.upstream.wait_online(PATIENCE_S)
        board.ask(request(sites.bundle, 2, options=WANTS_CLOUD))
        assert [(reply.tier, reply.final) for reply in (board.reply(), board.reply())] == [
            (Tier.EDGE, False),
            (Tier.CLOUD, True),
        ]
        assert is_balanced(edge)


def test_a_cloud_killed_with_a_request_in_hand_leaves_the_edges_text(
    sites: Sites, board: Board, tmp_path: Path
) -> None:
    text = f'[server]\nid = "c1"\nbundle = "{sites.bundle.path}"\nsite = "hq"\ntier = "cloud"\nmax_batch = 1\n'
    with (
        sites.process(tmp_path, text + f"[mqtt]\nport = {sites.above.port}\n") as cloud,
        sites.serving("e1", "edge", sites.below, up=sites.up()),
    ):
        replies: list[Reply] = []
        while not replies or replies[-1].tier is not Tier.CLOUD:  # until it is there
            board.ask(request(sites.bundle, 1, budget_ms=3000, options=WANTS_CLOUD))
            replies = [board.reply()]
            while not replies[-1].final:
                replies.append(board.reply())
        cloud.send_signal(signal.SIGSTOP)
        board.ask(request(sites.bundle, 2, budget_ms=8000, options=WANTS_CLOUD))
        first = board.reply()
        cloud.kill()
        last = board.reply()
        assert (first.final, last) == (False, msgspec.structs.replace(first, final=True))
        assert (last.tier, tuple(last.token_ids)) == (Tier.EDGE, sites.own_text("edge", 2))


def test_a_server_that_stops_ends_what_it_asked_above_with_its_own_text(sites, board, tmp_path) -> None:
    text = f'[server]\nid = "s1"\nbundle = "{sites.bundle.path}"\nmax_batch = 1\n[mqtt]\nport = {sites.below.port}\n'
    text += f'[upstream]\nsite = "hq"\n[upstream.mqtt]\nport = {sites.above.port}\n'
    with sites.process(tmp_path, text) as edge:
        while True:
            status = board.wait_for_status(state="online", share_proven=True)
            if status["upstream"]["state"] == "online":
                break
        board.ask(request(sites.bundle, 2, options=WANTS_CLOUD))
        first = board.reply()
        edge.terminate()
        last = board.reply()
        assert (first.final, last) == (False, msgspec.structs.replace(first, final=True))
        board.wait_for_status(state="offline")
        assert edge.wait(PATIENCE_S) == 0
