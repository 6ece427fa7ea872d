"""The simulated boards of `aiflow bench scale` behave like real ones when a server is overloaded or silent."""

from collections import defaultdict
from itertools import repeat

import pytest

from benchmarks import scale
from benchmarks.scale import SITE, Boards
from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import Reply, Status, decode_request, encode_reply, topics
from tests.brokers import Mosquitto
from tests.bundles import random_symbols
from tests.listener import Listener

BOARD = "board-0"
SYMBOLS = random_symbols(1, seed=1)[0]


def boards(broker: Mosquitto, bundle: Bundle) -> Boards:
    return Boards(broker.port, bundle, repeat((SYMBOLS, [1, 2])), 1, 4.0)


def test_a_silent_server_is_asked_less_and_less_often_and_each_request_is_lost(
    broker: Mosquitto, board_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scale, "BUDGET_S", 2.0)
    monkeypatch.setattr(scale, "RESEND_S", 0.1)
    with Listener(broker.port, topics.request(SITE, BOARD)) as silent, boards(broker, board_bundle) as asking:
        asking.run(2.0)
    left_ms = defaultdict(list)
    while not silent.heard.empty():
        request = decode_request(silent.heard.get().payload)
        left_ms[request.id].append(request.budget_ms)
    assert asking.counts["lost"] == asking.counts["asked"] == len(left_ms) > 0
    assert asking.counts["greedy_board_lost"] == asking.counts["lost"]  # there is no other
    for budgets in left_ms.values():
        assert budgets == sorted(budgets, reverse=True)
        assert len(budgets) <= 5  # at once, and at least 0.1, 0.2, 0.4 and 0.8 s later
    assert asking.counts["sent_again"] > 0


def test_a_busy_server_is_asked_again_after_the_time_that_it_says(
    broker: Mosquitto, board_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scale, "RESEND_S", scale.BUDGET_S)
    asked = defaultdict(int)

    def answer(payload: bytes) -> bytes:
        request = decode_request(payload).id
        asked[request] += 1
        status = Status.BUSY if asked[request] == 1 else Status.OK
        wait_ms = 10 if status is Status.BUSY else None
        return encode_reply(Reply(id=request, status=status, text="a dog", server="s1", retry_after_ms=wait_ms))

    busy = Listener(broker.port, topics.request(SITE, BOARD), answer=answer, to=topics.reply(SITE, BOARD))
    with busy, boards(broker, board_bundle) as asking:
        asking.run(2.0)
    figures = asking.figures(2.0)
    assert figures["busy"] == figures["answered"] == figures["asked"] > 0
    assert (figures["sent_again"], figures["lost"], figures["second_reply"]) == (figures["asked"], 0, 0)
