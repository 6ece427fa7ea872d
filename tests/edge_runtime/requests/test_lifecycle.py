"""What becomes of a request, over any order of events: the pure state machine."""

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge_runtime.config import OutboxConfig
from edge_runtime.requests.actions import (
    Action,
    Answer,
    Delete,
    Found,
    Lose,
    Postpone,
    Read,
    Send,
    Settle,
    Store,
    Why,
)
from edge_runtime.requests.entries import DROP_EVERY_S, DROPS, MAX_STORED
from edge_runtime.requests.lifecycle import (
    AWAY_S,
    FEW_UNKNOWN_BUNDLE,
    MAX_UNKNOWN_BUNDLE,
    POLL_S,
    RETRY_DEADLINE_S,
    STORE_S,
    RequestLifecycle,
)
from edge_runtime.requests.timing import FIRST_RETRY_S, LAST_RETRY_S, MAX_UNKNOWN_S, WINDOW
from edge_runtime.wire import Reply, Status
from edge_runtime.wire.envelope import MAX_VIA

BROKER = Why("not_taken", "broker: refused")


def lifecycle(capacity: int = 4, min_resend_s: float = 1.0, **outbox: Any) -> RequestLifecycle[str]:
    config = OutboxConfig("outbox.sqlite", **outbox) if outbox else None
    return RequestLifecycle(capacity, min_resend_s=min_resend_s, rng=random.Random(0), outbox=config, size_of=len)


def with_outbox(capacity: int = 4, **outbox: Any) -> RequestLifecycle[str]:
    return lifecycle(capacity, **{"replay_per_s": 1000.0, **outbox})


def name(number: int) -> bytes:
    return number.to_bytes(8, "big")


ONE, TWO, THREE = name(1), name(2), name(3)


def reply(request_id: bytes, status: Status = Status.OK, **fields: Any) -> Reply:
    return Reply(id=request_id, status=status, server="s1", **fields)


def kinds(actions: list[Action[str]]) -> list[type]:
    return [type(action) for action in actions]


def resend(requests: RequestLifecycle[str], now: float) -> bool:
    actions = requests.on_time(now)
    assert all(isinstance(action, Send) and action.is_resend for action in actions)
    return bool(actions)


# ---- sent, sent again, answered ----


def test_a_reply_ends_a_request_and_returns_what_was_asked() -> None:
    requests = lifecycle()
    (sent,) = requests.on_request(ONE, "frame 1", 9.0, 0.0)
    assert sent == Send(ONE, "frame 1", 0.0, 9.0, is_resend=False)
    the_reply = reply(ONE)
    assert requests.on_reply(the_reply, 0.5) == [Answer(ONE, "frame 1", the_reply, True, 0.5)]
    assert (requests.counts.answered, requests.counts.open) == (1, 0)


def test_an_unanswered_request_is_sent_again_at_growing_distances_until_its_deadline() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "frame 1", 30.0, 0.0)
    times = []
    while (now := requests.next_at()) < 30.0:
        (sent,) = requests.on_time(now)
        assert sent == Send(ONE, "frame 1", now, 30.0 - now, is_resend=True)
        times.append(now)
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    assert 1.0 <= gaps[0] <= 1.5
    assert all(2.0**n <= gap <= 1.5 * 2.0**n for n, gap in enumerate(gaps))
    assert len(gaps) >= 3
    (lost,) = requests.on_time(30.0)
    assert lost == Lose(ONE, "frame 1", Why("no_reply", f"no reply to {len(times) + 1} sent"))
    assert requests.on_time(31.0) == []


def test_until_a_reply_time_is_known_a_copy_waits_for_an_answer_as_slow_as_the_user_allows() -> None:
    for deadline, wait_s in ((60.0, 10.0), (2.0, 1.0), (10_000.0, MAX_UNKNOWN_S)):
        requests: RequestLifecycle[str] = RequestLifecycle(
            4, min_resend_s=1.0, unknown_share=1 / 6, rng=random.Random(0)
        )
        requests.on_request(ONE, "", deadline, 0.0)
        assert wait_s <= requests.next_at() <= 1.5 * wait_s
        requests.on_reply(reply(ONE), 0.5)
        requests.on_request(TWO, "", deadline + 9.0, 1.0)
        assert 2.0 <= requests.next_at() - 1.0 <= 3.0


def test_a_copy_that_could_not_leave_is_tried_again_soon_though_no_reply_time_is_known() -> None:
    requests: RequestLifecycle[str] = RequestLifecycle(4, min_resend_s=1.0, unknown_share=1 / 6, rng=random.Random(0))
    requests.on_request(ONE, "", 600.0, 0.0)
    (sent,) = requests.on_time(now := requests.next_at())
    assert requests.on_unsent(sent, Why("no_bytes", ""), now) == []
    assert now + 1.0 <= requests.next_at() <= now + 1.5


def test_nothing_is_sent_again_before_four_times_the_usual_reply_time() -> None:
    requests = lifecycle()
    for number in range(20):
        requests.on_request(name(number), "", 99.0, 0.0)
        requests.on_reply(reply(name(number)), 2.0)
    requests.on_request(name(99), "", 99.0, 0.0)
    assert requests.next_at() >= 8.0


def test_the_reply_to_a_request_that_was_sent_twice_is_not_measured() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "", 999.0, 0.0)
    assert resend(requests, 10.0)
    (answer,) = requests.on_reply(reply(ONE), 100.0)
    assert answer.round_trip_s is None
    requests.on_request(TWO, "", 999.0, 0.0)
    assert requests.next_at() <= 3.0  # doubled, but not four times 100


