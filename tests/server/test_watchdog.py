"""A server whose engine hangs says so, leaves its share, and comes back."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import Status
from server import batch_times
from server.app import run_server
from server.batch_times import LATE_S
from server.engine import Engine
from server.service import Service
from server.watchdog import PROBE_PERIOD_S, STATUS_PERIOD_S, Watchdog
from tests.server.boards import PATIENCE_S, Lane, board_of, config, request


class Share:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.is_proven = True

    def heartbeat(self) -> bool:
        self.calls.append("heartbeat")
        return self.is_proven

    def suspend(self, reason: str) -> None:
        self.calls.append(f"suspend: {reason}")

    def resume(self) -> None:
        self.calls.append("resume")

    def taken(self) -> list[str]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls


def test_the_status_is_told_regularly_and_more_often_until_the_broker_is_proven(make_service) -> None:
    share = Share()
    share.is_proven = False
    watchdog = Watchdog(make_service(), share)
    beats = []
    for second in range(30):
        share.is_proven = second >= 3
        watchdog.check(1000.0 + second * PROBE_PERIOD_S)
        beats += [second] * len(share.taken())
    assert beats == [0, 1, 2, 3, 3 + STATUS_PERIOD_S, 3 + 2 * STATUS_PERIOD_S]


def test_a_hung_engine_leaves_the_share_hands_back_what_waits_and_comes_back(
    make_service: Callable[..., Service], bundle: Bundle
) -> None:
    service, share, lane = make_service(), Share(), Lane()
    watchdog = Watchdog(service, share)
    service.receive(lane.arrival(request(bundle, 0)))
    now = time.monotonic()
    service.batch_times.begin(now - LATE_S - 2)  # a batch that does not end
    watchdog.check(now)
    assert share.taken() == ["suspend: the engine has been busy with one batch for 12 s", "heartbeat"]
    assert service.status()["engine"]["late"]
    assert service.status()["engine"]["busy_s"] >= LATE_S
    service.receive(lane.arrival(request(bundle, 1)))  # what the broker had given to it already
    assert [reply.status for reply in lane.replies] == [Status.BUSY] * 2
    assert "hangs" in lane.replies[0].error
    assert service.counts["late", ""] == 1
    watchdog.check(now + PROBE_PERIOD_S)
    assert share.taken() == []
    service.batch_times.end()
    watchdog.check(now + 2 * PROBE_PERIOD_S)
    assert share.taken() == ["resume", "heartbeat"]
    service.receive(lane.arrival(request(bundle, 1)))
    service.answer(service.target_queue.take(0))
    assert lane.replies[-1].status is Status.OK


def test_a_request_that_is_queued_just_after_the_engine_was_found_to_hang_is_handed_back_too(
    make_service: Callable[..., Service], bundle: Bundle
) -> None:
    service, lane = make_service(), Lane()
    watchdog = Watchdog(service, Share())
    now = time.monotonic()
    service.batch_times.begin(now)
    watchdog.check(now + LATE_S + 1)
    service.receive(lane.arrival(request(bundle, 0)))  # by its own clock, which is behind, the engine works
    assert lane.replies == []
    watchdog.check(now + LATE_S + 2)
    assert [reply.status for reply in lane.replies] == [Status.BUSY]
    assert service.counts["late", ""] == 1


def test_the_status_says_that_the_engine_hangs_while_it_does(broker, bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_times, "LATE_S", 0.1)
    monkeypatch.setattr(batch_times, "LATE_BATCHES", 0)
    release, answer = threading.Event(), Engine.answer

    def hanging(engine, jobs):
        release.wait(PATIENCE_S)
        return answer(engine, jobs)

    monkeypatch.setattr(Engine, "answer", hanging)
    stop = threading.Event()
    thread = threading.Thread(target=run_server, args=(config(bundle, broker.port, max_batch=1), stop))
    with ExitStack() as stack:
        stack.callback(thread.join, PATIENCE_S)
        stack.callback(stop.set)
        stack.callback(release.set)
        board = stack.enter_context(board_of(broker, "b1"))
        thread.start()
        board.wait_for_status(state="online", share_proven=True)
        board.ask(request(bundle, 0))
        while not board.wait_for_status(state="online")["engine"]["late"]:
            pass
        release.set()
        assert board.reply().status is Status.OK
        while board.wait_for_status(state="online")["engine"]["late"]:
            pass
