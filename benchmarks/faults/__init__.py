"""The fault matrix: real processes, one fault after the other, and the outcome of every request.

A scenario waits for answers, causes its fault, ends it, and waits until every accepted request has ended. It holds if
accepted = answered + lost, no frame has two final events, and the first answer comes within 60 s of the end of the
fault. All of this is counted from the events that a user of the board receives; the board's own counters are only
compared.

- `rows`: the table; `broker_faults`, `board_faults`, `load`: the faults
- `scenario`: what all faults share; `site`: brokers and servers; `frame_records`: the counting
- `fault_injection`: faults inside a process; `camera`: a network camera that can fail; `report`: the printed table
"""

import tempfile
import traceback
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.faults import report
from benchmarks.faults.rows import ROWS
from benchmarks.faults.scenario import Fault, FaultResult, Scenario
from benchmarks.faults.site import FaultSite
from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.picture_checks import decode_picture
from testbed.sample_photos import shrunk_jpeg

PHOTO_PIXELS = 320  # as a small camera sends; decoding large photos is not measured here


def chosen(names: Sequence[str]) -> list[Fault]:
    """The rows of these names, in the table's order; without names, the default ones. Raises AiflowError."""
    known = {fault.name: fault for fault in ROWS}
    if unknown := [name for name in names if name not in known]:
        raise AiflowError(f"there is no row {', '.join(unknown)}: want {', '.join(known)}")
    return [fault for fault in ROWS if fault.name in names or (fault.by_default and not names)]


def play(
    faults: Sequence[Fault],
    bundle: Bundle,
    photos: Sequence[bytes],
    seconds: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[FaultResult]:
    """Runs the scenarios. seconds: how long each fault lasts; None: its own duration.

    A scenario that cannot begin, for example because a server does not start, did not hold.
    """
    results: list[FaultResult] = []
    small = [shrunk_jpeg(decode_picture(photo), PHOTO_PIXELS, 85) for photo in photos]
    with tempfile.TemporaryDirectory(prefix="aiflow-faults-") as folder:
        # Scenarios that leave brokers and servers unharmed share them: loading a server takes as long as a scenario.
        for name, group in groupby(faults, lambda fault: "shared" if fault.shares_site else fault.name):
            (where := Path(folder) / name).mkdir(exist_ok=True)
            with FaultSite(where, bundle, small, say).run() as site:
                for fault in group:
                    results.append(result := result_of(Scenario(site, fault, seconds)))
                    say(f"{len(results)} of {len(faults)}: " + " | ".join(report.cells(result)))
    return results


def result_of(scenario: Scenario) -> FaultResult:
    """Runs one scenario. If it raises, only this scenario has failed."""
    try:
        return scenario.run()
    except Exception as error:  # the other scenarios still run
        scenario.site.say(traceback.format_exc())
        lines = str(error).splitlines() or [""]
        note = f"{type(error).__name__}: {lines[-1][:200]}"
        return FaultResult(scenario.fault.title, row=scenario.fault.name, held=False, note=note)