def test_a_resend_that_could_not_leave_counts_as_not_sent() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "", 999.0, 0.0)
    for _ in range(5):
        (sent,) = requests.on_time(now := requests.next_at())
        assert requests.on_unsent(sent, Why("no_bytes", ""), now) == []
        assert now + 1.0 <= requests.next_at() <= now + 1.5  # no copy is lost, so nothing is doubled
    assert requests.counts.resent == 0
    requests.on_reply(reply(ONE), 20.0)
    requests.on_request(TWO, "", 999.0, 20.0)
    assert requests.next_at() <= 23.0  # once for all five


@pytest.mark.parametrize("reply_s", [1.6, 5.0, 30.0])
def test_replies_over_a_link_that_is_slower_than_the_interval_are_soon_measured(reply_s: float) -> None:
    """While a copy is on its way no other one leaves, and then its reply is not measured."""
    requests = lifecycle()
    measured = []
    for number in range(20):
        start = 1000.0 * number
        requests.on_request(name(number), "", start + 999, start)
        while (now := requests.next_at()) < start + reply_s:
            (sent,) = requests.on_time(now)
            requests.on_unsent(sent, Why("no_reply", "an earlier copy is still on its way to the broker"), now)
        (answer,) = requests.on_reply(reply(name(number)), start + reply_s)
        measured.append(answer.round_trip_s is not None)
    assert measured[5:] == [True] * 15


def test_the_reply_after_a_resend_that_could_not_leave_is_not_measured() -> None:
    """The first copy may have waited for the broker all the time."""
    requests = lifecycle()
    requests.on_request(ONE, "", 999.0, 0.0)
    (sent,) = requests.on_time(requests.next_at())
    requests.on_unsent(sent, Why("no_reply", "an earlier copy is still on its way to the broker"), 2.0)
    (answer,) = requests.on_reply(reply(ONE), 100.0)
    assert (answer.round_trip_s, answer.is_unclear) == (None, True)
    requests.on_request(TWO, "", 999.0, 100.0)
    assert requests.next_at() <= 103.0  # doubled, but not four times 100


def test_a_reply_to_a_request_out_of_the_outbox_may_be_to_its_earlier_try_and_is_not_measured() -> None:
    requests = with_outbox()
    keep_one(requests)
    assert requests.on_time(10.0) == [Read(ONE)]
    requests.on_read(ONE, "x", 10.0)
    answer, _ = requests.on_reply(reply(ONE), 10.01)
    assert answer.round_trip_s is None


@pytest.mark.parametrize("reply_s", [0.2, 1.6, 5.0, 30.0])
def test_replies_that_always_take_longer_than_the_interval_are_soon_asked_for_once(reply_s: float) -> None:
    requests = lifecycle(capacity=64)
    resent = []
    for number in range(20):
        start, before = 1000.0 * number, requests.counts.resent
        requests.on_request(name(number), "", start + 999, start)
        while (now := requests.next_at()) < start + reply_s:
            requests.on_time(now)
        assert requests.on_reply(reply(name(number)), start + reply_s)
        resent.append(requests.counts.resent - before)
    assert resent[2:] == [0] * 18


def test_the_interval_is_short_again_after_a_measured_reply_and_after_silence() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "", 99.0, 0.0)
    for _ in range(3):
        requests.on_time(requests.next_at())
    requests.on_reply(reply(ONE), 20.0)
    requests.on_request(TWO, "", 999.0, 100.0)
    assert requests.next_at() >= 108.0  # three doublings
    requests.on_reply(reply(TWO), 100.1)
    requests.on_request(THREE, "", 202.0, 200.0)
    assert requests.next_at() <= 201.5
    assert resend(requests, 201.5)
    assert kinds(requests.on_time(202.0)) == [Lose]
    requests.on_request(name(4), "", 999.0, 300.0)
    assert requests.next_at() <= 301.5


def test_one_request_too_many_is_lost_and_those_that_wait_stay() -> None:
    requests = lifecycle(capacity=2)
    requests.on_request(ONE, "first", 9.0, 0.0)
    requests.on_request(TWO, "second", 9.0, 0.0)
    (lost,) = requests.on_request(THREE, "third", 9.0, 0.0)
    assert (lost.content, lost.why) == ("third", Why("full", "2 requests wait already"))
    assert requests.has_ended(THREE)
    assert kinds(requests.on_reply(reply(ONE), 0.1)) == [Answer]
    assert kinds(requests.on_request(name(4), "fourth", 9.0, 0.2)) == [Send]


def test_one_request_too_many_waits_unsent_until_its_content_is_complete_or_for_its_deadline() -> None:
    complete: set[str] = set()
    requests: RequestLifecycle[str] = RequestLifecycle(
        1,
        min_resend_s=1.0,
        rng=random.Random(0),
        outbox=OutboxConfig("outbox.sqlite"),
        may_store=lambda content: content in complete,
        is_complete=lambda content: content in complete,
    )
    complete.add("first")
    requests.on_request(ONE, "first", 99.0, 0.0)
    assert requests.on_request(TWO, "soon", 9.0, 0.0) == []
    assert requests.on_request(THREE, "never", 9.0, 0.0) == []
    complete.add("soon")
    why = Why("full", "1 requests wait already")
    assert requests.on_complete(TWO, 0.1) == [Store(TWO, "soon"), Postpone(TWO, "soon", why)]
    assert [action for action in requests.on_time(9.0) if action.id == THREE] == [Lose(THREE, "never", why)]
    assert requests.counts.open == 1


def test_duplicate_late_and_unknown_replies_are_told_apart() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "", 9.0, 0.0)
    requests.on_request(TWO, "", 1.0, 0.0)
    requests.on_reply(reply(ONE), 0.5)
    assert len(requests.on_time(1.0)) == 1
    for request_id in (ONE, TWO, THREE):
        assert requests.on_reply(reply(request_id), 2.0) == []
    assert requests.on_reply(reply(THREE, Status.BUSY), 2.0) == []
    counts = requests.counts
    assert (counts.duplicate, counts.late, counts.unknown) == (1, 1, 2)


