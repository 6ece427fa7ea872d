"""The budget of a day: what is set aside, what is spent, and what is left after a restart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from server.targets.spending import DAY_S, Spending, next_day

NOON = 20_000.5 * DAY_S
ROOT = Path(__file__).parents[3]


def test_calls_are_made_until_the_budget_has_no_room_for_one_more() -> None:
    spending, made = Spending(budget=1.0, estimate=0.25), 0
    while (set_aside := spending.begin(NOON)) is not None:
        spending.end(set_aside, 0.25, NOON)
        made += 1
    assert (made, spending.today(NOON), spending.is_spent(NOON)) == (4, 1.0, True)


def test_calls_that_are_being_made_count() -> None:
    spending = Spending(budget=1.0, estimate=0.4)
    first, second = spending.begin(NOON), spending.begin(NOON)
    assert spending.begin(NOON) is None
    assert not spending.is_spent(NOON)  # they may cost less
    spending.end(first, 0.1, NOON)
    spending.end(second, 0.1, NOON)
    assert spending.begin(NOON) is not None


def test_a_new_day_in_utc_has_a_new_budget_and_an_old_one_has_not() -> None:
    spending = Spending(budget=1.0, estimate=0.5)
    for _ in range(2):
        spending.end(spending.begin(NOON), 0.5, NOON)
    assert spending.begin(NOON + DAY_S / 2 - 1) is None
    assert next_day(NOON) == "2024-10-05 00:00 UTC"
    assert spending.begin(NOON + DAY_S / 2) is not None
    spending.end(0.5, 1.0, NOON + DAY_S / 2)
    assert spending.begin(NOON) is None  # the clock was set back over midnight
    assert spending.total == 2.0


def test_a_call_dearer_than_the_estimate_raises_it_until_the_day_ends() -> None:
    spending = Spending(budget=10.0, estimate=1.0)
    spending.end(spending.begin(NOON), 6.0, NOON)
    assert spending.begin(NOON) is None
    assert spending.begin(NOON + DAY_S) == 1.0


def test_after_the_first_call_the_estimate_is_the_dearest_call_and_no_longer_the_guess() -> None:
    spending, made = Spending(budget=1.0, estimate=0.5), 0
    while (set_aside := spending.begin(NOON)) is not None:
        spending.end(set_aside, 0.125, NOON)
        made += 1
    assert (made, spending.today(NOON)) == (8, 1.0)


def test_a_call_of_unknown_cost_counts_as_the_estimate_and_says_nothing_of_later_ones() -> None:
    spending = Spending(budget=10.0, estimate=2.0)
    for cost, counted, estimate in ((None, 2.0, 2.0), (0.0, 2.0, 2.0), (0.5, 2.5, 0.5), (None, 3.0, 0.5)):
        spending.end(spending.begin(NOON), cost, NOON)
        set_aside = spending.begin(NOON)
        spending.end(set_aside, 0.0, NOON)
        assert (spending.today(NOON), set_aside) == (counted, estimate)


def test_what_was_spent_today_outlives_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "spent.json"
    spending = Spending(budget=1.0, estimate=0.5, file=file)
    spending.end(spending.begin(NOON), 0.75, NOON)
    del spending
    again = Spending(budget=1.0, estimate=0.5, file=file)
    assert (again.today(NOON), again.is_spent(NOON)) == (0.75, True)
    assert again.today(NOON + DAY_S) == 0.0


def test_the_dearest_call_of_today_outlives_a_restart_and_not_the_day(tmp_path: Path) -> None:
    file = tmp_path / "spent.json"
    spending = Spending(budget=1.0, estimate=0.5, file=file)
    spending.end(spending.begin(NOON), 0.125, NOON)
    del spending
    again = Spending(budget=1.0, estimate=0.5, file=file)
    assert (again.begin(NOON), again.begin(NOON + DAY_S)) == (0.125, 0.5)


def test_a_file_of_an_older_version_has_no_dearest_call(tmp_path: Path) -> None:
    (tmp_path / "spent.json").write_text('{"day": 20000, "spent": 0.25}')
    spending = Spending(1.0, 0.5, tmp_path / "spent.json")
    assert (spending.today(NOON), spending.begin(NOON)) == (0.25, 0.5)


def test_two_servers_with_one_file_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "spent.json"
    first = Spending(1.0, 0.5, file)
    code = f"import pathlib, server.targets.spending as it; it.Spending(1.0, 0.5, pathlib.Path({str(file)!r}))"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "another server uses it: give each server a spent_file of its own" in refused.stderr
    first.end(first.begin(NOON), 0.25, NOON)  # another file takes its place, and it is still locked
    with pytest.raises(ConfigError, match="give each server a spent_file of its own"):
        Spending(1.0, 0.5, file)
    del first
    assert Spending(1.0, 0.5, file).today(NOON) == 0.25


def test_what_was_spent_today_is_on_the_medium_before_the_next_call(tmp_path: Path, monkeypatch) -> None:
    """A power cut takes what is not synced: the content of a file, and the folder's entry for it."""
    file, steps, sync, replace = tmp_path / "spent.json", [], os.fsync, os.replace
    spending = Spending(budget=1.0, estimate=0.5, file=file)
    monkeypatch.setattr("os.fsync", lambda fd: (sync(fd), steps.append(Path(f"/proc/self/fd/{fd}").resolve())))
    monkeypatch.setattr("os.replace", lambda *paths: (replace(*paths), steps.append(paths)))
    spending.end(spending.begin(NOON), 0.75, NOON)
    content, (new, old), folder = steps
    assert (content, old, folder) == (new, file, tmp_path)
    assert json.loads(file.read_bytes())["spent"] == 0.75


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b'{"day": 1, "spent": 0, "dearest": NaN}',
        b'{"day": 1, "spent": NaN}',
        b'{"day": 1, "spent": -1}',
        b'{"day": 1e99, "spent": 0}',
        b"\xff",
    ],
)
def test_a_file_that_is_none_of_ours_is_named_and_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "spent.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"spent_file = .*: is not one of this program"):
        Spending(1.0, 0.1, tmp_path / "spent.json")
    assert (tmp_path / "spent.json").read_bytes() == content


