"""When a batch takes too long."""

import threading

from server.batch_times import LATE_BATCHES, LATE_S, BatchTimes


def test_an_engine_is_late_in_a_batch_that_takes_far_longer_than_usual() -> None:
    times = BatchTimes()
    assert not times.is_late(1e9)  # it waits for work
    times.begin(100.0)
    assert times.busy_s(103.0) == 3.0
    assert not times.is_late(100.0 + LATE_S)
    assert times.is_late(100.1 + LATE_S)
    times.end()
    assert (times.busy_s(200.0), times.is_late(200.0)) == (0.0, False)


def test_on_a_slow_machine_an_engine_has_more_time() -> None:
    times = BatchTimes()
    times.add(batch_ms=2000.0, pass_ms=100.0)
    times.begin(0.0)
    assert not times.is_late(2 * LATE_S)
    assert times.is_late(0.1 + 2 * LATE_BATCHES)
    assert times.medians_ms() == {"batch": 2000.0, "pass": 100.0}


def test_the_oldest_of_several_batches_counts() -> None:
    times = BatchTimes()
    times.begin(0.0)
    other = threading.Thread(target=times.begin, args=(5.0,))
    other.start()
    other.join()
    assert times.busy_s(8.0) == 8.0
    times.step(7.0)
    assert (times.busy_s(8.0), times.silent_s(8.0)) == (8.0, 3.0)  # silent is the other thread
    times.end()
    assert (times.busy_s(8.0), times.silent_s(8.0)) == (3.0, 3.0)


def test_a_call_that_may_take_long_does_not_hang_before() -> None:
    times = BatchTimes(call_s=300.0)
    times.begin(0.0)
    assert not times.is_late(300.0)
    assert times.is_late(301.0)