def test_an_id_is_not_used_twice() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "", 9.0, 0.0)
    with pytest.raises(ValueError, match="is open already"):
        requests.on_request(ONE, "", 9.0, 0.0)


def test_what_the_broker_refuses_is_lost() -> None:
    requests = with_outbox()
    requests.on_request(ONE, "x", 9.0, 0.0)
    assert requests.on_not_taken(ONE, BROKER) == [Lose(ONE, "x", BROKER)]
    assert requests.on_not_taken(ONE, BROKER) == []


def test_a_copy_that_the_broker_refuses_ends_no_wait_for_the_answer_to_another() -> None:
    requests = lifecycle()
    for request_id in (ONE, TWO):
        requests.on_request(request_id, "x", 9.0, 0.0)
    assert resend(requests, 1.6)
    assert [requests.on_not_taken(request_id, BROKER) for request_id in (ONE, TWO)] == [[], []]
    assert kinds(requests.on_reply(not_final(ONE, 1), 1.7)) == [Answer]
    assert requests.on_not_taken(ONE, BROKER) == []  # a higher tier may be about to answer
    assert kinds(requests.on_reply(reply(ONE), 1.8)) == [Answer]
    assert requests.on_not_taken(TWO, BROKER) == [Lose(TWO, "x", BROKER)]  # both copies


@pytest.mark.parametrize(("answers", "end"), [(0, Lose), (1, Settle)])
def test_an_answer_that_cannot_be_used_ends_a_request(answers: int, end: type) -> None:
    requests, why = lifecycle(), Why("failed", "no object")
    requests.on_request(ONE, "x", 9.0, 0.0)
    for _ in range(answers):
        requests.on_reply(not_final(ONE, 1), 0.1)
    assert requests.on_unusable_answer(ONE, why) == [end(ONE, "x", why)]
    assert requests.on_unusable_answer(ONE, why) == []


# ---- servers that cannot answer now ----


def test_a_busy_server_that_is_asked_again_makes_no_lost_copy_wait_longer() -> None:
    requests = lifecycle()
    for number in range(20):
        requests.on_request(name(number), "", 999.0, 0.0)
        requests.on_reply(reply(name(number), Status.BUSY, retry_after_ms=100), 0.0)
        assert resend(requests, 0.2)
        requests.on_reply(reply(name(number)), 0.3)
    requests.on_request(name(99), "", 999.0, 0.0)
    assert requests.next_at() <= 1.5


@pytest.mark.parametrize("retry_after_ms", [0, 1])
def test_a_server_that_is_busy_for_no_time_is_asked_less_and_less_often(retry_after_ms: int) -> None:
    requests = lifecycle()
    requests.on_request(ONE, "", 29.0, 0.0)
    requests.on_reply(reply(ONE, Status.BUSY, retry_after_ms=retry_after_ms), 0.0)
    times = []
    while (now := requests.next_at()) < 9.0:
        times.append(now)
        assert resend(requests, now)
        requests.on_reply(reply(ONE, Status.BUSY, retry_after_ms=retry_after_ms), now)
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    assert all(0.05 * 2**n <= gap <= 1.5 * 0.05 * 2**n for n, gap in enumerate(gaps[:7]))
    assert all(3.2 <= gap <= 4.8 for gap in gaps[7:])


def test_a_busy_server_is_asked_again_later_than_it_said_and_the_request_stays_open() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "", 99.0, 0.0)
    assert requests.on_reply(reply(ONE, Status.BUSY, retry_after_ms=10_000), 0.1) == []
    assert not resend(requests, 10.0)
    assert resend(requests, 15.2)
    assert (requests.counts.open, requests.counts.busy) == (1, 1)


def test_a_server_that_is_busy_beyond_the_deadline_ends_the_wait() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "x", 5.0, 0.0)
    (lost,) = requests.on_reply(reply(ONE, Status.BUSY, retry_after_ms=10_000, error="full"), 0.1)
    assert lost == Lose(ONE, "x", Why("busy", "server s1: busy: full"))


def test_a_request_that_no_server_takes_in_time_waits_until_its_content_is_complete_or_for_its_deadline() -> None:
    complete: set[str] = set()
    requests: RequestLifecycle[str] = RequestLifecycle(
        4, min_resend_s=9.0, rng=random.Random(0), is_complete=lambda content: content in complete
    )
    why = Why("busy", "server s1: busy: full")
    for request_id, content in ((ONE, "soon"), (TWO, "never")):
        requests.on_request(request_id, content, 5.0, 0.0)
        assert requests.on_reply(reply(request_id, Status.BUSY, retry_after_ms=10_000, error="full"), 0.1) == []
    complete.add("soon")
    assert requests.on_complete(ONE, 0.2) == [Lose(ONE, "soon", why)]
    assert requests.on_time(5.0) == [Lose(TWO, "never", why)]


def test_a_server_that_is_busy_beyond_the_deadline_ends_no_wait_for_another_servers_answer() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "x", 5.0, 0.0)
    assert resend(requests, 1.6)
    assert requests.on_reply(reply(ONE, Status.BUSY, retry_after_ms=10_000), 1.7) == []
    assert requests.next_at() == 5.0  # nothing more is sent
    assert kinds(requests.on_reply(reply(ONE), 4.9)) == [Answer]


def test_servers_that_are_busy_beyond_the_deadline_end_the_wait_when_each_copy_has_its_reply() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "x", 5.0, 0.0)
    assert resend(requests, 1.6)
    requests.on_reply(reply(ONE, Status.BUSY, retry_after_ms=10_000), 1.7)
    assert kinds(requests.on_reply(reply(ONE, Status.BUSY, retry_after_ms=10_000), 1.8)) == [Lose]


