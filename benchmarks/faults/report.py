"""The fault matrix as a table for a terminal and for docs/."""

from collections.abc import Sequence

from rich.table import Table

from benchmarks.faults.stage import Result
from testbed.terminal import markdown_table

COLUMNS = ("fault", "accepted", "answered", "lost", "duplicates", "recovery s", "held", "what else was seen")


def cells(result: Result) -> tuple[str, ...]:
    """A row's words; a fault that was not brought about has no figures."""
    held = {True: "yes", False: "NO", None: "not run"}[result.held]
    if result.held is None:
        return result.fault, "", "", "", "", "", held, result.note
    recovery = "" if result.recovery_s is None else f"{result.recovery_s:.1f}"
    counts = (str(n) for n in (result.accepted, result.answered, result.lost, result.duplicates))
    slopes = ", ".join(f"{name} {slope:+.2f}" for name, slope in result.rss_slope.items())
    memory = f"; memory, MiB per 10 min: {slopes}" if slopes else ""
    return result.fault, *counts, recovery, held, result.note + memory


def table(results: Sequence[Result]) -> Table:
    shown = Table(*COLUMNS)
    for result in results:
        shown.add_row(*cells(result))
    return shown


def markdown(results: Sequence[Result]) -> str:
    """The table for a page."""
    return markdown_table([COLUMNS, *(cells(result) for result in results)])
