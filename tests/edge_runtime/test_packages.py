"""A missing package is named with a command that works here."""

import configparser
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from edge_runtime import packages
from edge_runtime.errors import ConfigError
from edge_runtime.packages import (
    OPTIONAL,
    MissingPackageError,
    how_to_install,
    how_to_install_program,
    package_error,
    refuse_32_bit,
)

ROOT = Path(__file__).parents[2]


def test_each_package_is_in_the_extra_that_is_said_to_bring_it():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {
        name: re.findall(r"(?m)^[\w.-]+(?:\[\w+\])?", text) for name, text in setup["options.extras_require"].items()
    }
    for distribution, extra in OPTIONAL.values():
        assert distribution in extras[extra], distribution


def test_a_package_that_needs_a_newer_python_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert str(MissingPackageError("transformers", (3, 10))).endswith(
        "is not installed: it needs Python 3.11 or newer, this is 3.10: install aiflow with a newer Python"
    )
    assert str(MissingPackageError("transformers", (3, 11))).endswith("pip install '.[hf]'")


def test_in_a_checkout_the_command_installs_its_extra(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert how_to_install("torch") == "pip install '.[pytorch]'"
    monkeypatch.chdir("/")
    assert how_to_install("torch") == f"pip install '{ROOT}[pytorch]'"


def test_the_program_itself_is_installed_from_the_checkout_or_from_the_wheels_file(monkeypatch, tmp_path):
    monkeypatch.chdir("/")
    assert how_to_install_program("board") == f"pip install '{ROOT}[board]'"
    monkeypatch.setattr(packages, "__file__", str(tmp_path / "edge_runtime" / "packages.py"))
    assert how_to_install_program("board") == 'pip install "$(echo aiflow_edge-*.whl)[board]"'


def test_from_a_wheel_the_command_names_the_package_itself(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "__file__", str(tmp_path / "edge_runtime" / "packages.py"))
    assert how_to_install("cv2") == "pip install opencv-python-headless"


@pytest.mark.parametrize(("module", "is_known"), [("torch.nn", True), ("edge_runtime.tyop", False), (None, False)])
def test_only_an_optional_package_is_missing_and_the_rest_is_a_bug(module, is_known):
    found = package_error(ModuleNotFoundError(name=module))
    assert isinstance(found, MissingPackageError) == is_known


def test_a_package_that_does_not_load_is_named_unless_another_start_may_load_it():
    """The code of numpy runs, and the file of a library does not load."""
    numpy = {"__name__": "numpy"}

    def found(why: str) -> ConfigError | None:
        with pytest.raises(ImportError) as raised:
            exec("raise ImportError(why)", numpy | {"why": why})
        return package_error(raised.value)

    assert f"numpy=={version('numpy')}" in str(found("libGL.so.1: cannot open shared object file"))
    assert found("_core.so: failed to map segment from shared object: Cannot allocate memory") is None


def test_a_32_bit_python_is_refused_by_name_and_a_64_bit_one_is_not():
    with pytest.raises(ConfigError, match=r"32 bits.*install a 64-bit system"):
        refuse_32_bit(2**31 - 1)
    refuse_32_bit(2**63 - 1)
