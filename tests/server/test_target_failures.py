"""What the log says of a target that fails and comes back."""

import logging

import pytest

from server.target_failures import MAX_ERROR, MAX_KINDS, NEW_AFTER_S, TargetFailures


@pytest.fixture
def failures(caplog: pytest.LogCaptureFixture) -> TargetFailures:
    caplog.set_level(logging.INFO)
    return TargetFailures("openai:x")


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Level and text of each line so far, which are then forgotten."""
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    caplog.clear()
    return lines


def counts(lines: list[tuple[str, str]]) -> list[str]:
    return [line.partition("count=")[2].split()[0] for _, line in lines]


def test_a_repeated_failure_is_told_at_the_counts_1_2_4_and_8(
    failures: TargetFailures, caplog: pytest.LogCaptureFixture
) -> None:
    for second in range(9):
        failures.failed("busy", f"no whole response within {60 - second / 10} s", float(second))
    lines = told(caplog)
    assert lines[0] == (
        "WARNING",
        "target failed target=openai:x kind=busy count=1 error=no whole response within 60.0 s",
    )
    assert counts(lines) == ["1", "2", "4", "8"]


def test_each_kind_is_told_at_once(failures: TargetFailures, caplog: pytest.LogCaptureFixture) -> None:
    failures.failed("busy", "500", 0.0)
    failures.failed("failed", "500", 0.0)
    failures.failed("failed", "the response is HTML", 0.0)
    assert len(told(caplog)) == 3


def test_the_first_answer_after_failures_is_told(failures: TargetFailures, caplog: pytest.LogCaptureFixture) -> None:
    failures.answered()
    assert told(caplog) == []
    for _ in range(3):
        failures.failed("busy", "no connection", 0.0)
    failures.answered()
    failures.answered()
    assert told(caplog)[2:] == [("INFO", "target answers again target=openai:x failures=3")]


def test_a_target_that_fails_every_other_time_does_not_fill_the_log(
    failures: TargetFailures, caplog: pytest.LogCaptureFixture
) -> None:
    for second in range(1000):
        failures.failed("busy", "no connection", float(second))
        failures.answered()
    assert len(told(caplog)) == 2 * 10


def test_after_a_quiet_time_a_failure_is_news_again(failures: TargetFailures, caplog: pytest.LogCaptureFixture) -> None:
    for second in (0.0, 1.0, 2.0, 3.0, 4.0, 4.0 + NEW_AFTER_S, 5.0 + 2 * NEW_AFTER_S):
        failures.failed("busy", "no connection", second)
    assert counts(told(caplog)) == ["1", "2", "4", "1"]


def test_texts_are_bounded_and_cannot_break_a_line(failures: TargetFailures, caplog: pytest.LogCaptureFixture) -> None:
    failures.failed("busy", "a\nb" + "x" * 10_000, 0.0)
    ((_, line),) = told(caplog)
    assert "\n" not in line
    assert len(line) < MAX_ERROR + 100
    for number in range(10 * MAX_KINDS):
        failures.failed("busy", "x" * number, 0.0)
    assert len(failures._counts) == MAX_KINDS
