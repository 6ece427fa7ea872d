"""What docs/information-bottleneck.md tells users to run can be run, and its numbers are those of the code."""

import re
import shlex
from pathlib import Path

import pytest

from firmware_tools import cli
from models.coded_pictures import SIZES, picture_codecs
from models.recipe.stage3_bottleneck import COMPLETE, GAINS, Settings
from tests.pages import says

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "information-bottleneck.md").read_text()


def test_its_command_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = re.search(r"^    aiflow (bench rate (?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
    assert command
    args = cli.parser_with({"bench"}).parse_args(shlex.split(command[1]))
    assert (args.part, args.split, args.codec_tail) == ("rate", "dev", Path("codec-tail.safetensors"))


def test_its_numbers_are_those_of_the_recipe_and_of_the_codecs() -> None:
    assert f"{Settings().bytes:.0f}" in PAGE
    assert says(PAGE, f"{GAINS[1] / GAINS[0]:.2f}", "gain")
    assert (len(GAINS), says(PAGE, "eight", "rates")) == (8, True)
    assert (1 - COMPLETE, says(PAGE, "quarter", "channels")) == (0.25, True)
    assert says(PAGE, "five sizes", "five qualities")
    assert {len(SIZES), *(len(codec.qualities) for codec in picture_codecs().values())} == {5}
