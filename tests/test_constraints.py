"""constraints.txt: what `make venv` installs with Python 3.11 is what setup.cfg asks for."""

import configparser
import re
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PINNED = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def wanted(extra: str) -> set[Requirement]:
    """The requirements of an extra and of the extras that it names, as far as they hold for Python 3.11."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options.extras_require"][extra] + config["options"]["install_requires"]
    found = {Requirement(line) for line in lines.splitlines() if line and not line.startswith("#")}
    inner = {name for requirement in found if requirement.name == "aiflow-edge" for name in requirement.extras}
    found = {r for r in found if not r.marker or r.marker.evaluate({"python_version": "3.11"})}
    return {r for r in found if r.name != "aiflow-edge"}.union(*map(wanted, inner))


def test_each_requirement_is_pinned_to_a_version_that_setup_cfg_allows():
    for requirement in wanted("test"):
        if requirement.name != "torch":  # its builds differ by machine: the Makefile pins it
            assert PINNED[requirement.name] in requirement.specifier, requirement


def test_each_pin_has_hashes_and_no_address_is_named():
    text = (ROOT / "constraints.txt").read_text()
    blocks = re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(PINNED)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)
    assert "://" not in text
