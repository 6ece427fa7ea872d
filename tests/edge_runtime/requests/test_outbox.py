"""The outbox: its schedule over any order of events, and its thread on a real file."""

import queue
import random
import sqlite3
import threading
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge_runtime.config import OutboxConfig
from edge_runtime.requests.outbox import FIRST_RETRY_S, LAST_RETRY_S, QUEUE, WINDOW, Outbox, Schedule
from edge_runtime.requests.store import Kept, Spool

WALL = 1.8e9
LONG_S = 30.0  # an event that does not come in this time never comes


def item(number: int, size: int = 400) -> Kept:
    return Kept(number.to_bytes(8, "big"), WALL - 5, WALL, random.Random(number).randbytes(size), b"{}")


IDS = [item(n).request_id for n in range(20)]


# The schedule


def test_the_oldest_comes_first_and_never_faster_than_the_rate():
    schedule = Schedule(2.0, random.Random(0))
    assert schedule.take(IDS, 10.0) == IDS[0]
    assert schedule.free_at() == 10.5
    assert schedule.take(IDS, 10.4) is None
    assert schedule.take(IDS, 10.5) == IDS[1]


def test_no_more_are_out_than_the_window_holds():
    schedule = Schedule(1000.0, random.Random(0))
    assert [schedule.take(IDS, float(n)) for n in range(WINDOW + 1)] == [*IDS[:WINDOW], None]
    schedule.forget(IDS[2])
    assert schedule.take(IDS[WINDOW:], 99.0) == IDS[WINDOW]


def test_a_held_item_waits_for_its_first_failure():
    schedule = Schedule(1.0, random.Random(0))
    schedule.hold(IDS[0])
    assert schedule.take(IDS[:1], 0.0) is None
    schedule.failed(IDS[0], 1, 0.0)
    assert schedule.take(IDS[:1], FIRST_RETRY_S / 2 - 0.1) is None
    assert schedule.take(IDS[:1], FIRST_RETRY_S) == IDS[0]


def test_every_try_in_vain_doubles_the_distance_up_to_a_bound():
    for tries in range(1, 40):
        schedule = Schedule(1.0, random.Random(tries))
        schedule.failed(IDS[0], tries, 0.0)
        most = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** (tries - 1))
        assert schedule.take(IDS[:1], most / 2 - 0.01) is None
        assert schedule.take(IDS[:1], most) == IDS[0]


