"""The byte budget, over arbitrary times and sizes."""

import threading
from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.requests.byte_budget import ByteBudget


@given(
    limit=st.integers(1, 20_000),
    sends=st.lists(st.tuples(st.floats(0, 5), st.integers(1, 1200)), min_size=1, max_size=200),
)
def test_no_minute_has_more_bytes_than_its_budget(limit, sends):
    budget, sent, now = ByteBudget(limit), deque[tuple[float, int]](), 0.0
    for step, size in sends:
        now += step
        if budget.take(size, now):
            sent.append((now, size))
        while sent and now - sent[0][0] >= 60.0:
            sent.popleft()
        assert sum(size for _, size in sent) <= limit
        assert budget.spent(now) >= sum(size for _, size in sent)  # rounded up by a tenth of a second, never down


def test_what_was_spent_counts_for_a_minute():
    budget = ByteBudget(1000)
    assert budget.take(600, 10.0)
    assert not budget.take(600, 69.9)
    assert (budget.spent(25.1), budget.spent(25.1, 15.0)) == (600, 0)
    assert budget.take(600, 70.1)


def test_bytes_that_were_not_sent_come_back_whatever_was_sent_since():
    budget = ByteBudget(1000)
    assert budget.take(500, 10.0)
    assert budget.take(100, 10.5)
    budget.refund(500, 10.6)
    assert [budget.spent(now) for now in (10.6, 70.4, 70.5)] == [100, 100, 0]


def test_without_a_budget_everything_leaves_and_memory_is_bounded():
    budget = ByteBudget()
    assert all(budget.take(10**6, number / 1000) for number in range(100_000))
    assert len(budget._entries) <= 601


def test_threads_that_spend_at_once_never_spend_more_than_there_is():
    budget, taken = ByteBudget(1000), [0] * 4

    def spend(thread: int) -> None:
        taken[thread] = sum(budget.take(1, 0.0) for _ in range(1000))

    threads = [threading.Thread(target=spend, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == budget.spent(0.0) == 1000
