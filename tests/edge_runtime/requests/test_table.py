"""The board's table of open requests, over any order of events."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge_runtime.requests.table import OpenRequests


def table(capacity: int = 4, min_resend_s: float = 1.0) -> OpenRequests[str]:
    return OpenRequests(capacity, min_resend_s=min_resend_s, rng=random.Random(0))


def test_a_reply_ends_a_request_and_returns_what_was_asked() -> None:
    requests = table()
    requests.open(b"1", "frame 1", deadline=9.0, now=0.0)
    entry = requests.answered(b"1", now=0.5)
    assert entry is not None
    assert entry.content == "frame 1"
    assert requests.counts.answered == 1
    assert requests.counts.open == 0


def test_an_unanswered_request_is_sent_again_with_its_id_at_growing_distances_until_its_deadline() -> None:
    requests = table()
    requests.open(b"1", "frame 1", deadline=30.0, now=0.0)
    times = []
    while (now := requests.next_at()) < 30.0:
        assert [entry.id for entry in requests.due(now)] == [b"1"]
        times.append(now)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert 1.0 <= gaps[0] <= 1.5
    assert all(2.0**n <= gap <= 1.5 * 2.0**n for n, gap in enumerate(gaps))
    assert len(gaps) >= 3
    assert [lost.reason for lost in requests.expired(30.0)] == [f"no reply to {len(times) + 1} sent"]
    assert requests.due(31.0) == []


def test_nothing_is_sent_again_before_four_times_the_usual_reply_time() -> None:
    requests = table()
    for number in range(20):
        requests.open(bytes([number]), "", deadline=99.0, now=0.0)
        requests.answered(bytes([number]), now=2.0)
    requests.open(b"slow", "", deadline=99.0, now=0.0)
    assert requests.next_at() >= 8.0


def test_the_reply_to_a_request_that_was_sent_twice_is_no_measure_of_reply_time() -> None:
    requests = table()
    requests.open(b"1", "", deadline=999.0, now=0.0)
    assert requests.due(10.0)
    assert requests.answered(b"1", now=100.0)
    requests.open(b"2", "", deadline=999.0, now=0.0)
    assert requests.next_at() <= 3.0  # doubled, but not four times 100


def test_what_was_due_and_could_not_be_sent_counts_as_sent_once() -> None:
    requests = table()
    requests.open(b"1", "", deadline=999.0, now=0.0)
    for _ in range(2):
        (entry,) = requests.due(requests.next_at())
        requests.unsent(entry.id)
    assert requests.counts.resent == 0
    assert requests.next_at() >= 3.0  # at growing distances all the same
    assert requests.answered(b"1", now=100.0)
    requests.open(b"2", "", deadline=999.0, now=100.0)
    assert requests.next_at() >= 500.0  # four times 100: its reply time was measured


@pytest.mark.parametrize("reply_s", [0.2, 1.6, 5.0, 30.0])
def test_replies_that_always_take_longer_than_the_interval_are_soon_asked_for_once(reply_s: float) -> None:
    requests = table(capacity=64)
    resent = []
    for number in range(20):
        start, before = 1000.0 * number, requests.counts.resent
        requests.open(bytes([number]), "", deadline=start + 999, now=start)
        while (now := requests.next_at()) < start + reply_s:
            requests.due(now)
        assert requests.answered(bytes([number]), start + reply_s)
        resent.append(requests.counts.resent - before)
    assert resent[2:] == [0] * 18


def test_the_interval_is_short_again_once_a_reply_was_measured_and_after_mere_silence() -> None:
    requests = table()
    requests.open(b"1", "", deadline=99.0, now=0.0)
    for _ in range(3):
        requests.due(requests.next_at())
    requests.answered(b"1", now=20.0)
    requests.open(b"2", "", deadline=999.0, now=100.0)
    assert requests.next_at() >= 108.0  # three doublings
    requests.answered(b"2", now=100.1)
    requests.open(b"3", "", deadline=202.0, now=200.0)
    assert requests.next_at() <= 201.5
    assert requests.due(201.5)
    assert requests.expired(202.0)
    requests.open(b"4", "", deadline=999.0, now=300.0)
    assert requests.next_at() <= 301.5


def test_a_server_that_is_always_busy_first_makes_no_lost_copy_wait_longer() -> None:
    requests = table()
    for number in range(20):
        requests.open(bytes([number]), "", deadline=999.0, now=0.0)
        requests.busy(bytes([number]), 0.1, now=0.0)
        assert requests.due(0.2)
        requests.answered(bytes([number]), now=0.3)
    requests.open(b"next", "", deadline=999.0, now=0.0)
    assert requests.next_at() <= 1.5


@pytest.mark.parametrize("retry_after_s", [0.0, 0.001])
def test_a_server_that_is_busy_for_no_time_is_asked_less_and_less_often(retry_after_s: float) -> None:
    requests = table()
    requests.open(b"1", "", deadline=9.0, now=0.0)
    requests.busy(b"1", retry_after_s, now=0.0)
    times = []
    while (now := requests.next_at()) < 9.0:
        times.append(now)
        assert requests.due(now)
        requests.busy(b"1", retry_after_s, now)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert all(0.05 * 2**n <= gap <= 1.5 * 0.05 * 2**n for n, gap in enumerate(gaps[:7]))
    assert all(3.2 <= gap <= 4.8 for gap in gaps[7:])


def test_a_busy_server_is_asked_again_later_than_it_said_and_the_request_stays_open() -> None:
    requests = table()
    requests.open(b"1", "", deadline=99.0, now=0.0)
    assert requests.busy(b"1", retry_after_s=10.0, now=0.1)
    assert requests.due(10.0) == []
    assert [entry.id for entry in requests.due(15.2)] == [b"1"]
    assert requests.counts.open == 1


def test_one_more_than_fits_is_lost_and_those_that_wait_stay() -> None:
    requests = table(capacity=2)
    assert requests.open(b"1", "first", deadline=9.0, now=0.0) is None
    assert requests.open(b"2", "second", deadline=9.0, now=0.0) is None
    lost = requests.open(b"3", "third", deadline=9.0, now=0.0)
    assert lost is not None
    assert (lost.content, lost.reason) == ("third", "2 requests wait already")
    assert requests.has_ended(b"3")
    assert requests.answered(b"1", now=0.1) is not None
    assert requests.open(b"4", "fourth", deadline=9.0, now=0.2) is None


def test_duplicate_late_and_unknown_replies_are_told_apart() -> None:
    requests = table()
    requests.open(b"1", "", deadline=9.0, now=0.0)
    requests.open(b"2", "", deadline=1.0, now=0.0)
    requests.answered(b"1", now=0.5)
    assert len(requests.expired(now=1.0)) == 1
    assert requests.answered(b"1", now=2.0) is None
    assert requests.answered(b"2", now=2.0) is None
    assert requests.answered(b"3", now=2.0) is None
    assert not requests.busy(b"3", 1.0, now=2.0)
    counts = requests.counts
    assert (counts.duplicate, counts.late, counts.unknown) == (1, 1, 2)


def test_an_id_is_not_opened_twice() -> None:
    requests = table()
    requests.open(b"1", "", deadline=9.0, now=0.0)
    with pytest.raises(ValueError, match="is open already"):
        requests.open(b"1", "", deadline=9.0, now=0.0)


IDS = st.integers(0, 11).map(lambda number: bytes([number]))


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Each request that was accepted is told to the caller as ended exactly once, or is still open."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = table(capacity=5)
        self.now = 0.0
        self.ids: set[bytes] = set()  # open, as the caller must see it
        self.accepted = self.answered = self.lost = self.strangers = 0

    def ended(self, ids: list[bytes]) -> None:
        for request_id in ids:
            self.ids.remove(request_id)  # KeyError: told twice, or never accepted
            self.lost += 1

    @rule(seconds=st.floats(0, 5))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(request_id=IDS, budget=st.floats(-1, 10))
    def ask(self, request_id: bytes, budget: float) -> None:
        if request_id not in self.ids:
            self.ids.add(request_id)
            self.accepted += 1
            lost = self.requests.open(request_id, "", self.now + budget, self.now)
            self.ended([lost.id] if lost else [])

    @rule(request_id=IDS)
    def reply(self, request_id: bytes) -> None:
        entry = self.requests.answered(request_id, self.now)
        assert (entry is not None) == (request_id in self.ids)
        self.ids.discard(request_id)
        self.answered += entry is not None
        self.strangers += entry is None

    @rule(request_id=IDS, retry_after_s=st.floats(0, 20))
    def busy(self, request_id: bytes, retry_after_s: float) -> None:
        was_open = self.requests.busy(request_id, retry_after_s, self.now)
        assert was_open == (request_id in self.ids)
        self.strangers += not was_open

    @rule()
    def look_at_the_clock(self) -> None:
        self.ended([lost.id for lost in self.requests.expired(self.now)])
        again = [entry.id for entry in self.requests.due(self.now)]
        assert set(again) <= self.ids
        assert len(set(again)) == len(again)
        assert self.requests.next_at() > self.now

    @rule(request_id=IDS)
    def refused_by_the_broker(self, request_id: bytes) -> None:
        lost = self.requests.lose(request_id, "refused")
        assert (lost is not None) == (request_id in self.ids)
        self.ended([lost.id] if lost else [])

    @rule()
    def close(self) -> None:
        self.ended([lost.id for lost in self.requests.close()])
        assert not self.ids

    @invariant()
    def accepted_is_answered_and_lost_and_open(self) -> None:
        counts = self.requests.counts
        assert (counts.accepted, counts.answered, counts.lost) == (self.accepted, self.answered, self.lost)
        assert counts.accepted == counts.answered + counts.lost + counts.open
        assert counts.open == len(self.ids) <= 5
        assert counts.duplicate + counts.late + counts.unknown == self.strangers


AnyOrderOfEvents.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
