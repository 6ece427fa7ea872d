"""The queue: bounded, fair, nothing stale, and every item leaves it once."""

import threading
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.batcher import MAX_BOARDS, Batch, Batcher


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def batcher(capacity: int = 8, max_batch: int = 4, clock: Clock | None = None) -> Batcher[str]:
    return Batcher(capacity, max_batch, 0.0, clock or Clock())


def served(queue: Batcher[str], cost_ms: float = 1.0) -> list[str]:
    """The items of the next batch, each at this cost; a board is the first letter of its items."""
    items = queue.take(0).items
    for item in items:
        queue.done(item[0], cost_ms)
    return items


def test_a_batch_takes_one_of_each_board_in_turn() -> None:
    queue = batcher()
    for item in ("a1", "a2", "a3", "b1", "c1"):
        assert queue.put(item[0], item, 1.0) is None
    assert served(queue) == ["a1", "b1", "c1", "a2"]
    assert served(queue) == ["a3"]
    assert queue.take(0) == Batch()
    assert queue.is_idle


def test_boards_that_always_ask_share_time_and_not_turns() -> None:
    queue, cost_ms, spent_ms = batcher(max_batch=1), {"a": 100.0, "b": 1.0, "c": 7.0}, Counter[str]()
    for number in range(3000):
        for board in cost_ms:
            queue.put(board, f"{board}{number}", 1.0)
        (item,) = queue.take(0).items
        queue.done(item[0], cost_ms[item[0]])
        spent_ms[item[0]] += cost_ms[item[0]]
    assert max(spent_ms.values()) - min(spent_ms.values()) <= 2 * max(cost_ms.values())


def test_a_board_that_asks_rarely_waits_for_one_expensive_request_at_most() -> None:
    queue = batcher(max_batch=1)
    queue.put("a", "a0", 1.0)
    for number in range(1, 50):
        queue.put("a", f"a{number}", 1.0)
        assert queue.take(0).items[0][0] == "a"
        queue.put("b", "b", 1.0)  # while it is served
        queue.done("a", 1000.0 + number % 7)
        assert served(queue) == ["b"]


def test_a_board_that_was_away_has_saved_nothing() -> None:
    queue = batcher(max_batch=1)
    queue.put("b", "b0", 1.0)
    assert served(queue) == ["b0"]
    for number in range(100):
        queue.put("a", f"a{number}", 1.0)
        assert served(queue, 10.0) == [f"a{number}"]
    for number in range(4):
        queue.put("b", f"b{number}", 1.0)
        queue.put("a", f"a{number}", 1.0)
    order = [item[0] for _ in range(8) for item in served(queue, 10.0)]
    assert 2 <= order[:6].count("a") <= 4


def test_one_board_occupies_one_of_several_threads() -> None:
    queue = batcher(max_batch=1)
    for item in ("a1", "a2", "b1"):
        queue.put(item[0], item, 1.0)
    assert queue.take(0).items == ["a1"]
    assert queue.take(0).items == ["b1"]
    assert queue.take(0) == Batch()
    queue.done("b", 1.0)
    assert queue.take(0) == Batch()
    assert not queue.is_idle
    queue.done("a", 1.0)
    assert queue.take(0).items == ["a2"]


def test_what_is_cleared_is_not_served() -> None:
    queue = batcher()
    for item in ("a1", "b1", "a2"):
        queue.put(item[0], item, 1.0)
    assert sorted(queue.clear()) == ["a1", "a2", "b1"]
    assert queue.is_idle
    assert queue.put("a", "a3", 1.0) is None
    assert served(queue) == ["a3"]


def test_the_costs_of_boards_that_are_gone_are_forgotten() -> None:
    queue = batcher()
    for number in range(2 * MAX_BOARDS):
        queue.put(f"b{number}", "x", 1.0)
        queue.take(0)
        queue.done(f"b{number}", 1.0)
    assert len(queue._served_ms) <= MAX_BOARDS


