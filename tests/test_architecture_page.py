"""The imports that docs/ARCHITECTURE.md allows the server are those that the tests allow it."""

import re
from pathlib import Path

from tests.test_imports import MAY_IMPORT

PAGE = (Path(__file__).parents[1] / "docs" / "ARCHITECTURE.md").read_text()


def test_the_page_lists_what_the_server_may_import() -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith("| `server/`"))
    listed, folder = set(), ""
    for name in re.findall(r"`([a-z_.]+)`", row.split("|")[3]):
        folder = folder if name.startswith(".") else name.split(".")[0]
        listed.add(f"{folder}{name}" if name.startswith(".") else name)
    assert listed == MAY_IMPORT["server"] - {"edge_runtime.__version__"}
