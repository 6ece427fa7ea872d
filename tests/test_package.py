"""What a wheel holds, asked of the build itself without building one."""

import json
from pathlib import Path

from setuptools import Distribution

ROOT = Path(__file__).parents[1]


def packed(folder: Path) -> set[Path]:
    """The files that are no Python, relative to the repository."""
    distribution = Distribution()
    distribution.parse_config_files([str(folder / "pyproject.toml"), str(folder / "setup.cfg")])
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    return {Path(source, name) for _, source, _, names in build.data_files for name in names}


def test_a_wheel_holds_the_shipped_bundle_whole(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = packed(ROOT)
    bundles = [path.parent.relative_to(ROOT) for path in ROOT.glob("models/zoo/*/manifest.json")]
    assert bundles
    for bundle in bundles:
        named = json.loads((ROOT / bundle / "manifest.json").read_text())["files"]
        assert {bundle / "manifest.json", *(bundle / name for name in named)} <= files
    assert Path("edge_runtime", "py.typed") in files


def test_a_wheel_holds_the_templates_of_the_units(monkeypatch):
    monkeypatch.chdir(ROOT)
    units = {path.relative_to(ROOT) for path in ROOT.glob("firmware_tools/units/*")}
    assert len(units) == 2
    assert units <= packed(ROOT)


def test_a_wheel_holds_the_live_page(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = {path.relative_to(ROOT) for path in ROOT.glob("firmware_tools/ui/page/*")}
    assert {path.name for path in page} >= {"index.html", "page.css", "page.js"}
    assert page <= packed(ROOT)
