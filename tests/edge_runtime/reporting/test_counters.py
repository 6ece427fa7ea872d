"""Every number of a board has a meaning, is documented, and is shown at the end if it is not zero."""

import sys
import threading
from pathlib import Path

import pytest

from edge_runtime.app import Board
from edge_runtime.config import BoardConfig, CameraConfig, KeptFramesConfig, RuntimeConfig
from edge_runtime.config.frigate import FrigateConfig
from edge_runtime.mqtt import MqttConfig
from edge_runtime.reporting import BOARD, not_zero
from server.counters import SERVER

NOT_EVERYWHERE = {"temperature_celsius", "throttled"}  # not every machine reports them


@pytest.fixture
def board(board_bundle, tmp_path):
    camera, frigate = CameraConfig("door", "frigate"), FrigateConfig(url="http://127.0.0.1:1")
    config = RuntimeConfig(
        BoardConfig("b1", str(board_bundle.path)),
        (camera,),
        local=MqttConfig(port=1),
        kept_frames=KeptFramesConfig(str(tmp_path)),
        frigate=frigate,
    )
    board = Board(config)
    yield board
    for client in (board.servers, board.local):
        client.close()


def test_every_number_of_a_board_has_a_meaning_and_kinds_where_it_has_a_label(board):
    summary = board.numbers()
    assert summary.keys() | NOT_EVERYWHERE == BOARD.keys()
    assert {name for name, value in summary.items() if isinstance(value, dict)} == {
        name for name, meaning in BOARD.items() if meaning.label or meaning.is_summary
    }


def test_a_summary_may_be_read_while_new_kinds_are_counted(board):
    """A new kind of reply changes the size of what is read."""
    stop, interval = threading.Event(), sys.getswitchinterval()

    def count() -> None:
        while not stop.is_set():
            board.tracker._thread.replies.clear()
            for number in range(5000):
                board.tracker._thread.replies[f"kind-{number}"] += 1

    writer = threading.Thread(target=count)
    sys.setswitchinterval(1e-6)
    writer.start()
    try:
        for _ in range(100):
            board.summary()
    finally:
        stop.set()
        writer.join()
        sys.setswitchinterval(interval)


def test_what_is_not_zero_is_shown():
    counts = {"lost": 0, "accepted": 12, "reply": {"ok": 11, "busy": 0}, "mqtt": {"local": {"sent": 9, "dropped": 0}}}
    assert not_zero(counts) == "accepted=12 reply{ok}=11 mqtt{local,sent}=9"


@pytest.mark.parametrize("meanings", [BOARD, SERVER], ids=["board", "server"])
def test_no_two_numbers_have_the_same_name_in_prometheus(meanings):
    suffixes = {name: ("_sum", "_count") if each.is_summary else (each.suffix,) for name, each in meanings.items()}
    names = [name + suffix for name, ends in suffixes.items() for suffix in ends]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("prefix", "meanings"), [("board", BOARD), ("server", SERVER)])
def test_every_counter_is_documented(prefix, meanings):
    page = (Path(__file__).parents[3] / "docs/RELIABILITY.md").read_text()
    for name, meaning in meanings.items():
        assert f"| `aiflow_{prefix}_{name}{meaning.suffix}` | {meaning.label} | {meaning.text} |" in page
