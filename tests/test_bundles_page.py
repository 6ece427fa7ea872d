"""The tests that docs/bundles.md names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_each_attack_of_the_page_has_its_tests():
    page = (ROOT / "docs" / "bundles.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests/edge_runtime/firmware").glob("test_*.py"))
    rows = re.findall(r"^\| (?!attack|---)(.*?) \| .* \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > 10
    named = re.findall(r"`(test_\w+)`(?!\.py)", " ".join(where for _, where in rows))
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []
