"""The table "Rights" of docs/protocol.md is what `aiflow broker config` grants; other tests show that it is enough."""

import re
from pathlib import Path

import pytest
from paho.mqtt.client import topic_matches_sub

from firmware_tools.site_broker import Board, Site

PAGE = Path(__file__).parents[1] / "docs" / "protocol.md"
SITE = Site("home", [Board("porch", ["front"])], ["attic"], ["anna"], takes_pictures=True, home_assistants=["hass"])
IDS = {"<site>": "home", "<board>": "porch", "<server>": "attic", "<pool>": "servers", "<prefix>": "homeassistant"}
ACCOUNTS = {"board": "porch", "server": "attic", "person": "anna", "Home Assistant": "hass"}


def listed() -> dict[str, tuple[list[str], list[str]]]:
    """Who writes and reads what, as the page says."""
    table = PAGE.read_text().split("<!-- rights -->")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    found = {who: (_topics(writes), _topics(reads)) for who, writes, reads in rows}
    for who, *cells in rows:
        for kind, cell in enumerate(cells):
            if "a person's" in cell:
                found[who][kind].extend(found["person"][kind])
    return found


def _topics(cell: str) -> list[str]:
    for name, value in IDS.items():
        cell = cell.replace(name, value)
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("who", ACCOUNTS)
def test_the_command_grants_what_the_page_lists(who: str) -> None:
    writes, reads = listed()[who]
    granted = SITE.rights()[ACCOUNTS[who]]
    for patterns, names in ((writes, granted.writes), (reads, granted.subscribes)):
        for name in names:
            assert any(topic_matches_sub(pattern, name) for pattern in patterns), name
        for pattern in patterns:
            assert any(topic_matches_sub(pattern, name) for name in names), pattern


def test_the_page_lists_all_kinds_of_accounts() -> None:
    assert set(listed()) == set(ACCOUNTS)
