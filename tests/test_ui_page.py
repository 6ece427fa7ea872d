"""docs/ui.md names the options and bounds of `aiflow ui`."""

import re
from argparse import ArgumentParser
from pathlib import Path

from firmware_tools.broker_arguments import add_broker_arguments
from firmware_tools.ui import history, live, rows, site, web
from firmware_tools.ui.command import add_arguments

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "ui.md").read_text()


def table(name: str) -> list[list[str]]:
    lines = PAGE.split(f"<!-- {name} -->")[1].strip().split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def options(add: object) -> dict[str, object]:
    parser = ArgumentParser(add_help=False)
    add(parser)
    return {action.option_strings[0]: action.default for action in parser._actions}


def test_its_options_and_their_defaults_are_those_of_the_command():
    brokers = options(add_broker_arguments)
    own = {name: value for name, value in options(add_arguments).items() if name not in brokers}
    named = {name: meaning for names, meaning in table("options") for name in re.findall("`(--[a-z-]+)`", names)}
    assert named.keys() == own.keys()
    assert all(str(value) in named[name] for name, value in own.items() if value is not None)


def test_its_bounds_are_those_of_the_code():
    assert {what: bound for what, bound, _ in table("bounds")} == {
        "boards": f"{site.MAX_BOARDS}",
        "cameras of a board": f"{site.MAX_CAMERAS}",
        "servers": f"{site.MAX_SERVERS}",
        "pictures": f"{site.MAX_PICTURES >> 20} MiB together",
        "a text on the page": f"{rows.MAX_TEXT} characters",
        "browsers at once": f"{live.MAX_BROWSERS}",
        "connections": f"{web.MAX_CONNECTIONS}",
    }
    words = " ".join(PAGE.split())
    assert f"`--keep-days` ({history.KEEP_DAYS}) days, in at most {history.MAX_BYTES >> 20} MiB" in words
    assert f"read for {web.TIMEOUT_S:.0f} s" in words
    assert f"a vector of {history.VECTOR} numbers" in words
    assert f"The newest {history.MAX_VECTORS:,} texts have one. The best {history.FOUND} are shown" in words
    assert f"is {history.MIN_SIMILARITY} or more" in words


def test_its_links_are_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)", PAGE) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]