def test_a_file_that_cannot_be_written_is_found_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        Spending(1.0, 0.1, Path("/proc/none/spent.json"))


def test_the_folder_of_the_file_is_created(tmp_path: Path) -> None:
    Spending(1.0, 0.1, tmp_path / "none" / "spent.json")
    assert (tmp_path / "none" / "spent.json").is_file()


@given(st.lists(st.floats(0, 2), max_size=30), st.floats(0.01, 1), st.floats(1, 10))
def test_at_most_one_call_is_dearer_than_what_is_left(costs: list[float], estimate: float, budget: float) -> None:
    spending, spent = Spending(budget, estimate), [0.0]
    for cost in costs:
        if (set_aside := spending.begin(NOON)) is not None:
            spending.end(set_aside, cost, NOON)
            spent.append(spent[-1] + cost)
    assert spent[-1] == pytest.approx(spending.today(NOON))
    assert len([total for total in spent if total > budget]) <= 1


@given(
    st.lists(st.tuples(st.floats(0, 2), st.booleans()), max_size=40),
    st.floats(0.01, 1),
    st.floats(1, 10),
    st.integers(1, 5),
)
def test_the_budget_is_exceeded_only_by_what_calls_cost_more_than_was_set_aside(
    calls: list[tuple[float, bool]], estimate: float, budget: float, at_once: int
) -> None:
    spending, open_calls, excess = Spending(budget, estimate), list[tuple[float, float | None]](), 0.0
    for cost, is_known in calls:
        if (set_aside := spending.begin(NOON)) is not None:
            open_calls.append((set_aside, cost if is_known else None))
        if len(open_calls) >= at_once:
            set_aside, ended = open_calls.pop(0)
            excess += max(0.0, (ended or 0.0) - set_aside)
            spending.end(set_aside, ended, NOON)
    assert spending.today(NOON) <= budget + excess + 1e-9
