"""docs/targets.md: its files work as they stand, and its words and figures are those of the code."""

import re
from pathlib import Path
from typing import get_args

import msgspec

from benchmarks.unreliable_target import FAULTS
from edge_runtime.config import convert
from edge_runtime.http_call import MAX_RESPONSE
from server.config import USUAL_INPUT_TOKENS, Config
from server.targets.paid_calls import TRIES
from server.targets.target import Verified
from tests.pages import says

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "targets.md").read_text()
DECISION = (ROOT / "docs" / "adr" / "0019-lossless-for-whom.md").read_text()


def test_its_server_works_as_it_stands() -> None:
    server, *_ = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    config = convert(Path("server.toml"), msgspec.toml.decode(server), Config)
    config.check_target()
    assert config.server.bundle is None


def test_its_server_with_a_tail_works_as_it_stands() -> None:
    blocks = [block for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL) if "\n[vllm]\n" in block]
    (config,) = (convert(Path("server.toml"), msgspec.toml.decode(block), Config) for block in blocks)
    config.check_target()
    assert (config.tail, config.server.target) == ("llava-tail", "vllm:http://127.0.0.1:8000/v1")


def test_its_addresses_are_targets() -> None:
    addresses = re.findall(r"`((?:openai|vllm):http[^`]*)`", PAGE)
    assert len(addresses) == 3
    for address in addresses:
        tables = {"server": {"id": "s1", "target": address}, "openai": {"model": "m"}}
        convert(Path("server.toml"), tables, Config).check_target()


def test_its_words_and_figures_are_those_of_the_code() -> None:
    for word in get_args(Verified):
        assert f"| `{word}` |" in DECISION
    assert says(PAGE, len(FAULTS), "ways")
    assert says(PAGE, USUAL_INPUT_TOKENS, "tokens")
    assert (TRIES, says(PAGE, "tried", "four", "times")) == (4, True)
    assert says(PAGE, f"{MAX_RESPONSE >> 20} MiB")