def test_ten_thousand_boards_that_appear_at_once_fill_the_queue_and_nothing_else() -> None:
    queue = batcher(capacity=8)
    refused = [queue.put(f"b{number}", f"b{number}", 1.0) for number in range(10_000)]
    assert refused == [None] * 8 + [f"b{number}" for number in range(8, 10_000)]
    assert len(queue) == 8
    assert len(queue._served_ms) <= MAX_BOARDS


def test_a_stale_request_is_taken_out_but_not_served() -> None:
    clock = Clock()
    queue = batcher(clock=clock)
    queue.put("a", "late", 1.0)
    queue.put("b", "in time", 2.0)
    clock.now = 1.0
    assert queue.take(0) == Batch(items=["in time"], stale=["late"])


def test_a_full_queue_refuses_the_board_that_fills_it_and_admits_the_others() -> None:
    queue = batcher(capacity=4)
    assert [queue.put("flood", f"f{i}", 1.0) for i in range(6)] == [None] * 4 + ["f4", "f5"]
    assert queue.put("quiet", "q0", 1.0) == "f3"
    assert queue.put("quiet", "q1", 1.0) == "f2"
    assert queue.put("quiet", "q2", 1.0) == "q2"  # both have half: the newcomer waits
    assert queue.put("third", "t0", 1.0) in ("f1", "q1")
    assert len(queue) == 4


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=60), st.integers(1, 5), st.integers(1, 4))
def test_every_item_leaves_once_and_no_board_holds_more_than_its_share_against_another(puts, capacity, size) -> None:
    queue, left = batcher(capacity, size), []
    held: Counter[str] = Counter()
    for number, (board, takes) in enumerate(puts):
        refused = queue.put(board, f"{board}{number}", 1.0)
        held[board] += 1
        if refused:
            left.append(refused)
            held[refused[0]] -= 1
            assert held[refused[0]] + 1 >= max(held.values())  # nobody was longer
        if takes:
            taken = served(queue)
            assert len(taken) <= size
            left += taken
            held -= Counter(item[0] for item in taken)
        assert len(queue) == sum(held.values()) <= capacity
    while taken := served(queue):
        left += taken
    assert sorted(left) == sorted(f"{board}{i}" for i, (board, _) in enumerate(puts))


def test_a_waiting_worker_is_woken_by_the_first_item() -> None:
    queue = batcher()
    taken: list[Batch[str]] = []
    worker = threading.Thread(target=lambda: taken.append(queue.take(60)))
    worker.start()
    queue.put("a", "a1", 1.0)
    worker.join(60)
    assert taken == [Batch(items=["a1"])]


def test_who_is_ahead_of_one_more_is_counted_by_turns() -> None:
    batcher: Batcher[int] = Batcher(100, 8, 0.0, lambda: 0.0)
    assert batcher.ahead_of("quiet") == 0
    for number in range(10):
        batcher.put("flood", number, 1.0)
    assert batcher.ahead_of("flood") == 10
    assert batcher.ahead_of("quiet") == 1
    batcher.put("quiet", 0, 1.0)
    assert batcher.ahead_of("quiet") == 3


def test_a_request_waits_for_others_only_if_the_last_ones_came_together() -> None:
    queue: Batcher[str] = Batcher(8, 2, 1e6, Clock())
    for item in ("a1", "a2"):
        queue.put("a", item, 1.0)
        assert served(queue) == [item]  # alone, and at once
    for board in "ab":
        queue.put(board, board, 1.0)
    assert sorted(served(queue)) == ["a", "b"]
    queue.put("a", "first", 1.0)
    threading.Timer(0.05, queue.put, ["b", "second", 1.0]).start()
    assert sorted(queue.take(0).items) == ["first", "second"]


def test_one_board_occupies_as_many_threads_as_it_may() -> None:
    queue: Batcher[str] = Batcher(8, 1, 0.0, Clock(), per_board=2)
    for item in ("a1", "a2", "a3", "b1"):
        queue.put(item[0], item, 1.0)
    assert sorted(queue.take(0).items[0] for _ in range(3)) == ["a1", "a2", "b1"]
    assert queue.take(0) == Batch()  # a3 waits, though a thread is free
    queue.done("a", 1.0)
    assert queue.take(0).items == ["a3"]