class AnyOrder(RuleBasedStateMachine):
    """Takes, failures and ends in any order, time in any steps."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.now, self.last = Schedule(4.0, random.Random(0)), 0.0, -1.0
        self.waiting, self.out, self.later = list(IDS), set[bytes](), dict[bytes, float]()

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def take(self) -> None:
        taken = self.schedule.take(self.waiting, self.now)
        may = [one for one in self.waiting if one not in self.out and self.later.get(one, 0.0) <= self.now]
        if taken is None:
            surely = [one for one in may if one not in self.later]
            assert not surely or len(self.out) == WINDOW or self.now < self.last + 0.25
            return
        assert self.now >= self.last + 0.25
        assert taken in may
        assert not [one for one in may[: may.index(taken)] if one not in self.later]
        self.last = self.now
        self.out.add(taken)
        self.later.pop(taken, None)

    @rule(data=st.data(), tries=st.integers(1, 5))
    def fail(self, data: st.DataObject, tries: int) -> None:
        if self.out:
            one = data.draw(st.sampled_from(sorted(self.out)))
            self.schedule.failed(one, tries, self.now)
            self.out.discard(one)
            self.later[one] = self.now + FIRST_RETRY_S * 2 ** (tries - 1) / 2  # at the earliest

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.waiting:
            one = data.draw(st.sampled_from(self.waiting))
            self.schedule.forget(one)
            self.waiting.remove(one)
            self.out.discard(one)
            self.later.pop(one, None)

    @invariant()
    def the_window_holds(self) -> None:
        assert len(self.out) <= WINDOW


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, deadline=None)


# The thread


class Owner:
    """Remembers what it is told; `room` says whether it may be asked."""

    def __init__(self, path: Path, *, room: bool = True, per_s: float = 1000.0, max_bytes: int = 1 << 20) -> None:
        self.due: queue.Queue[tuple[Kept, float]] = queue.Queue()
        self.dropped: queue.Queue[tuple[list[Kept], str]] = queue.Queue()
        self.safe: queue.Queue[tuple[bytes, ...]] = queue.Queue()
        self.room = threading.Event()
        if room:
            self.room.set()
        self.outbox = Outbox(
            OutboxConfig(str(path), max_bytes=max_bytes, replay_per_s=per_s),
            on_due=lambda one, age_s: self.due.put((one, age_s)),
            on_dropped=lambda items, reason: self.dropped.put((items, reason)),
            may_replay=self.room.is_set,
            on_kept=self.safe.put,
        )

    def next_due(self) -> Kept:
        return self.due.get(timeout=LONG_S)[0]

    def wait_until_safe(self, count: int) -> None:
        while count > 0:
            count -= len(self.safe.get(timeout=LONG_S))


def held_together(outbox: Outbox) -> bool:
    counts = outbox.counts
    return counts.found + counts.kept == counts.answered + sum(counts.dropped.values()) + counts.gaps + counts.now


def test_what_is_kept_is_asked_again_oldest_first_and_forgotten_when_answered(tmp_path):
    owner = Owner(tmp_path / "o.db")
    with owner.outbox as outbox:
        for n in range(10):
            assert outbox.keep(item(n))
        for n in range(10):
            assert owner.next_due() == item(n)
            outbox.done(item(n).request_id)
    counts = outbox.counts
    assert (counts.kept, counts.answered, counts.replayed, counts.now, counts.bytes) == (10, 10, 10, 0, 0)
    assert counts.is_on_disk
    assert held_together(outbox)
    assert Spool(tmp_path / "o.db", 1 << 20, 60.0, now=0.0, wall=WALL).found == 0


def test_the_age_is_that_since_capture(tmp_path):
    owner = Owner(tmp_path / "o.db")
    with owner.outbox as outbox:
        outbox.keep(item(1))
        age_s = owner.due.get(timeout=LONG_S)[1]
    assert 5.0 <= age_s < 5.0 + LONG_S


def test_nothing_is_asked_while_there_is_no_room(tmp_path):
    owner = Owner(tmp_path / "o.db", room=False)
    with owner.outbox as outbox:
        for n in range(3):
            outbox.keep(item(n))
        owner.wait_until_safe(3)
        assert owner.due.empty()
        owner.room.set()
        assert owner.next_due() == item(0)


def test_the_rows_of_the_last_run_are_asked_again_in_the_next(tmp_path):
    first = Owner(tmp_path / "o.db", room=False)
    with first.outbox as outbox:
        for n in range(5):
            outbox.keep(item(n))
    assert outbox.counts.now == 5
    second = Owner(tmp_path / "o.db")
    with second.outbox as outbox:
        for n in range(5):
            assert second.next_due() == item(n)
            outbox.done(item(n).request_id)
    assert (outbox.counts.found, outbox.counts.answered, outbox.counts.now) == (5, 5, 0)


def test_a_dead_server_costs_no_more_than_the_window(tmp_path):
    owner = Owner(tmp_path / "o.db")
    with owner.outbox as outbox:
        for n in range(WINDOW + 3):
            outbox.keep(item(n))
        taken = [owner.next_due() for _ in range(WINDOW)]
        owner.wait_until_safe(WINDOW + 3)
        assert owner.due.empty()
        outbox.failed(taken[0].request_id)
        assert owner.next_due() == item(WINDOW)
    assert outbox.counts.now == WINDOW + 3
    assert held_together(outbox)


def test_a_held_item_is_safe_on_disk_and_not_asked_before_it_fails(tmp_path):
    owner = Owner(tmp_path / "o.db")
    with owner.outbox as outbox:
        outbox.keep(item(0), held=True)
        outbox.keep(item(1))
        assert owner.next_due() == item(1)
        owner.wait_until_safe(2)
    again = Owner(tmp_path / "o.db")
    with again.outbox:
        assert again.next_due() == item(0)


def test_a_late_answer_ends_an_item_that_waits(tmp_path):
    owner = Owner(tmp_path / "o.db", room=False)
    with owner.outbox as outbox:
        outbox.keep(item(0))
        outbox.done(item(0).request_id)
        outbox.done(item(1).request_id)
    assert (outbox.counts.answered, outbox.counts.now) == (1, 0)


def test_what_has_to_go_is_said_with_its_reason(tmp_path):
    owner = Owner(tmp_path / "o.db", room=False, max_bytes=65536)
    with owner.outbox as outbox:
        for n in range(100):
            outbox.keep(item(n, 2000))
    gone = []
    while not owner.dropped.empty():
        items, reason = owner.dropped.get()
        assert reason == "outbox full"
        gone += items
    assert gone == [item(n, 2000) for n in range(len(gone))]
    assert len(gone) + outbox.counts.now == 100
    assert dict(outbox.counts.dropped) == {"outbox full": len(gone)}
    assert held_together(outbox)


def test_an_item_dropped_while_it_is_asked_again_is_lost_only_if_it_finds_no_answer(tmp_path):
    owner = Owner(tmp_path / "o.db", max_bytes=65536)
    with owner.outbox as outbox:
        outbox.keep(item(0))
        outbox.keep(item(1))
        assert {owner.next_due(), owner.next_due()} == {item(0), item(1)}
        owner.room.clear()
        for n in range(2, 40):
            outbox.keep(item(n, 4000))
        outbox.done(item(0).request_id)
        outbox.failed(item(1).request_id)
        ended = []
        while item(1) not in ended:
            ended += owner.dropped.get(timeout=LONG_S)[0]
    while not owner.dropped.empty():
        ended += owner.dropped.get()[0]
    assert item(0) not in ended
    assert ended.count(item(1)) == 1
    assert outbox.counts.answered == 1
    assert held_together(outbox)


def test_what_a_damaged_disk_lost_while_the_owner_had_it_still_ends_as_the_owner_says(tmp_path, monkeypatch):
    is_damaged, write = threading.Event(), Spool._write

    def write_or_find_damage(self, db, tried):
        if is_damaged.is_set():
            is_damaged.clear()
            raise sqlite3.DatabaseError("database disk image is malformed")
        return write(self, db, tried)

    monkeypatch.setattr(Spool, "_write", write_or_find_damage)
    owner = Owner(tmp_path / "o.db")
    with owner.outbox as outbox:
        for n in (0, 1):
            outbox.keep(item(n))
            assert owner.next_due() == item(n)
        owner.room.clear()
        outbox.keep(item(2))
        owner.wait_until_safe(3)
        is_damaged.set()
        outbox.keep(item(3))
        owner.wait_until_safe(1)
        outbox.done(item(0).request_id)
        outbox.failed(item(1).request_id)
        assert owner.dropped.get(timeout=LONG_S) == ([item(1)], "lost from a damaged disk")
    counts = outbox.counts
    assert (counts.kept, counts.answered, counts.gaps, counts.now) == (4, 1, 1, 1)
    assert held_together(outbox)


def test_without_a_disk_it_works_from_memory_and_says_so(tmp_path):
    (tmp_path / "state").write_text("")
    owner = Owner(tmp_path / "state" / "o.db")
    with owner.outbox as outbox:
        outbox.keep(item(0))
        assert owner.next_due() == item(0)
        outbox.done(item(0).request_id)
        owner.room.clear()
        outbox.keep(item(1))
    assert owner.dropped.get(timeout=LONG_S) == ([item(1)], "not on disk when the board stopped")
    assert not outbox.counts.is_on_disk
    assert "state" in outbox.counts.fault
    assert held_together(outbox)


def test_a_callback_that_raises_is_counted_and_its_item_tried_later(tmp_path):
    seen: queue.Queue[Kept] = queue.Queue()

    def on_due(one: Kept, age_s: float) -> None:
        seen.put(one)
        if one != item(WINDOW):
            raise RuntimeError("the owner's mistake")

    settings = OutboxConfig(str(tmp_path / "o.db"), replay_per_s=1000.0)
    with Outbox(settings, on_due=on_due, on_dropped=lambda *_: None, may_replay=lambda: True) as outbox:
        for n in range(WINDOW + 1):
            outbox.keep(item(n))
        assert [seen.get(timeout=LONG_S) for _ in range(WINDOW + 1)] == [item(n) for n in range(WINDOW + 1)]
    assert outbox.counts.errors == WINDOW
    assert outbox.counts.now == WINDOW + 1


def test_a_disk_that_hangs_holds_up_nobody_and_the_surplus_is_refused(tmp_path):
    hangs, goes_on = threading.Event(), threading.Event()

    def may_replay() -> bool:  # stands for the disk: the outbox's thread stays in it
        hangs.set()
        return not goes_on.wait(LONG_S)

    settings = OutboxConfig(str(tmp_path / "o.db"))
    with Outbox(settings, on_due=lambda *_: None, on_dropped=lambda *_: None, may_replay=may_replay) as outbox:
        assert outbox.keep(item(0))
        assert hangs.wait(LONG_S)
        taken = [outbox.keep(item(n, 10)) for n in range(1, 2 * QUEUE)]
        assert taken == [True] * QUEUE + [False] * (QUEUE - 1)
        goes_on.set()
    assert outbox.counts.kept == QUEUE + 1
    assert not outbox.keep(item(9999))


def test_any_thread_may_keep_and_end(tmp_path):
    owner = Owner(tmp_path / "o.db")
    answered = 0

    def produce(start: int) -> None:
        for n in range(start, start + 30):
            assert owner.outbox.keep(item(n))

    with owner.outbox as outbox:
        threads = [threading.Thread(target=produce, args=(1000 * k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        while answered < 120:
            outbox.done(owner.next_due().request_id)
            answered += 1
        for thread in threads:
            thread.join()
    assert (outbox.counts.kept, outbox.counts.answered, outbox.counts.now) == (120, 120, 0)
