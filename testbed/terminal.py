"""Output: tables and progress bars on a terminal, plain lines elsewhere."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track as rich_track
from rich.table import Table
from rich.text import Text

T = TypeVar("T")


def markdown_table(rows: Iterable[Sequence[str]]) -> str:
    """A table in GitHub's Markdown; the first row is the header."""
    header, *others = rows
    lines = [header, ("---",) * len(header), *others]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def is_terminal() -> bool:
    return Console().is_terminal


def print_table(markdown: str) -> None:
    """Prints a table in Markdown, drawn if the output is a terminal."""
    if (console := Console()).is_terminal:
        console.print(Markdown(markdown))
    else:
        print(markdown, end="")


def print_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Draws a table on a terminal. Unlike in Markdown, no character of a cell has a meaning."""
    table = Table(*header)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def print_figures(figures: dict[str, Any]) -> None:
    """Prints names and values: a table on a terminal, else one per line. A nested name follows its parent's."""
    rows = [(name, short(value)) for name, value in _flat(figures)]
    if Console().is_terminal:
        print_table(markdown_table([("figure", "value"), *rows]))
    else:
        print("\n".join(f"{name} {value}" for name, value in rows))


def _flat(figures: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name} ")
        else:
            yield f"{before}{name}", value


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Shows progress while iterating; silent if the output is not a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    yield from rich_track(items, description, total=total, console=console)


def short(value: Any) -> str:
    """A value for people: "-" if there is none, four digits of a fraction."""
    if isinstance(value, float):
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return "-" if value is None else str(value)
