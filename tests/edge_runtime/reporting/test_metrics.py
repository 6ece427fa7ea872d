"""Counters over HTTP, read by what Prometheus itself reads with."""

import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge_runtime.app import Board
from edge_runtime.config import BoardConfig, CameraConfig, ConfigError, MetricsConfig, MqttConfig, RuntimeConfig
from edge_runtime.reporting.metrics import BOARD, Meaning, by_kind, exported
from server.counters import SERVER, values

MEANINGS = {"lost": Meaning("Lost."), "open": Meaning("Open.", is_gauge=True), "reply": Meaning("By status.", "status")}


def scrape(port: int) -> dict[tuple[str, str], float]:
    """Value by name and label."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {(s.name, "".join(s.labels.values())): s.value for family in families for s in family.samples}


def test_a_number_is_read_when_it_is_asked_for():
    numbers = {"lost": 1, "open": 2, "reply": {"ok": 3, "busy": 4}}
    with exported(MetricsConfig(port=0), "board", MEANINGS, lambda: numbers) as port:
        assert scrape(port) == {
            ("aiflow_board_lost_total", ""): 1,
            ("aiflow_board_open", ""): 2,
            ("aiflow_board_reply_total", "ok"): 3,
            ("aiflow_board_reply_total", "busy"): 4,
        }
        numbers["lost"] = 5
        assert scrape(port)["aiflow_board_lost_total", ""] == 5


def test_without_a_setting_nothing_listens():
    with exported(None, "board", MEANINGS, dict) as port:
        assert port is None


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # the library's socket that was not bound
def test_a_port_that_is_taken_is_a_configuration_error():
    with exported(MetricsConfig(port=0), "board", MEANINGS, dict) as port:
        second = exported(MetricsConfig(port=port), "board", MEANINGS, dict)
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: .*: choose another port"), second:
            pass


def test_a_connection_that_says_nothing_holds_up_neither_a_scrape_nor_the_end():
    with socket.socket() as idle:
        with exported(MetricsConfig(port=0), "board", MEANINGS, lambda: {"open": 2}) as port:
            idle.connect(("127.0.0.1", port))
            assert scrape(port) == {("aiflow_board_open", ""): 2}
        with pytest.raises(OSError, match="refused"):
            scrape(port)


def test_every_counter_of_a_board_has_a_meaning(board_bundle):
    camera, near = CameraConfig("door", "mqtt"), MqttConfig(port=1)
    board = Board(RuntimeConfig(BoardConfig("b1", str(board_bundle.path)), cameras=(camera,), local=near))
    board.answers.counts["ok"] += 1
    with exported(MetricsConfig(port=0), "board", BOARD, lambda: by_kind(BOARD, board.summary())) as port:
        assert scrape(port)["aiflow_board_reply_total", "ok"] == 1
        assert by_kind(BOARD, board.summary()).keys() == BOARD.keys()
    for client in (board.servers, board.local):
        client.close()


def test_a_servers_counters_come_by_what_happened():
    counts = {"received": 9, "replies": {"ok": 4, "busy": 1}, "escalated": {"tier": 2}, "alone": {"offline": 1}}
    read = values({"counts": counts | {"answered_above": 1}, "queue": {"waiting": 3}, "asked_above": 1})
    assert read["replies"] == {"ok": 4, "busy": 1}
    assert (read["escalated"], read["alone"], read["loop"]) == ({"tier": 2}, {"offline": 1}, 0)
    assert (read["waiting"], read["asked_above"], read["answered_above"]) == (3, 1, 1)
    assert read.keys() <= SERVER.keys()


def test_what_a_tier_above_says_unasked_is_counted():
    above = {"requests": {"accepted": 4, "unknown": 2, "open": 1}, "replies": {"ok": 3, "unreadable": 1}}
    read = values({"counts": {}, "queue": {"waiting": 0}, "asked_above": 1, "upstream": above})
    assert read["upstream"] == {"accepted": 4, "unknown": 2, "reply_ok": 3, "reply_unreadable": 1}


@pytest.mark.parametrize(("prefix", "meanings"), [("board", BOARD), ("server", SERVER)])
def test_every_counter_is_documented(prefix, meanings):
    page = (Path(__file__).parents[3] / "docs/RELIABILITY.md").read_text()
    for name, meaning in meanings.items():
        total = "" if meaning.is_gauge else "_total"
        assert f"| `aiflow_{prefix}_{name}{total}` | {meaning.label} | {meaning.text} |" in page
