"""A server whose target is another server: the path of a request from a board to it and back."""

import json
import logging
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from benchmarks.unreliable_target import measure
from edge_runtime.app import run_board
from edge_runtime.config import BoardConfig, CameraConfig, RuntimeConfig
from edge_runtime.mqtt import MqttConfig
from edge_runtime.wire import (
    AnsweredBy,
    ContentKind,
    Event,
    Options,
    Paradigm,
    Reply,
    Request,
    Status,
    Tier,
    decode_reply,
    encode_request,
)
from server.app import load_target, run_server
from server.config import Config, OpenAIConfig, ServerConfig, UpstreamConfig
from server.counters import SERVER, values
from server.gateway import Arrival
from server.received import Received
from server.reply_cache import ReplyCache
from server.service import Service
from server.serving import serve
from server.targets.openai import OpenAITarget
from server.watchdog import Watchdog
from testbed.chat_server import Behaviour, ChatServer, text_of
from tests.brokers import Mosquitto
from tests.server.boards import board_of, is_balanced
from tests.server.boards import request as latent

ROOT = Path(__file__).parents[3]
PATIENCE_S = 60.0


def picture(number: int = 0) -> bytes:
    """A JPEG like no other."""
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def offload(number: int = 0, **changes: object) -> Request:
    plain = Request(
        id=number.to_bytes(8, "big"),
        bundle=bytes(8),
        paradigm=Paradigm.OFFLOAD,
        age_ms=0,
        budget_ms=60_000,
        content_kind=ContentKind.JPEG,
        content=picture(number),
    )
    return msgspec.structs.replace(plain, **changes)


class Board:
    """Arrivals of one board, and a queue of what came of them."""

    def __init__(self, service: Service, name: str = "b1") -> None:
        self.name, self._service, self.data = name, service, queue.Queue[bytes]()

    def ask(self, request: Request) -> None:
        reply = lambda data, _: self.data.put(data)  # noqa: E731
        self._service.receive(Arrival(self.name, encode_request(request), time.monotonic(), lambda: None, reply))

    def reply(self) -> Reply:
        return decode_reply(self.data.get(timeout=PATIENCE_S))


@contextmanager
def serving(other: ChatServer, queue: int = 64, **changes: object) -> Iterator[Service]:
    """A service without a broker."""
    target = OpenAITarget(other.url, OpenAIConfig("fake", **changes))
    service, stop = Service(ServerConfig("s1", target="openai:x", queue=queue), target, ReplyCache()), threading.Event()
    thread = threading.Thread(target=serve, args=(service, stop))
    thread.start()
    try:
        yield service
    finally:
        stop.set()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_a_picture_is_answered_with_the_other_servers_text_and_its_usage(other: ChatServer) -> None:
    with serving(other, input_price=1.0) as service:
        board = Board(service)
        board.ask(offload(options=Options(questions=("gate",))))
        reply = board.reply()
    assert (reply.status, reply.text, reply.server) == (Status.OK, text_of(picture()), "s1")
    assert (reply.tokens, reply.confidence, reply.proposed, reply.passes) == (b"", None, 0, 0)
    (hop,) = reply.hops
    assert (hop.usage.input_tokens, hop.usage.currency) == (300, "USD")
    assert set(hop.stages_ms) == {"decode", "call"}
    assert service.counts["questions", "unknown"] == 1
    assert is_balanced(service)


def test_a_latent_is_refused_by_name_so_that_its_board_asks_another_server(other: ChatServer, bundle) -> None:
    with serving(other) as service:
        board = Board(service)
        board.ask(latent(bundle))
        reply = board.reply()
    assert reply.status is Status.UNKNOWN_BUNDLE
    assert "takes pictures only" in reply.error
    assert other.asked == []


def test_what_is_no_picture_never_reaches_the_other_server(other: ChatServer) -> None:
    with serving(other) as service:
        board = Board(service)
        board.ask(offload(content=b"\xff\xd8 no picture"))
        assert board.reply().status is Status.BAD_REQUEST
    assert other.asked == []


def test_a_repeat_gets_the_same_bytes_and_is_not_paid_twice(other: ChatServer) -> None:
    with serving(other) as service:
        board = Board(service)
        other.hold.clear()
        board.ask(offload())
        assert other.arrived.acquire(timeout=PATIENCE_S)
        board.ask(offload())  # while it is being answered
        other.hold.set()
        first = board.data.get(timeout=PATIENCE_S)
        board.ask(offload())  # and afterwards
        assert board.data.get(timeout=PATIENCE_S) == first
    assert other.billed == {text_of(picture()): 1}
    assert (service.counts["joined", ""], service.counts["repeated", ""]) == (1, 1)
    assert is_balanced(service)


