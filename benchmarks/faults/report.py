"""The fault matrix as a table."""

from collections.abc import Sequence

from benchmarks.faults.scenario import FaultResult
from testbed.terminal import markdown_table

COLUMNS = ("fault", "accepted", "answered", "lost", "duplicates", "recovery s", "held", "what else was seen")


def cells(result: FaultResult) -> tuple[str, ...]:
    """The cells of a row. A fault that could not be caused has no figures."""
    held = {True: "yes", False: "NO", None: "not run"}[result.held]
    if result.held is None:
        return result.fault, "", "", "", "", "", held, result.note
    recovery = "" if result.recovery_s is None else f"{result.recovery_s:.1f}"
    counts = (str(n) for n in (result.accepted, result.answered, result.lost, result.duplicates))
    slopes = ", ".join(f"{name} {slope:+.2f}" for name, slope in result.memory_slope.items())
    memory = f"; memory, MiB per 10 min: {slopes}" if slopes else ""
    return result.fault, *counts, recovery, held, result.note + memory


def markdown(results: Sequence[FaultResult]) -> str:
    return markdown_table([COLUMNS, *(cells(result) for result in results)])