def test_servers_without_the_bundle_end_no_wait_for_another_servers_answer() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "x", 99.0, 0.0)
    for _ in range(MAX_UNKNOWN_BUNDLE):
        assert resend(requests, now := requests.next_at())
        assert requests.on_reply(reply(ONE, Status.UNKNOWN_BUNDLE, retry_after_ms=100), now) == []
    assert requests.next_at() == 99.0  # nothing more is sent
    assert kinds(requests.on_reply(reply(ONE), 98.0)) == [Answer]


def test_a_server_without_the_bundle_does_not_end_a_request_that_its_neighbour_can_answer() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "x", 9.0, 0.0)
    assert requests.on_reply(reply(ONE, Status.UNKNOWN_BUNDLE, retry_after_ms=100), 0.1) == []
    assert resend(requests, 0.3)
    assert kinds(requests.on_reply(reply(ONE), 0.4)) == [Answer]


def test_many_servers_without_the_bundle_are_asked_before_a_usual_deadline() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "x", 5.0, 0.0)
    now = 0.0
    for _ in range(MAX_UNKNOWN_BUNDLE - 1):
        assert requests.on_reply(reply(ONE, Status.UNKNOWN_BUNDLE, retry_after_ms=100), now) == []
        assert resend(requests, now := requests.next_at())
    assert kinds(requests.on_reply(reply(ONE), now)) == [Answer]


def test_few_copies_are_sent_if_no_server_is_known_that_has_not_refused() -> None:
    requests: RequestLifecycle[str] = RequestLifecycle(
        4, min_resend_s=1.0, rng=random.Random(0), has_other_server=lambda refused, now: not refused >= {"s1", "s2"}
    )
    requests.on_request(ONE, "x", 60.0, 0.0)
    now = 0.0
    for _ in range(FEW_UNKNOWN_BUNDLE):  # s2 has not been asked
        assert requests.on_reply(reply(ONE, Status.UNKNOWN_BUNDLE, retry_after_ms=100), now) == []
        assert resend(requests, now := requests.next_at())
    last = Reply(id=ONE, status=Status.UNKNOWN_BUNDLE, server="s2", retry_after_ms=100)
    assert kinds(requests.on_reply(last, now)) == [Lose]


def test_a_bundle_that_no_server_has_is_named_at_the_deadline() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "x", 9.0, 0.0)
    requests.on_reply(reply(ONE, Status.UNKNOWN_BUNDLE, retry_after_ms=100, error="install it"), 0.1)
    (lost,) = requests.on_time(9.0)
    assert lost.why == Why("unknown_bundle", "server s1: unknown_bundle: install it")


def test_a_bundle_that_no_server_has_is_not_asked_for_without_end() -> None:
    requests = with_outbox()
    keep_one(requests)
    assert requests.on_time(10.0) == [Read(ONE)]
    requests.on_read(ONE, "x", 10.0)
    now, sends = 10.0, 1
    while requests.counts.open:
        requests.on_reply(reply(ONE, Status.UNKNOWN_BUNDLE, retry_after_ms=100), now)
        if requests.counts.open:
            now = requests.next_at()
            sends += resend(requests, now)
    assert (sends, requests.counts.kept) == (MAX_UNKNOWN_BUNDLE, 1)
    assert requests.on_time(now + 1) == []  # later each time, as after a try without a reply


@pytest.mark.parametrize("status", [Status.STALE, Status.BAD_REQUEST, Status.FAILED])
def test_a_refusal_ends_a_request_at_once(status: Status) -> None:
    requests = with_outbox()
    requests.on_request(ONE, "x", 9.0, 0.0)
    (lost,) = requests.on_reply(reply(ONE, status, error="no"), 0.1)
    assert lost.why == Why(status.name.lower(), f"server s1: {status.name.lower()}: no")


# ---- a reference that the server does not have ----


def test_a_lost_reference_is_told_once_and_the_frame_is_sent_alone_at_once() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "x", 9.0, 0.0)
    (sent,) = requests.on_reply(reply(ONE, Status.REFERENCE_LOST), 0.1)
    assert sent == Send(ONE, "x", 0.1, 8.9, is_resend=True, is_asked_for=True)
    assert requests.on_reply(reply(ONE, Status.REFERENCE_LOST), 0.2) == []  # to a second copy of the first one
    assert requests.next_at() >= 1.1  # not doubled: nothing was lost
    (answer,) = requests.on_reply(reply(ONE), 0.3)
    assert answer.round_trip_s is None  # of two copies
    assert (requests.counts.resent, requests.counts.late, requests.counts.answered) == (1, 1, 1)


def test_a_frame_whose_reference_is_lost_after_a_resend_is_sent_alone_at_once_too() -> None:
    """The server may have discarded the resend as a repeat, while the first copy waited in its queue."""
    requests = lifecycle()
    requests.on_request(ONE, "x", 9.0, 0.0)
    assert resend(requests, 1.6)
    (sent,) = requests.on_reply(reply(ONE, Status.REFERENCE_LOST), 1.7)
    assert isinstance(sent, Send)
    assert (sent.is_resend, sent.is_asked_for) == (True, True)
    assert requests.on_reply(reply(ONE, Status.REFERENCE_LOST), 1.8) == []
    assert kinds(requests.on_reply(reply(ONE), 1.9)) == [Answer]


def test_a_server_that_never_takes_a_frame_is_named_at_the_deadline() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "x", 9.0, 0.0)
    requests.on_reply(reply(ONE, Status.REFERENCE_LOST, error="not here"), 0.1)
    (lost,) = requests.on_time(9.0)
    assert lost.why == Why("reference_lost", "server s1: reference_lost: not here")


def test_a_frame_that_cannot_be_sent_alone_now_is_sent_later() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "x", 9.0, 0.0)
    (sent,) = requests.on_reply(reply(ONE, Status.REFERENCE_LOST), 0.1)
    assert requests.on_unsent(sent, Why("no_bytes", ""), 0.1) == []
    (again,) = requests.on_time(1.7)
    assert (again.is_resend, again.is_asked_for) == (True, True)