def test_a_slow_call_delays_neither_its_own_board_nor_others(other: ChatServer) -> None:
    other.behave = lambda call: "stall" if call == 0 else "answer"
    with serving(other, calls=4, timeout_s=PATIENCE_S) as service:
        slow, quick = Board(service, "b1"), Board(service, "b2")
        slow.ask(offload(0, budget_ms=600_000))
        assert other.arrived.acquire(timeout=PATIENCE_S)
        for number in (1, 2, 3):
            slow.ask(offload(number))
            quick.ask(offload(10 + number))
        assert {slow.reply().id[-1] for _ in range(3)} == {1, 2, 3}
        assert {quick.reply().id[-1] for _ in range(3)} == {11, 12, 13}
        service.target.close()
        assert slow.reply().status is Status.BUSY
    assert is_balanced(service)


def test_one_board_cannot_occupy_all_calls(other: ChatServer) -> None:
    other.hold.clear()
    with serving(other, calls=2) as service:
        greedy, quick = Board(service, "b1"), Board(service, "b2")
        for number in range(3):
            greedy.ask(offload(number))
        assert other.arrived.acquire(timeout=PATIENCE_S)
        quick.ask(offload(9))
        assert other.arrived.acquire(timeout=PATIENCE_S)
        assert [asked.picture for asked in other.asked] == [picture(0), picture(9)]
        other.hold.set()
        assert quick.reply().status is Status.OK
        assert [greedy.reply().status for _ in range(3)] == [Status.OK] * 3


