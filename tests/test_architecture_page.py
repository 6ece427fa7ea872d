"""The imports that docs/ARCHITECTURE.md names for the server are those it has."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()


def test_the_server_imports_what_the_page_says_and_no_more():
    row = next(line for line in PAGE.splitlines() if line.startswith("| `server/`"))
    said, folder = set(), ""
    for name in re.findall(r"`([a-z_.]+)`", row.split("|")[3]):
        folder = folder if name.startswith(".") else name.split(".")[0]
        said.add(f"{folder}{name}" if name.startswith(".") else name)
    taken = set()
    for path in (ROOT / "server").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("edge_runtime", "models"):
                taken.add(".".join((node.module or "").split(".")[:2]))
    assert taken - {"edge_runtime"} == said  # of the package itself, the version