# ---- replies that are not final ----


def not_final(request_id: bytes, token: int) -> Reply:
    return reply(request_id, tokens=bytes([token]), final=False)


def test_a_reply_that_is_not_final_is_improved_and_counted_once() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "x", 9.0, 0.0)
    (first,) = requests.on_reply(not_final(ONE, 1), 0.1)
    (last,) = requests.on_reply(reply(ONE), 0.2)
    assert (first.is_first, last.is_first, last.round_trip_s) == (True, False, None)
    assert (requests.counts.answered, requests.counts.improvable) == (1, 0)
    assert requests.on_reply(reply(ONE), 0.3) == []
    assert requests.counts.duplicate == 1


def test_a_text_without_tokens_of_a_server_without_a_name_is_told_too() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "x", 9.0, 0.0)
    first = Reply(id=ONE, status=Status.OK, text="a dog", final=False)
    assert [kinds(requests.on_reply(first, now)) for now in (0.1, 0.2)] == [[Answer], []]


def test_a_text_that_is_not_final_is_told_once_and_so_often_as_there_can_be_tiers() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "x", 9.0, 0.0)
    told = [bool(requests.on_reply(not_final(ONE, token), 0.1)) for token in (1, 1, *range(2, 20))]
    assert told == [True, False] + [True] * MAX_VIA + [False] * (18 - MAX_VIA)
    assert requests.counts.repeated == 19 - MAX_VIA


def test_a_stored_request_leaves_the_outbox_with_its_final_reply_only() -> None:
    """A board that is killed meanwhile asks again: else its event would never become final."""
    requests = with_outbox(every_request=True)
    requests.on_request(ONE, "x", 9.0, 0.0)
    requests.on_stored([ONE], 0.0)
    assert kinds(requests.on_reply(not_final(ONE, 1), 0.1)) == [Answer]
    assert kinds(requests.on_time(9.0)) == [Settle, Delete]


def test_replies_that_are_not_final_do_not_fill_the_window_of_retries() -> None:
    requests = with_outbox(capacity=64)
    for number in range(2 * WINDOW):
        keep_one(requests, name(number))
    now, read = 2.0, 0
    while now < 3.0:
        for action in requests.on_time(now):
            if isinstance(action, Read):
                read += 1
                requests.on_read(action.id, "x", now)
                requests.on_reply(not_final(action.id, 1), now)
        now += 0.01
    assert read == 2 * WINDOW


def test_a_refusal_of_an_earlier_try_loses_no_request_that_is_on_disk() -> None:
    requests = with_outbox()
    keep_one(requests)
    requests.on_time(10.0)
    assert requests.on_not_taken(ONE, BROKER) == []
    assert requests.counts.kept == 1


def test_without_a_better_reply_the_latest_one_is_final_at_the_deadline() -> None:
    requests = lifecycle()
    requests.on_request(ONE, "x", 9.0, 0.0)
    requests.on_reply(not_final(ONE, 1), 0.1)
    assert requests.on_time(8.9) == []
    assert requests.on_time(9.0) == [Settle(ONE, "x", Why("no_reply", "no higher tier answered in time"))]


def test_replies_that_wait_for_a_higher_tier_are_as_many_as_open_requests() -> None:
    requests = lifecycle(capacity=2)
    for number in range(3):
        requests.on_request(name(number), f"{number}", 9.0, 0.0)
        actions = requests.on_reply(not_final(name(number), 1), 0.1)
    assert actions[1:] == [Settle(name(0), "0", Why("full", "too many wait for a higher tier"))]


# ---- the outbox ----


def keep_one(requests: RequestLifecycle[str], request_id: bytes = ONE, now: float = 0.0) -> None:
    """A request that found no reply in time, and is kept."""
    requests.on_request(request_id, "x" * 10, now + 1, now)
    actions = requests.on_time(now + 1, link_is_free=False)
    assert kinds([a for a in actions if a.id == request_id]) == [Store, Postpone]


def test_a_request_without_a_reply_is_kept_and_asked_again_when_the_link_is_free() -> None:
    requests = with_outbox()
    keep_one(requests)
    assert (requests.counts.kept, requests.counts.open, requests.counts.lost) == (1, 0, 0)
    assert requests.on_time(9.0, link_is_free=False) == []
    assert requests.on_time(10.0) == [Read(ONE)]
    (sent,) = requests.on_read(ONE, "x", 10.1)
    assert sent == Send(ONE, "x", 0.0, RETRY_DEADLINE_S, is_resend=False)
    assert (requests.counts.kept, requests.counts.open, requests.counts.retried) == (0, 1, 1)
    actions = requests.on_reply(reply(ONE), 10.2)
    assert kinds(actions) == [Answer, Delete]
    assert requests.counts.answered == 1


def test_without_a_link_a_request_goes_to_the_outbox_at_once_and_later_ones_are_not_retried_for_a_while() -> None:
    requests = with_outbox()
    assert requests.on_request(ONE, "x", 9.0, 0.0, link_is_away=True) == [Store(ONE, "x")]
    assert requests.on_time(AWAY_S - 0.1) == []
    assert requests.on_time(AWAY_S + POLL_S) == [Read(ONE)]


def test_without_a_link_and_without_room_in_the_outbox_a_request_is_sent_all_the_same() -> None:
    requests = with_outbox()
    requests.can_store = False
    (sent,) = requests.on_request(ONE, "x", 9.0, 0.0, link_is_away=True)
    assert isinstance(sent, Send)
    no_bytes = Why("no_bytes", "no bytes left")
    assert requests.on_unsent(sent, no_bytes, 0.0) == [Lose(ONE, "x", no_bytes)]


