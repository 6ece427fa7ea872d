"""What a wheel holds, asked of the build itself without building one."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.tags import parse_tag, sys_tags
from setuptools import Distribution

from edge_runtime.firmware.signature import SIGNATURE, new_key, verified
from models.language_model import SHIPPED

ROOT = Path(__file__).parents[1]


MODELS = ROOT / "models" / "zoo"  # the distribution of the server's part


def packed(folder: Path, monkeypatch: pytest.MonkeyPatch, root: Path = ROOT) -> set[Path]:
    """The files that are no Python in the wheel of this folder, relative to the repository."""
    monkeypatch.chdir(folder)
    distribution = Distribution()
    found = [str(path) for name in ("pyproject.toml", "setup.cfg") if (path := folder / name).is_file()]
    distribution.parse_config_files(found)
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    return {(folder / source / name).relative_to(root) for _, source, _, names in build.data_files for name in names}


def test_the_two_wheels_together_hold_the_shipped_bundle_and_a_board_installs_no_weights_of_pytorch(monkeypatch):
    board, server = packed(ROOT, monkeypatch), packed(MODELS, monkeypatch)
    bundles = [path.parent.relative_to(ROOT) for path in ROOT.glob("models/zoo/*/manifest.json")]
    assert bundles
    whole = {SHIPPED.relative_to(ROOT)}  # what the language model has learnt
    for bundle in bundles:
        named = json.loads((ROOT / bundle / "manifest.json").read_text())["files"]
        whole |= {bundle / "manifest.json", *(bundle / name for name in named)}
    assert board | server >= whole >= server
    assert server == {file for file in whole if file.suffix == ".safetensors"}
    assert not board & server
    assert Path("edge_runtime", "py.typed") in board


def test_the_shipped_bundle_is_signed_into_a_boards_wheel_if_there_is_a_key(tmp_path, monkeypatch):
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "models", tmp_path / "models")
    shutil.copytree(ROOT / "edge_runtime", tmp_path / "edge_runtime")
    private, public = new_key()
    (tmp_path / "key").write_bytes(private)
    (tmp_path / "bin").mkdir()
    kept = tmp_path / SIGNATURE
    scripts = {
        "aiflow": f'PYTHONPATH={ROOT} exec {sys.executable} -m firmware_tools "$@"',
        "python": f"cp models/zoo/*/{SIGNATURE} {kept} || true",  # builds nothing, which would need a network
    }
    for name, script in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "models/zoo/left_by_an_earlier_build.egg-info").mkdir()
    bundle = next(tmp_path.glob("models/zoo/*/manifest.json")).parent
    (bundle / SIGNATURE).write_bytes(b"of an earlier build that was interrupted")

    make = ["make", "--old-file=venv", "BIN=bin", "wheels"]
    subprocess.run(make, cwd=tmp_path, check=True)
    assert not kept.exists()
    subprocess.run([*make, "KEY=key", "BUNDLE_VERSION=7"], cwd=tmp_path, check=True)
    statement = verified(kept.read_bytes(), (base64.b64decode(public),))
    assert (statement.name, statement.version) == (bundle.name, 7)
    assert not (bundle / SIGNATURE).exists()  # a later build would pack it
    shutil.move(kept, bundle)
    signature = bundle.relative_to(tmp_path) / SIGNATURE
    assert signature in packed(tmp_path, monkeypatch, tmp_path)
    assert signature not in packed(tmp_path / "models" / "zoo", monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("version", "heading", "is_released"),
    [("0.2.0.dev0", "0.2.0.dev0", False), ("0.2.0", "0.2.0 (unreleased)", False), ("0.2.0", "0.2.0", True)],
)
def test_only_a_final_version_with_its_heading_in_the_changelog_is_released(tmp_path, version, heading, is_released):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "edge_runtime").mkdir()
    (tmp_path / "edge_runtime" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n\n## 0.1.0\n")
    done = [f"--old-file={name}" for name in ("venv", "lint", "test", "wheels")]
    command = ["make", "--dry-run", *done, "release"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.index("CHANGELOG.md") < result.stdout.index("git tag")
    result = subprocess.run(["make", "release-version"], cwd=tmp_path, capture_output=True, check=False)
    assert (result.returncode == 0) is is_released


def test_the_extra_of_a_server_wants_the_models_of_this_checkout():
    version = re.search('(?m)^version = "(.*)"$', (MODELS / "pyproject.toml").read_text())
    assert version
    assert f"aiflow-edge-server-models=={version[1]}\n" in (ROOT / "setup.cfg").read_text()


def test_a_wheel_holds_the_templates_of_the_units(monkeypatch):
    units = {path.relative_to(ROOT) for path in ROOT.glob("firmware_tools/units/*")}
    assert len(units) == 2
    assert units <= packed(ROOT, monkeypatch)


def test_a_wheel_holds_the_live_page(monkeypatch):
    page = {path.relative_to(ROOT) for path in ROOT.glob("firmware_tools/ui/page/*")}
    assert {path.name for path in page} >= {"index.html", "page.css", "page.js"}
    assert page <= packed(ROOT, monkeypatch)


def test_a_released_wheel_fits_64_bit_linux_with_glibc_only():
    dry = ["make", "--dry-run", "--old-file=venv", "BIN=bin", "wheels"]
    recipe = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    systems = re.search(r"AIFLOW_WHEEL_SYSTEMS=(\S+)", recipe)
    assert systems
    code = (
        "import runpy, sys; from setuptools import Distribution; sys.argv[1:] = ['--name']; "
        "wheel = runpy.run_path('setup.py')['Wheel'](Distribution()); wheel.ensure_finalized(); "
        "print('-'.join(wheel.get_tag()))"
    )
    environment = {**os.environ, "AIFLOW_WHEEL_SYSTEMS": systems[1]}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    tags = parse_tag(done.stdout.splitlines()[-1])
    assert tags & set(sys_tags())  # this machine's
    assert {tag.platform for tag in tags} == {"manylinux_2_28_x86_64", "manylinux_2_28_aarch64"}


def test_a_checkout_is_not_installed_on_a_32_bit_python():
    code = "import runpy, sys; sys.maxsize = 2**31 - 1; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("aiflow-edge: this Python has 32 bits")
