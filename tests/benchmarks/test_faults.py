"""The fault matrix counts from events alone, and its rows bring their faults about; all of them are a bench's job."""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.faults import RowError, chosen, report, result_of
from benchmarks.faults import scenario as scenario_module
from benchmarks.faults.board_faults import damage
from benchmarks.faults.frame_records import FrameCounts, FrameRecords
from benchmarks.faults.load import slope_of
from benchmarks.faults.scenario import Fault, FaultResult, Scenario
from benchmarks.faults.site import FaultSite
from edge_runtime.inference.bundle import Bundle
from edge_runtime.requests.store import Kept, Spool
from edge_runtime.wire import Event
from firmware_tools import cli


def told(*events: tuple[str, Any, bool]) -> FrameRecords:
    """frame, type, final; one a second."""
    records, when = FrameRecords(), datetime(2025, 1, 1, tzinfo=timezone.utc)
    for number, (frame, kind, final) in enumerate(events):
        records.add(Event(type=kind, frame=frame, camera="cam", captured=when, final=final), float(number))
    return records


def test_each_accepted_frame_is_answered_lost_or_unsettled() -> None:
    records = told(
        *[("a", "new", False), ("a", "update", True)],  # the usual
        *[("b", "new", False), ("b", "update", False), ("b", "lost", True)],  # kept, and given up
        *[("c", "new", False), ("c", "update", False)],  # still in the outbox
        ("d", "new", True),  # the draft stood: nothing was asked
        ("e", "update", True),  # the answer was faster than the first event
        ("f", "new", False),  # open
    )
    assert records.counts() == FrameCounts(accepted=5, answered=2, lost=1, duplicates=0, kept=1, unsettled=2)
    assert records.first_answer(2.0) == 8.0
    assert records.answers(0.0, 8.0) == 1


@pytest.mark.parametrize(
    "events",
    [
        [("a", "new", False), ("a", "update", True), ("a", "update", True)],
        [("a", "new", False), ("a", "lost", True), ("a", "update", True)],
        [("a", "new", False), ("a", "new", False), ("a", "update", True)],
        [("a", "update", True), ("a", "new", False)],
    ],
)
def test_a_second_first_event_and_anything_behind_a_final_one_are_duplicates(
    events: list[tuple[str, str, bool]],
) -> None:
    assert told(*events).counts().duplicates == 1


def test_an_id_that_two_boards_drew_is_two_frames() -> None:
    records, when = FrameRecords(), datetime(2025, 1, 1, tzinfo=timezone.utc)
    for board in ("b1", "b2"):
        for kind in ("new", "update"):
            records.add(Event(type=kind, frame="a", camera="cam", captured=when, final=kind == "update"), 0.0, board)
    assert records.counts() == FrameCounts(accepted=2, answered=2, lost=0, duplicates=0, kept=0, unsettled=0)


def test_losses_are_grouped_by_reason_without_their_numbers() -> None:
    records, when = FrameRecords(), datetime(2025, 1, 1, tzinfo=timezone.utc)
    for number in range(3):
        why = f"no reply to {number} sent"
        lost = Event(type="lost", frame=str(number), camera="cam", captured=when, final=True, why=why)
        records.add(lost, 0.0)
    assert records.reasons == {"no reply to N sent": 3}


def test_an_unknown_row_is_named_beside_those_that_there_are() -> None:
    with pytest.raises(RowError, match=r"no row broker-sigtem: want broker-sigterm, "):
        chosen(["broker-sigtem"])


def test_all_rows_but_the_soak_run_by_default() -> None:
    assert "soak" not in [row.name for row in chosen([])]
    assert [row.name for row in chosen(["soak"])] == ["soak"]


def test_a_fault_that_was_not_brought_about_has_no_figures_and_did_not_hold() -> None:
    text = report.markdown(
        [FaultResult("disk full", note="wants root"), FaultResult("link cut", 5, 4, 1, 0, 1.25, True)]
    )
    assert text.splitlines()[2:] == [
        "| disk full |  |  |  |  |  | not run | wants root |",
        "| link cut | 5 | 4 | 1 | 0 | 1.2 | yes |  |",
    ]