def test_a_retry_in_vain_comes_later_each_time_up_to_a_limit_and_is_not_told_again() -> None:
    requests, now, gaps = with_outbox(max_age_s=86400.0 * 31), 1.0, []
    keep_one(requests)
    for _ in range(12):
        start = now
        while not (actions := requests.on_time(now)):
            now = max(now + 0.01, min(requests.next_at(), now + 1))
        assert actions == [Read(ONE)]
        gaps.append(now - start)
        requests.on_read(ONE, "x", now)
        now += RETRY_DEADLINE_S
        while requests.counts.open:
            assert not [a for a in requests.on_time(now, link_is_free=False) if not isinstance(a, Send)]
    for tries, gap in enumerate(gaps[1:], 1):
        longest = min(FIRST_RETRY_S * 2 ** (tries - 1), LAST_RETRY_S)
        assert longest / 2 <= gap <= longest + 2


def test_a_copy_that_a_busy_server_asked_for_is_none_of_the_next_try() -> None:
    requests = with_outbox()
    requests.on_request(ONE, "x", 5.0, 0.0)
    assert kinds(requests.on_reply(reply(ONE, Status.BUSY, retry_after_ms=10_000), 0.1)) == [Store, Postpone]
    assert requests.on_time(10.0) == [Read(ONE)]
    requests.on_read(ONE, "x", 10.0)
    (again,) = requests.on_time(requests.next_at())
    assert (again.is_resend, again.is_asked_for) == (True, False)


def test_a_dead_server_costs_no_more_than_the_window_and_the_rate_holds() -> None:
    requests = with_outbox(capacity=64, replay_per_s=2.0)
    for number in range(20):
        keep_one(requests, name(number))
    read, now = [], 2.0
    while now < 10.0:
        for action in requests.on_time(now):
            if isinstance(action, Read):
                read.append((now, action.id))
                requests.on_read(action.id, "x", now)
        now += 0.05
    assert [request_id for _, request_id in read] == [name(n) for n in range(WINDOW)]  # oldest first
    assert all(b - a >= 0.5 - 1e-9 for (a, _), (b, _) in pairwise(read))


def test_retries_leave_half_of_the_table_to_live_frames() -> None:
    requests = with_outbox(capacity=2)
    requests.on_request(ONE, "live", 99.0, 0.0)
    keep_one(requests, TWO)
    assert not [a for a in requests.on_time(5.0) if isinstance(a, Read)]
    requests.on_reply(reply(ONE), 5.1)
    assert Read(TWO) in requests.on_time(6.0)


def test_a_reply_that_comes_while_its_request_is_kept_answers_it() -> None:
    requests = with_outbox()
    keep_one(requests)
    late = reply(ONE)
    assert requests.on_reply(late, 2.0) == [Read(ONE)]
    assert requests.on_read(ONE, "x", 2.1) == [Answer(ONE, "x", late, True, None, is_unclear=True), Delete(ONE)]
    assert (requests.counts.answered, requests.counts.retried) == (1, 0)


def test_with_every_request_kept_a_request_is_sent_when_it_is_on_disk() -> None:
    requests = with_outbox(every_request=True)
    assert requests.on_request(ONE, "x", 9.0, 0.0) == [Store(ONE, "x")]
    assert requests.counts.open == 1
    assert kinds(requests.on_stored([ONE, TWO], 0.1)) == [Send]
    assert kinds(requests.on_reply(reply(ONE), 0.2)) == [Answer, Delete]


def test_a_request_that_was_stored_before_it_was_sent_counts_its_time_in_the_outbox_from_then_on() -> None:
    """Its row says how old it was then."""
    requests = with_outbox(every_request=True, max_age_s=100.0)
    for request_id, handed_over, deadline in ((ONE, 0.0, 9.0), (TWO, 1.0, 2.0)):
        requests.on_request(request_id, "x", deadline, handed_over)
        requests.on_stored([request_id], handed_over)
    requests.on_time(9.0, link_is_free=False)
    assert requests.counts.kept == 2
    assert [requests.kept_for_s(request_id, 20.0) for request_id in (ONE, TWO)] == [20.0, 19.0]
    assert requests.on_time(99.9, link_is_free=False) == []
    assert [requests.on_time(now, link_is_free=False) for now in (100.0, 101.0)] == [[Read(ONE)], [Read(TWO)]]


def test_what_may_not_be_stored_is_sent_at_once_and_lost_at_its_deadline() -> None:
    outbox = OutboxConfig("outbox.sqlite", every_request=True)
    requests: RequestLifecycle[str] = RequestLifecycle(
        1, min_resend_s=9.0, rng=random.Random(0), outbox=outbox, may_store=lambda content: content != "picture"
    )
    assert kinds(requests.on_request(ONE, "picture", 5.0, 0.0, link_is_away=True)) == [Send]
    assert kinds(requests.on_request(TWO, "picture", 5.0, 0.0)) == [Lose]  # too many wait
    assert kinds(requests.on_time(5.0)) == [Lose]


def test_a_disk_that_hangs_holds_up_a_request_for_a_moment_only() -> None:
    requests = with_outbox(every_request=True)
    requests.on_request(ONE, "x", 9.0, 0.0)
    assert requests.next_at() == STORE_S
    assert kinds(requests.on_time(STORE_S)) == [Send]
    assert requests.on_stored([ONE], 1.0) == []  # too late to matter


def test_when_the_outbox_is_full_the_oldest_is_given_up_and_says_what_was_lost() -> None:
    requests = with_outbox(max_bytes=65536)
    requests.on_request(ONE, "a" * 40_000, 9.0, 0.0, link_is_away=True)
    assert requests.on_request(TWO, "b" * 40_000, 9.0, 0.0, link_is_away=True) == [Store(TWO, "b" * 40_000)]
    assert requests.next_at() <= 0.1
    assert requests.on_time(0.1, link_is_free=False) == [Read(ONE)]
    assert requests.on_read(ONE, "a", 0.1) == [Delete(ONE), Lose(ONE, "a", Why("outbox", "outbox: full"))]
    assert (requests.counts.kept, requests.counts.lost) == (1, 1)


