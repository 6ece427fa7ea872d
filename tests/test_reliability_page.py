"""What docs/RELIABILITY.md says of the fault matrix is what the matrix does."""

import re
from pathlib import Path

from benchmarks.faults.broker_faults import EXPELLED_S
from benchmarks.faults.rows import ROWS

PAGE = (Path(__file__).parents[1] / "docs" / "RELIABILITY.md").read_text()


def test_it_says_how_long_each_fault_lasts():
    found = re.search(r"A fault lasts ([0-9]+) s; those of (.*?)\. It", " ".join(PAGE.split()))
    assert found
    said = {row.name: float(found[1]) for row in ROWS if row.by_default}
    for names, seconds in re.findall(r"((?:`[a-z0-9-]+`[,and\s]*)+)([0-9]+) s", found[2]):
        said |= dict.fromkeys(re.findall(r"`([a-z0-9-]+)`", names), float(seconds))
    lasts = {row.name: row.seconds for row in ROWS if row.by_default}
    lasts["server-hang"] = max(lasts["server-hang"], EXPELLED_S)
    assert said == lasts
