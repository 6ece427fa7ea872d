"""What a server does with a request that comes again."""

from hypothesis import given
from hypothesis import strategies as st

from server.reply_cache import Cached, InFlight, New, ReplyCache


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_request_is_new_then_in_flight_then_answered_from_the_cache() -> None:
    cache = ReplyCache()
    assert cache.begin("b1", b"1") == New()
    assert cache.begin("b1", b"1") == InFlight()
    cache.put("b1", b"1", b"reply")
    assert cache.begin("b1", b"1") == Cached(b"reply")
    assert cache.get("b1", b"1") == b"reply"


def test_the_same_id_of_another_board_is_another_request() -> None:
    cache = ReplyCache()
    cache.begin("b1", b"1")
    cache.put("b1", b"1", b"reply")
    assert cache.get("b2", b"1") is None
    assert cache.begin("b2", b"1") == New()


def test_a_forgotten_request_is_computed_when_it_comes_again() -> None:
    cache = ReplyCache()
    cache.begin("b1", b"1")
    cache.forget("b1", b"1")
    assert cache.begin("b1", b"1") == New()


def test_to_look_for_a_reply_starts_nothing() -> None:
    cache = ReplyCache()
    assert cache.get("b1", b"1") is None
    assert cache.begin("b1", b"1") == New()


def test_a_reply_older_than_the_bound_is_gone() -> None:
    clock = Clock()
    cache = ReplyCache(max_age_s=10, clock=clock)
    cache.put("b1", b"1", b"reply")
    clock.now = 10
    assert cache.get("b1", b"1") == b"reply"
    clock.now = 10.1
    assert cache.get("b1", b"1") is None
    assert len(cache) == 0


def test_a_request_that_has_been_in_work_for_too_long_is_started_again() -> None:
    clock = Clock()
    cache = ReplyCache(max_flight_s=60, clock=clock)
    cache.begin("b1", b"1")
    clock.now = 61
    assert cache.begin("b1", b"1") == New()


def test_the_oldest_replies_go_first_when_the_bytes_are_spent() -> None:
    cache = ReplyCache(max_bytes=10)
    for number in range(3):
        cache.put("b1", bytes([number]), b"12345")
    assert [cache.get("b1", bytes([number])) for number in range(3)] == [None, b"12345", b"12345"]


def test_requests_in_flight_are_bounded_too() -> None:
    cache = ReplyCache(max_replies=2)
    for number in range(4):
        cache.begin("b1", bytes([number]))
    assert [cache.begin("b1", bytes([number])) for number in (2, 3)] == [InFlight(), InFlight()]
    assert cache.begin("b1", b"\0") == New()


@given(st.lists(st.tuples(st.sampled_from("ab"), st.binary(max_size=1), st.binary(max_size=9)), max_size=40))
def test_whatever_is_put_the_bounds_hold_and_the_latest_reply_of_a_request_wins(puts) -> None:
    cache, latest = ReplyCache(max_replies=4, max_bytes=20), {}
    for board, request_id, reply in puts:
        cache.put(board, request_id, reply)
        latest[board, request_id] = reply
        kept = {key: found for key in latest if (found := cache.get(*key)) is not None}
        assert len(kept) == len(cache) <= 4
        assert sum(map(len, kept.values())) <= 20
        assert kept.items() <= latest.items()
        assert kept[board, request_id] == reply