def test_what_is_too_old_is_given_up_some_at_a_time_so_that_events_of_live_frames_find_room() -> None:
    requests = with_outbox(max_age_s=100.0)
    requests.on_found([Found(name(n), 10, 50.0) for n in range(2 * DROPS + 3)], 0, 0.0)
    assert requests.on_time(49.9, link_is_free=False) == []
    assert requests.next_at() <= 50.4
    steps = [len(requests.on_time(51.0 + n * DROP_EVERY_S / 2, link_is_free=False)) for n in range(7)]
    assert steps == [DROPS, 0, DROPS, 0, 3, 0, 0]


def test_an_outbox_of_tiny_requests_is_bounded_by_their_number() -> None:
    requests = with_outbox(max_bytes=1 << 30)
    requests.on_found([Found(name(n), 1, 1.0) for n in range(MAX_STORED + 3)], 0, 0.0)
    assert requests.on_time(0.1, link_is_free=False) == [Read(name(0)), Read(name(1)), Read(name(2))]


def test_what_an_earlier_run_left_is_asked_again_oldest_first_and_what_the_disk_lost_is_counted() -> None:
    requests = with_outbox()
    requests.on_found([Found(ONE, 10, 5.0), Found(TWO, 10, 9.0)], 3, 0.0)
    counts = requests.counts
    assert (counts.found, counts.kept, counts.lost) == (5, 2, 3)
    assert requests.on_time(1.0) == [Read(TWO)]
    assert requests.kept_for_s(TWO, 1.0) == 10.0


def test_what_the_disk_has_lost_ends_as_lost_even_if_nobody_asked() -> None:
    requests = with_outbox(every_request=True)
    keep_one_and_one_open = [requests.on_request(ONE, "x", 9.0, 0.0), requests.on_stored([ONE], 0.0)]
    assert keep_one_and_one_open
    requests.on_request(TWO, "y", 9.0, 0.0, link_is_away=True)
    assert kinds(requests.on_read(TWO, None, 0.1)) == [Delete, Lose]
    assert requests.on_read(ONE, None, 0.1) == []  # still open: it is stored again if no reply comes
    assert [a for a in requests.on_time(9.0) if isinstance(a, Store)] == [Store(ONE, "x")]


def test_at_the_end_what_is_open_is_kept_and_what_no_disk_took_is_lost() -> None:
    requests = with_outbox()
    requests.on_request(ONE, "x", 9.0, 0.0)
    requests.on_request(TWO, "y", 9.0, 0.0)
    requests.on_reply(not_final(TWO, 1), 0.1)
    stopping = Why("stopping", "the board stops")
    assert requests.close(stopping, 1.0) == [
        Store(ONE, "x"),
        Postpone(ONE, "x", stopping),
        Settle(TWO, "y", Why("stopping", "the board stops before a higher tier answered")),
    ]
    assert kinds(requests.on_unwritten(ONE, "x")) == [Delete, Lose]
    assert (requests.counts.kept, requests.counts.lost) == (0, 1)


def test_what_the_outbox_was_giving_up_at_the_end_and_no_disk_took_is_lost_too() -> None:
    requests = with_outbox(max_bytes=65536)
    for request_id in (ONE, TWO):
        requests.on_request(request_id, "x" * 40_000, 9.0, 0.0, link_is_away=True)
    assert requests.on_time(0.1, link_is_free=False) == [Read(ONE)]
    requests.close(Why("stopping", "the board stops"), 0.2)
    assert kinds(requests.on_unwritten(ONE, "x")) == [Delete, Lose]
    assert (requests.counts.kept, requests.counts.lost) == (1, 1)


# ---- everything at once ----

MISSING = b"missing"  # stands for all requests that a disk has lost with their ids
RECENT = st.integers(0, 5)  # one of the latest requests, so that most events meet one that is alive
STATUSES = st.sampled_from([Status.OK] * 6 + list(Status))


