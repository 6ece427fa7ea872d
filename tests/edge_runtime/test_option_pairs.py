"""Every pair of options works together, or is refused by name: no board breaks on what its configuration allows."""

import threading
from itertools import combinations, product
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_runtime.app import run_board
from edge_runtime.config import RuntimeConfig, load_toml
from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import Event
from tests.brokers import Mosquitto

# Each option with values that change what a board builds; the first one leaves it out.
OPTIONS = {
    "board paradigm": ("", *(f'paradigm = "{name}"' for name in ("auto", "device", "split", "speculative", "offload"))),
    "board tier": ("", 'tier = "cloud"'),
    "camera paradigm": ("", 'paradigm = "device"', 'paradigm = "offload"'),
    "camera tier": ("", 'tier = "edge"'),
    "camera motion": ("", "[cameras.motion]\nenabled = true"),
    "reuse": ("", "reuse_distance = 0.1"),
    "local": ("", "[local]\nport = {port}", '[local]\nhost = "localhost"\nport = {port}'),
    "budget": ("", "bytes_per_minute = 1", "bytes_per_minute = 100000"),
    "may_offload": ("", "may_offload = false"),
    "floor": ("", "quality_floor = 0", "quality_floor = 1"),
    "outbox": ("", '[outbox]\nfile = "{folder}/outbox.sqlite"', '[outbox]\nfile = "{folder}/o"\nevery_request = true'),
    "metrics": ("", "[metrics]\nport = 0"),
}
# Refused together; an empty text stands for every value but the default.
REFUSED = (
    {"board paradigm": 'paradigm = "offload"', "outbox": ""},
    {"board paradigm": 'paradigm = "offload"', "may_offload": ""},
    {"camera paradigm": 'paradigm = "offload"', "may_offload": ""},
    {"board paradigm": 'paradigm = "offload"', "reuse": ""},
    {"board paradigm": 'paradigm = "offload"', "camera paradigm": 'paradigm = "device"'},
)
Pair = tuple[tuple[str, str], tuple[str, str]]
Row = dict[str, str]  # a value for each option


def pairs_of(row: Row) -> set[Pair]:
    return set(combinations(row.items(), 2))


def is_refused(row: Row) -> bool:
    return any(all(row.get(name) and value in row[name] for name, value in pair.items()) for pair in REFUSED)


def covering_rows() -> list[Row]:
    """Rows that have every pair of values in one of them, but for what is refused; greedy, always the same."""
    left = {
        pair
        for first, second in combinations(OPTIONS, 2)
        for pair in product(product([first], OPTIONS[first]), product([second], OPTIONS[second]))
        if not is_refused(dict(pair))
    }
    rows: list[Row] = []
    while left:
        row = dict(min(left))
        for name, values in OPTIONS.items():
            if name not in row:
                fits = [value for value in values if not is_refused(row | {name: value})]
                row[name] = max(fits, key=lambda value: len(pairs_of(in_order(row | {name: value})) & left))
        row = in_order(row)
        left -= pairs_of(row)
        rows.append(row)
    return rows


def in_order(row: Row) -> Row:
    return {name: row[name] for name in OPTIONS if name in row}


def board_toml(row: Row, bundle: Bundle, picture: Path, port: int, folder: Path) -> Path:
    text = "\n".join(
        (
            f'[board]\nid = "b1"\nbundle = "{bundle.path}"\nbackend = "onnx"\ndeadline_ms = 50',
            *(row.get(f"board {name}", "") for name in ("paradigm", "tier")),
            f'[[cameras]]\nname = "Front_Door"\nsource = "{picture}"',
            row.get("reuse", ""),
            *(row.get(f"camera {name}", "") for name in ("paradigm", "tier", "motion")),
            f"[mqtt]\nport = {port}\n[policy]",
            *(row.get(name, "") for name in ("budget", "may_offload", "floor", "local", "outbox", "metrics")),
        )
    )
    path = folder / "board.toml"
    path.write_text(text.format(port=port, folder=folder))
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "0.jpg"
    pixels = np.random.default_rng(1).integers(0, 256, (6, 8, 3), np.uint8).repeat(40, 0).repeat(40, 1)
    path.write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())
    return path


@pytest.mark.parametrize("row", covering_rows(), ids=lambda row: ", ".join(filter(None, row.values())) or "defaults")
def test_options_that_may_be_together_bring_a_frame_to_its_end(
    row: Row, board_bundle: Bundle, picture: Path, broker: Mosquitto, tmp_path: Path
) -> None:
    config = load_toml(board_toml(row, board_bundle, picture, broker.port, tmp_path), RuntimeConfig)
    events: list[Event] = []
    summary = run_board(config, threading.Event(), events.append)
    assert (summary["frames"], summary["frames_failed"]) == (1, 0)
    assert summary["accepted"] == summary["answered"] + summary["lost"] + summary["open"] + summary["kept"]
    if not row["camera motion"]:  # a single frame has none
        assert sum(event.final for event in events) + summary["kept"] == 1


@pytest.mark.parametrize("pair", REFUSED, ids=" with ".join)
def test_options_that_cannot_be_together_are_refused_by_name(
    pair: Row, board_bundle: Bundle, picture: Path, tmp_path: Path
) -> None:
    first, second = pair
    for one, other in product(OPTIONS[first][1:], OPTIONS[second][1:]):
        row = {first: one, second: other}
        path = board_toml(row, board_bundle, picture, 1883, tmp_path)
        if is_refused(row):
            with pytest.raises(ConfigError, match="offload"):
                load_toml(path, RuntimeConfig)
        else:
            load_toml(path, RuntimeConfig)