def test_a_leak_is_a_slope_and_one_large_sample_is_none() -> None:
    flat = [100.0] * 100
    flat[80] = 150.0
    assert slope_of(flat) == (0.0, 0.0)
    slope, growth = slope_of(list(np.linspace(100, 200, 101)))  # 1 MiB a second
    assert slope == pytest.approx(600)
    assert growth == pytest.approx(51)


@pytest.mark.parametrize("kind", ["header", "page", "truncated", "wal"])
def test_damage_is_damage_to_a_spool(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "outbox.sqlite"
    spool = Spool(path, 1 << 20, 3600.0, now=0.0, wall=1e9)
    for number in range(40):
        spool.keep(Kept(number.to_bytes(8, "big"), 1e9, 1e9, bytes(600), bytes(600)), float(number))
        spool.commit(float(number))
    copy = tmp_path / "killed" / path.name  # as a killed process leaves it, with its log
    copy.parent.mkdir()
    for file in tmp_path.glob(f"{path.name}*"):
        (copy.parent / file.name).write_bytes(file.read_bytes())
    spool.close(40.0)
    damage(kind, copy)
    damaged = Spool(copy, 1 << 20, 3600.0, now=100.0, wall=1e9 + 100)
    for request_id in list(damaged.ids()):
        damaged.load(request_id)
    assert damaged.gaps > 0
    damaged.close(100.0)


def test_whatever_a_row_raises_is_its_own_failure_and_the_next_one_is_played(
    board_bundle: Bundle, tmp_path: Path
) -> None:
    def play(_: Scenario) -> None:
        raise KeyError("a bug")

    said: list[str] = []
    scenario = Scenario(FaultSite(tmp_path, board_bundle, [], said.append), Fault("odd", "odd", play), None)
    result = result_of(scenario)
    assert (result.held, result.row, result.note) == (False, "odd", "KeyError: 'a bug'")
    assert "Traceback" in said[0]


NEW, OK, LOST = ("new", False), ("update", True), ("lost", True)


@pytest.mark.parametrize(
    ("events", "asked", "says"),
    [
        ({"a": [NEW, OK], "b": [NEW, LOST]}, 2, ""),
        ({"a": [NEW, OK], "b": [NEW]}, 2, "not seen: an end of every accepted request"),
        ({"a": [NEW, OK], "b": [NEW, OK, OK]}, 2, "not seen: one end per frame"),
        ({"a": [NEW, OK]}, 2, "not seen: events of all requests that were counted, 2"),  # `b` vanished without a word
        ({"a": [NEW, LOST]}, 1, "not seen: an answer within"),
    ],
)
def test_a_row_does_not_hold_where_an_event_is_missing_or_one_too_many(
    events: dict[str, list[tuple[Any, bool]]],
    asked: int,
    says: str,
    board_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is started: the row itself says what was heard."""
    monkeypatch.setattr(scenario_module, "RECOVERY_S", 0.0)
    monkeypatch.setattr(scenario_module, "SETTLE_S", 0.0)

    def play(scenario: Scenario) -> None:
        scenario.asked, when = asked, datetime(2025, 1, 1, tzinfo=timezone.utc)
        for frame, told in events.items():
            for kind, final in told:
                scenario.records.add(Event(type=kind, frame=frame, camera="c", captured=when, final=final), 1.0)

    result = Scenario(FaultSite(tmp_path, board_bundle, [], print), Fault("none", "none", play), None).run()
    assert (result.held, result.note[: len(says)]) == (not says, says)


@pytest.mark.timeout(400)  # processes that load torch, on a machine that may be busy
def test_a_forgetful_broker_and_a_dead_network_thread_cost_nothing(
    board_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "faults.json"
    rows = ["broker-empty", "loop-thread"]
    arguments = ["--row", *rows, "--seconds", "1", "--bundle", str(board_bundle.path), "--json", str(path)]
    code = cli.main(["bench", "faults", *arguments, "--markdown", str(tmp_path / "faults.md")])
    results: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    assert [result["row"] for result in results] == rows
    for result in results:
        assert result["held"], result
        assert result["accepted"] == result["answered"] + result["lost"] > 0
    assert code == 0
    assert len((tmp_path / "faults.md").read_text().splitlines()) == 4
    assert capsys.readouterr().out == (tmp_path / "faults.md").read_text()