class AnySchedule(RuleBasedStateMachine):
    """Requests, replies (lost, doubled, late, reordered), refusals, a disk that is slow, refuses and forgets, kills."""

    @initialize(every_request=st.booleans(), has_outbox=st.booleans())
    def start(self, every_request: bool, has_outbox: bool) -> None:
        self.now, self.every_request, self.has_outbox = 0.0, every_request, has_outbox
        self.disk: dict[bytes, str] = {}  # what the outbox has
        self.begin_run()
        self.used = [name(0)]  # an id that nobody has used yet, for strangers' replies

    def recent(self, number: int) -> bytes:
        return self.used[-1 - number % len(self.used)]

    def begin_run(self) -> None:
        outbox = {"every_request": self.every_request, "max_bytes": 65536, "max_age_s": 60.0, "replay_per_s": 2.0}
        self.requests = lifecycle(3, **outbox) if self.has_outbox else lifecycle(3)
        self.is_complete = True
        self.requests._is_complete = lambda _: self.is_complete
        self.finals: dict[bytes, int] = {}  # final events of each request, in this run
        self.sent: dict[bytes, Send[str]] = {}  # the latest of each request
        self.lost_their_reference: set[bytes] = set()
        self.to_store: list[bytes] = []
        self.to_read: list[bytes] = []
        self.pending_disk: dict[bytes, str] = {}

    def follow(self, actions: list[Action[str]]) -> None:
        for action in actions:
            match action:
                case Send():
                    assert action.left_s > 0 or not action.is_resend
                    self.sent[action.id] = action
                case Answer(request_id, _, final_reply):
                    self.finals[request_id] = self.finals.get(request_id, 0) + final_reply.final
                case Settle() | Lose():
                    self.finals[action.id] = self.finals.get(action.id, 0) + 1
                case Store(request_id, content):
                    assert self.has_outbox
                    self.pending_disk[request_id] = content
                    self.to_store.append(request_id)
                case Read():
                    self.to_read.append(action.id)
                case Delete():
                    self.disk.pop(action.id, None)
                    self.pending_disk.pop(action.id, None)

    @rule(seconds=st.floats(0, 12), link_is_free=st.booleans())
    def time_passes(self, seconds: float, link_is_free: bool) -> None:
        self.now += seconds
        self.follow(self.requests.on_time(self.now, link_is_free=link_is_free))

    @rule(budget=st.floats(0, 10), size=st.sampled_from([10, 30_000]), is_away=st.booleans())
    def submit(self, budget: float, size: int, is_away: bool) -> None:
        self.contents_are_complete_or_not(0, is_complete=True)  # the path of a frame handles one after the other
        self.used.append(name(len(self.used)))
        content, deadline = "x" * size, self.now + budget
        self.follow(self.requests.on_request(self.used[-1], content, deadline, self.now, link_is_away=is_away))

    @rule(number=RECENT)
    def reference_is_lost(self, number: int) -> None:
        """At most one copy more, in all, whatever is said how often."""
        request_id = self.recent(number)
        for _ in range(2):
            actions = self.requests.on_reply(reply(request_id, Status.REFERENCE_LOST), self.now)
            assert all(isinstance(action, Send) and action.is_resend for action in actions)
            assert len(actions) <= (request_id not in self.lost_their_reference)
            self.lost_their_reference |= {action.id for action in actions}
            self.follow(actions)

    @rule(number=RECENT, status=STATUSES, final=st.booleans(), token=st.integers(0, 5))
    def reply(self, number: int, status: Status, final: bool, token: int) -> None:
        message = reply(self.recent(number), status, final=final, tokens=bytes([token]), retry_after_ms=50 * token)
        self.follow(self.requests.on_reply(message, self.now))

    @rule(number=RECENT)
    def broker_refuses(self, number: int) -> None:
        self.follow(self.requests.on_not_taken(self.recent(number), BROKER))

    @rule(number=RECENT, is_complete=st.booleans())
    def contents_are_complete_or_not(self, number: int, is_complete: bool) -> None:
        self.is_complete = is_complete
        if is_complete:
            self.follow(self.requests.on_complete(self.recent(number), self.now))

    @rule(number=RECENT)
    def answer_cannot_be_used(self, number: int) -> None:
        self.follow(self.requests.on_unusable_answer(self.recent(number), Why("failed", "")))

    @rule(number=RECENT)
    def budget_is_spent(self, number: int) -> None:
        if send := self.sent.pop(self.recent(number), None):
            self.follow(self.requests.on_unsent(send, Why("no_bytes", ""), self.now))

    @rule(can_store=st.booleans())
    def disk_takes_more_or_not(self, can_store: bool) -> None:
        self.requests.can_store = can_store and self.has_outbox

    @precondition(lambda self: self.to_store)
    @rule(count=st.integers(1, 4))
    def disk_writes(self, count: int) -> None:
        written, self.to_store = self.to_store[:count], self.to_store[count:]
        for request_id in written:
            if request_id in self.pending_disk:
                self.disk[request_id] = self.pending_disk.pop(request_id)
        self.follow(self.requests.on_stored(written, self.now))

    @precondition(lambda self: self.to_read)
    @rule(has_lost=st.booleans())
    def disk_reads(self, has_lost: bool) -> None:
        request_id = self.to_read.pop(0)
        content = None if has_lost else self.pending_disk.get(request_id, self.disk.get(request_id))
        self.follow(self.requests.on_read(request_id, content, self.now))

    @rule(number=RECENT)
    def disk_forgets(self, number: int) -> None:
        request_id = self.recent(number)
        if self.disk.pop(request_id, None) is not None:
            self.follow(self.requests.on_read(request_id, None, self.now))

    @rule(number=RECENT)
    def process_ends_before_the_disk_has_written(self, number: int) -> None:
        """One request of those; `stopped_in_order_and_started_again` is the other end."""
        if content := self.pending_disk.get(request_id := self.recent(number)):
            self.follow(self.requests.on_unwritten(request_id, content))

    @rule(missing=st.integers(0, 2))
    def killed_and_started_again(self, missing: int) -> None:
        """Nothing is told at a kill. Requests that were only in memory are gone with the process that counted them."""
        self.begin_run()
        found = [Found(request_id, len(content), 1.0) for request_id, content in self.disk.items()]
        missing *= self.has_outbox
        self.finals[MISSING] = missing  # the outbox tells these itself
        self.follow(self.requests.on_found(found, missing, self.now))
        assert self.requests.counts.found == (len(found) + missing if self.has_outbox else 0)

    @rule()
    def stopped_in_order_and_started_again(self) -> None:
        self.follow(self.requests.close(Why("stopping", ""), self.now))
        counts = self.requests.counts
        assert counts.open == counts.improvable == 0
        self.disk |= self.pending_disk
        assert counts.kept <= len(self.disk)
        self.begin_run()
        self.follow(self.requests.on_found([Found(i, len(c), 1.0) for i, c in self.disk.items()], 0, self.now))

    @invariant()
    def every_request_is_in_one_place(self) -> None:
        counts = self.requests.counts
        assert counts.accepted + counts.found == counts.answered + counts.lost + counts.open + counts.kept
        assert counts.open <= 3 + 1  # a retry may come on top of the last live one
        assert all(count >= 0 for count in (counts.open, counts.kept, counts.improvable))

    @invariant()
    def no_request_has_two_final_events(self) -> None:
        assert all(count <= 1 for request_id, count in self.finals.items() if request_id != MISSING)
        ended = sum(self.finals.values())
        counts = self.requests.counts
        assert ended == counts.answered - counts.improvable + counts.lost


AnySchedule.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestAnySchedule = AnySchedule.TestCase
