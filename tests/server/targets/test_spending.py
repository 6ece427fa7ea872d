"""The budget of a day: what is set aside, what is spent, and what is left after a restart."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from server.targets.spending import DAY_S, Spending, next_day

NOON = 20_000.5 * DAY_S


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


def test_what_was_spent_today_outlives_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "spent.json"
    spending = Spending(budget=1.0, estimate=0.5, file=file)
    spending.end(spending.begin(NOON), 0.75, NOON)
    again = Spending(budget=1.0, estimate=0.5, file=file)
    assert (again.today(NOON), again.is_spent(NOON)) == (0.75, True)
    assert again.today(NOON + DAY_S) == 0.0


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
    [b"", b"{}", b"[]", b'{"day": 1, "spent": NaN}', b'{"day": 1, "spent": -1}', b'{"day": 1e99, "spent": 0}', b"\xff"],
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
