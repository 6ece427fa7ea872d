"""When another server is asked again, and what is known of it meanwhile."""

from math import inf

import pytest

from server.targets.acceptance import (
    FIRST_CRASH_WAIT_S,
    FIRST_WAIT_S,
    LAST_CRASH_WAIT_S,
    LAST_DOUBT_WAIT_S,
    LAST_WAIT_S,
    Acceptance,
)


def test_each_refusal_doubles_the_wait_up_to_a_limit_and_only_a_new_reason_is_news() -> None:
    acceptance, waits, news = Acceptance(), [], []
    for _ in range(10):
        now = max(0.0, acceptance.due)
        news.append(acceptance.refused("no", now))
        waits.append(acceptance.due - now)
    assert waits == [min(LAST_WAIT_S, FIRST_WAIT_S * 2**n) for n in range(10)]
    assert news == [True] + [False] * 9
    assert acceptance.refused("never", acceptance.due)
    assert acceptance.in_words() == f"never: asked again after {LAST_WAIT_S:.0f} s"


def test_refusals_of_calls_at_the_same_time_count_once() -> None:
    acceptance = Acceptance(is_taken=True)
    for now in (0.0, 1.0, 2.0):
        acceptance.refused("no", now)
    assert acceptance.due == 2.0 + FIRST_WAIT_S


def test_what_may_crash_the_other_server_is_asked_rarely() -> None:
    acceptance, now = Acceptance(), 0.0
    for _ in range(9):
        acceptance.refused("it broke off", now, may_crash=True)
        assert FIRST_CRASH_WAIT_S <= acceptance.due - now <= LAST_CRASH_WAIT_S
        acceptance.forget("it is away")
        acceptance.was_away()
        assert acceptance.due > now
        now = acceptance.due
    acceptance.forget("another model", other_model=True)
    assert acceptance.due == -inf


def test_the_long_waits_begin_with_the_first_crash_however_often_it_was_refused_before() -> None:
    acceptance, now = Acceptance(), 0.0
    for _ in range(8):
        acceptance.refused("no", now)
        now = acceptance.due
    acceptance.refused("it broke off", now, may_crash=True)
    assert acceptance.due - now == FIRST_CRASH_WAIT_S
    now = acceptance.due
    acceptance.refused("no", now)
    assert acceptance.due - now == FIRST_WAIT_S


def test_doubts_bring_the_next_question_forward_and_less_so_each_time_that_they_were_wrong() -> None:
    acceptance, now, waits = Acceptance(), 0.0, []
    for _ in range(10):
        acceptance.taken(now)
        assert acceptance.due == inf
        acceptance.doubted(now)
        waits.append(acceptance.due - now)
        now = acceptance.due
    assert waits == [min(LAST_DOUBT_WAIT_S, FIRST_WAIT_S * 2**n) for n in range(10)]
    acceptance.taken(now)
    acceptance.doubted(now + 2 * LAST_WAIT_S)
    assert acceptance.due == now + 2 * LAST_WAIT_S  # at once


def test_a_question_without_an_answer_changes_nothing_and_is_asked_again() -> None:
    acceptance = Acceptance()
    acceptance.taken(0.0)
    acceptance.unknown(5.0)
    assert (acceptance.is_taken, acceptance.due, acceptance.in_words()) == (True, 5.0 + FIRST_WAIT_S, "")


def test_the_wait_that_is_named_is_the_one_that_is_kept() -> None:
    acceptance = Acceptance()
    for _ in range(3):
        acceptance.refused("no", max(0.0, acceptance.due))
    assert acceptance.in_words() == f"no: asked again after {4 * FIRST_WAIT_S:.0f} s"
    acceptance.unknown(now := acceptance.due)
    assert acceptance.due == now + FIRST_WAIT_S
    assert acceptance.in_words() == f"no: asked again after {FIRST_WAIT_S:.0f} s"


@pytest.mark.parametrize("is_taken", [True, False])
def test_after_a_restart_it_is_asked_at_once_and_what_is_known_holds_until_then(is_taken: bool) -> None:
    acceptance = Acceptance()
    acceptance.taken(0.0)
    if not is_taken:
        acceptance.refused("no", 0.0)
    acceptance.was_away()
    assert (acceptance.is_taken, bool(acceptance.why), acceptance.due) == (is_taken, not is_taken, -inf)


def test_after_another_model_the_waits_begin_anew() -> None:
    acceptance = Acceptance()
    for _ in range(5):
        acceptance.refused("no", max(0.0, acceptance.due))
    acceptance.forget("another model is served", other_model=True)
    assert acceptance.in_words() == f"another model is served: asked again after {FIRST_WAIT_S:.0f} s"
    acceptance.refused("no", 0.0)
    assert acceptance.due == FIRST_WAIT_S