def test_calls_that_fail_for_a_while_are_busy_and_others_have_failed(
    other: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.targets.paid_calls.FIRST_WAIT_S", 0.01)
    other.behave = lambda call: "error_500" if call else "error_401"
    with serving(other) as service:
        board = Board(service)
        for number in (1, 2):
            board.ask(offload(number))
            other.arrived.acquire(timeout=PATIENCE_S)
        busy, failed = sorted((board.reply(), board.reply()), key=lambda reply: reply.status)
    assert (failed.status, "key_file" in failed.error) == (Status.FAILED, True)
    assert (busy.status, busy.retry_after_ms is not None) == (Status.BUSY, True)
    assert is_balanced(service)


def test_a_board_that_asks_again_and_again_pays_for_four_calls(
    other: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.targets.paid_calls.FIRST_WAIT_S", 0.01)
    other.behave = lambda call: "error_503" if 0 < call < 4 else "reset"
    with serving(other, output_price=1.0) as service:
        board = Board(service)
        board.ask(offload())
        assert board.reply().status is Status.BUSY
        for _ in range(3):
            board.ask(offload())
            reply = board.reply()
            assert (reply.status, "4 calls for this request may have been billed" in reply.error) == (
                Status.FAILED,
                True,
            )
    assert len(other.asked) == 3 + 4
    assert is_balanced(service)


@pytest.mark.parametrize("calls", [1, 4])  # with one, the thread that must notice the stop is itself in the call
def test_a_server_that_stops_ends_its_calls_and_tells_their_boards(other: ChatServer, calls: int) -> None:
    other.behave = lambda _: "stall"
    target, stop = OpenAITarget(other.url, OpenAIConfig("fake", calls=calls)), threading.Event()
    service = Service(ServerConfig("s1", target="openai:x", stop_s=0.0), target, ReplyCache())
    thread = threading.Thread(target=serve, args=(service, stop))
    thread.start()
    board = Board(service)
    for number in range(3):
        board.ask(offload(number))
    assert other.arrived.acquire(timeout=PATIENCE_S)
    stop.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert [board.reply().status for _ in range(3)] == [Status.BUSY] * 3
    assert is_balanced(service)


class Share:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def heartbeat(self) -> bool:
        return True

    def suspend(self, reason: str) -> None:
        self.calls.append(f"suspend: {reason}")

    def resume(self) -> None:
        self.calls.append("resume")


def test_a_server_whose_budget_is_spent_leaves_its_share_until_the_next_day(other: ChatServer) -> None:
    day = [20_000.5 * 86_400]
    config = OpenAIConfig("fake", output_price=1.0, max_tokens=20, budget_per_day=0.00002)
    target = OpenAITarget(other.url, config, lambda: day[0])
    service, share = Service(ServerConfig("s1", target="openai:x"), target, ReplyCache()), Share()
    watchdog = Watchdog(service, share)
    watchdog.check(1.0)
    assert share.calls == []
    assert target._answer(target_job()).error == ""
    for second in (2.0, 3.0):
        watchdog.check(second)
    assert share.calls == ["suspend: the budget of the day is spent, the next day begins at 2024-10-05 00:00 UTC"]
    day[0] += 86_400
    watchdog.check(4.0)
    assert share.calls[1:] == ["resume"]


def target_job() -> object:
    from server.targets import PictureJob

    return PictureJob(picture(), "image/jpeg", np.zeros((224, 224, 3), np.uint8), time.monotonic() + PATIENCE_S)


def test_its_status_says_what_it_takes_and_what_it_has_used(other: ChatServer) -> None:
    with serving(other, output_price=2.0, budget_per_day=5.0, calls=3, max_tokens=70) as service:
        board = Board(service)
        board.ask(offload())
        board.reply()
        status = json.loads(json.dumps(service.status()))
    assert status["target"] == {
        "name": f"openai:{other.url}",
        "latents": False,
        "pictures": True,
        "drafts": False,
        "labels": False,
        "sample": False,
        "verified": "none",
        "tokenizer": "",
        "prompts": ["door"],
        "refused": {},
        "limits": {"batch": 1, "calls": 3, "max_tokens": 70},
    }
    assert (status["strict"], status["bundles"], status["pictures"]) == (False, {}, True)
    assert status["usage"]["budget_per_day"] == 5.0
    assert status["usage"]["calls"] == {"answered": 1}
    exported = values(status)
    assert exported.keys() <= SERVER.keys()
    assert exported["target_calls"] == {"answered": 1}
    assert exported["target_tokens"] == {"input": 300, "output": 20}
    assert exported["target_cost"] == pytest.approx(20 * 2.0 / 1e6)


def test_a_target_that_fails_limits_and_stalls_a_third_of_its_calls_loses_nothing_silently() -> None:
    outcome = measure(requests=40, boards=4, deadline_s=60.0)
    assert outcome.is_sound
    assert outcome.accepted == 40
    assert outcome.answered > 20  # the others met what no further try makes better
    assert outcome.lost == sum(outcome.lost_because.values())


def test_a_server_with_such_a_target_needs_no_torch(other: ChatServer) -> None:
    code = (
        "import sys, server.app\nfrom server.config import Config, OpenAIConfig, ServerConfig\n"
        f"config = Config(ServerConfig('s1', target='openai:{other.url}'), openai=OpenAIConfig('fake'))\n"
        "server.app.load_target(config)\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "safetensors", "models"} & set(done.stdout.split())


def test_the_start_warns_of_a_stop_that_cuts_off_paid_calls(
    other: ChatServer, caplog: pytest.LogCaptureFixture
) -> None:
    server, paid = ServerConfig("s1", target=f"openai:{other.url}"), OpenAIConfig("fake", output_price=1.0)
    load_target(Config(server, openai=paid))
    assert "stop_s = 10 in [server] is shorter than timeout_s = 60 in [openai]" in caplog.text


def test_a_boards_picture_becomes_an_event_with_the_other_servers_text(
    broker: Mosquitto, other: ChatServer, board_bundle, tmp_path: Path
) -> None:
    """Board, Mosquitto, server and HTTP, with the board's paradigm chosen from the server's status."""
    cv2.imwrite(str(tmp_path / "door.jpg"), np.full((240, 320, 3), 90, np.uint8))
    mqtt, stop, events = MqttConfig(port=broker.port), threading.Event(), list[Event]()
    server = ServerConfig("s1", target=f"openai:{other.url}", tier="cloud")
    config = Config(server, mqtt, openai=OpenAIConfig("fake", input_price=1.0))
    board = RuntimeConfig(
        BoardConfig("b2", str(board_bundle.path), paradigm="offload", deadline_ms=60_000),
        (CameraConfig("door", str(tmp_path / "door.jpg")),),
        mqtt,
    )
    serving = threading.Thread(target=run_server, args=(config, stop))
    serving.start()
    try:
        with board_of(broker, "b1") as watcher:
            status = watcher.wait_for_status(state="online", share_proven=True)
            assert status["target"]["latents"] is False
            run_board(board, threading.Event(), events.append)
    finally:
        stop.set()
        serving.join(PATIENCE_S)
    update = events[-1]
    assert (update.type, update.final, update.paradigm) == ("update", True, "offload")
    assert update.text == text_of(other.asked[0].picture)
    assert update.answered_by == AnsweredBy("cloud", "s1")
    assert update.hops[0].usage.input_tokens == 300
    assert len(other.asked) == 1


def test_several_calls_may_ask_at_once_whether_a_tier_above_is_wanted(other: ChatServer) -> None:
    target = OpenAITarget(other.url, OpenAIConfig("fake"))
    service, errors = Service(ServerConfig("s1", target="openai:x"), target, ReplyCache()), list[Exception]()
    asked, own = offload(), Reply(id=bytes(8), status=Status.OK, confidence=0.5)
    received = Received(Arrival("b1", b"", 0.0, lambda: None, lambda *_: None), asked, 1e9)

    def ask() -> None:
        try:
            for _ in range(300):
                assert not service.escalator.ask(received, own)
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


def test_above_an_edge_server_it_answers_pictures_and_leaves_features_to_the_edge(
    broker: Mosquitto, start_broker: Callable[[], Mosquitto], other: ChatServer, bundle
) -> None:
    above, stop = start_broker(), threading.Event()
    cloud = ServerConfig("c1", target=f"openai:{other.url}", tier="cloud", site="hq")
    edge = ServerConfig("s1", str(bundle.path), max_batch=1)
    only_asked = UpstreamConfig(MqttConfig(port=above.port), "hq", min_confidence=0.0, max_share=1.0, explore=0.0)
    configs = (
        Config(cloud, MqttConfig(port=above.port), openai=OpenAIConfig("fake")),
        Config(edge, MqttConfig(port=broker.port), upstream=only_asked),
    )
    threads = [threading.Thread(target=run_server, args=(config, stop)) for config in configs]
    try:
        with board_of(broker, "b1") as board:
            for thread in threads:
                thread.start()
            status = board.wait_for_status(state="online", share_proven=True)
            while status["upstream"]["state"] != "online":
                status = board.wait_for_status(state="online")
            wants_cloud = {"bundle": bundle.id, "options": Options(tier=Tier.CLOUD)}
            for asked in (offload(1, **wants_cloud), latent(bundle, options=Options(tier=Tier.CLOUD))):
                board.ask(asked)
                first, last = board.reply(), board.reply()
                assert (first.status, first.final, first.server) == (Status.OK, False, "s1")
                assert (last.status, last.final) == (Status.OK, True)
                if asked.content_kind is ContentKind.JPEG:
                    assert (last.server, last.text, last.tokens) == ("c1", text_of(asked.content), b"")
                    assert [hop.server for hop in last.hops] == ["s1", "c1"]
                else:
                    assert (last.server, last.tokens) == ("s1", first.tokens)
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert len(other.asked) == 1


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("error_500", "kind=busy count=1 error=the other server says 500"),
        (
            "error_401",
            "kind=failed count=1 error=the other server says 401 Unauthorized: is the key in key_file right?",
        ),
        ("html", "kind=failed count=1 error=the response is no chat completion but HTML"),
        ("no_json", "kind=failed count=1 error=the response is no chat completion but 13 bytes"),
        ("stall", "kind=busy count=1 error=no whole response within 0.5 s"),
    ],
)
def test_the_log_says_why_the_target_fails_and_when_it_answers_again(
    other: ChatServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    behaviour: Behaviour,
    said: str,
) -> None:
    monkeypatch.setattr("server.targets.openai.TRIES", 1)
    key = tmp_path / "key"
    key.write_text("sk-secret\n")
    other.behave = lambda call: "answer" if call == 3 else behaviour
    with caplog.at_level(logging.DEBUG), serving(other, key_file=str(key), timeout_s=0.5) as service:
        board = Board(service)
        for number in range(4):
            board.ask(offload(number))
            assert (board.reply().status is Status.OK) == (number == 3)
    lines = [record.getMessage() for record in caplog.records if record.name == "server.target_failures"]
    first, second, again = lines
    assert f"target failed target=openai:{other.url} {said}" in first
    assert "count=2" in second
    assert again == f"target answers again target=openai:{other.url} failures=3"
    for secret in ("sk-secret", "data:image", "people, animals"):
        assert secret not in caplog.text


def test_a_server_that_stops_does_not_blame_its_target(other: ChatServer, caplog: pytest.LogCaptureFixture) -> None:
    other.behave = lambda _: "stall"
    target, stop = OpenAITarget(other.url, OpenAIConfig("fake")), threading.Event()
    service = Service(ServerConfig("s1", target="openai:x", stop_s=0.0), target, ReplyCache())
    thread = threading.Thread(target=serve, args=(service, stop))
    thread.start()
    Board(service).ask(offload())
    assert other.arrived.acquire(timeout=PATIENCE_S)
    stop.set()
    thread.join(PATIENCE_S)
    assert "target failed" not in caplog.text
