"""The fault matrix counts from events alone, and its rows bring their faults about; all of them are a bench's job."""

import queue
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.faults import chosen, report
from benchmarks.faults.board_faults import damage
from benchmarks.faults.frame_records import FrameCounts, FrameRecords
from benchmarks.faults.load import slope_of
from benchmarks.faults.scenario import FaultResult
from edge_runtime.config import OutboxConfig
from edge_runtime.errors import AiflowError
from edge_runtime.requests.outbox import Outbox, Row
from edge_runtime.wire import Event


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
    with pytest.raises(AiflowError, match=r"no row broker-sigtem: want broker-sigterm, "):
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
    assert slope_of(range(100), flat) == (0.0, 0.0)
    slope, growth = slope_of(list(np.linspace(0, 202, 101)), list(np.linspace(100, 200, 101)))
    assert slope == pytest.approx(600 * 100 / 202)
    assert growth == pytest.approx(50)


@pytest.mark.parametrize("kind", ["header", "page", "truncated", "wal"])
def test_damage_is_damage_to_an_outbox(tmp_path: Path, kind: str) -> None:
    path, stored = tmp_path / "outbox.sqlite", queue.Queue[list[bytes]]()
    config = OutboxConfig(str(path), every_request=True)
    outbox = Outbox(config, on_found=print, on_stored=stored.put, on_read=print)
    outbox.start()
    for number in range(40):
        outbox.put(Row(number.to_bytes(8, "big"), 1e9, 1e9, bytes(600), bytes(600)))
        stored.get(timeout=20)
    copy = tmp_path / "killed" / path.name  # as a killed process leaves it, with its log
    copy.parent.mkdir()
    for file in tmp_path.glob(f"{path.name}*"):
        (copy.parent / file.name).write_bytes(file.read_bytes())
    outbox.close()
    damage(kind, copy)
    missing = queue.Queue[int]()
    config = OutboxConfig(str(copy))
    damaged = Outbox(config, on_found=lambda _, count: missing.put(count), on_stored=print, on_read=print)
    damaged.start()
    assert missing.get(timeout=20) > 0
    damaged.close()
