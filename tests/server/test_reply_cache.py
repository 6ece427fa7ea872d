"""What a server does with a request that comes again."""

from hypothesis import given
from hypothesis import strategies as st

from server.reply_cache import ReplyCache, Seen

ONE = ("b1", b"1")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_request_is_new_then_in_flight_then_answered_from_the_cache() -> None:
    cache = ReplyCache()
    assert cache.begin(ONE) is Seen.NEW
    assert cache.begin(ONE) is Seen.IN_FLIGHT
    cache.put(ONE, b"reply")
    assert cache.begin(ONE) == cache.begin(ONE) == b"reply"


def test_the_same_id_of_another_board_is_another_request() -> None:
    cache = ReplyCache()
    cache.begin(ONE)
    cache.put(ONE, b"reply")
    assert cache.begin(("b2", b"1")) is Seen.NEW


def test_a_forgotten_request_is_computed_when_it_comes_again() -> None:
    cache = ReplyCache()
    cache.begin(ONE)
    cache.forget(ONE)
    assert cache.begin(ONE) is Seen.NEW


def test_a_reply_older_than_the_bound_is_gone() -> None:
    clock = Clock()
    cache = ReplyCache(max_age_s=10, clock=clock)
    cache.put(ONE, b"reply")
    clock.now = 10
    assert cache.begin(ONE) == b"reply"
    clock.now = 10.1
    assert cache.begin(ONE) is Seen.NEW


def test_a_request_that_has_been_in_work_for_too_long_is_started_again() -> None:
    clock = Clock()
    cache = ReplyCache(max_flight_s=60, clock=clock)
    cache.begin(ONE)
    clock.now = 61
    assert cache.begin(ONE) is Seen.NEW


def test_the_oldest_replies_go_first_when_the_bytes_are_spent() -> None:
    cache = ReplyCache(max_bytes=10)
    for number in range(3):
        cache.put(("b1", bytes([number])), b"12345")
    assert [cache.begin(("b1", bytes([number]))) for number in range(3)] == [Seen.NEW, b"12345", b"12345"]


def test_requests_in_flight_are_bounded_too() -> None:
    cache = ReplyCache(max_replies=2)
    for number in range(4):
        cache.begin(("b1", bytes([number])))
    assert [cache.begin(("b1", bytes([number]))) for number in (2, 3)] == [Seen.IN_FLIGHT, Seen.IN_FLIGHT]
    assert cache.begin(("b1", b"\0")) is Seen.NEW


@given(st.lists(st.tuples(st.sampled_from("ab"), st.binary(max_size=1), st.binary(max_size=9)), max_size=40))
def test_whatever_is_put_the_bounds_hold_and_the_latest_reply_of_a_request_wins(puts) -> None:
    cache, latest = ReplyCache(max_replies=4, max_bytes=20), {}
    for board, request_id, reply in puts:
        cache.put((board, request_id), reply)
        latest[board, request_id] = reply
        kept = {key: found for key in latest if isinstance(found := cache.begin(key), bytes)}
        assert len(kept) <= 4
        assert sum(map(len, kept.values())) <= 20
        assert kept.items() <= latest.items()
        assert kept[board, request_id] == reply
