"""Counters over HTTP, read with what Prometheus itself uses."""

import logging
import queue
import socket
import threading
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge_runtime.config import MetricsConfig
from edge_runtime.reporting import Meaning
from edge_runtime.reporting.metrics import MAX_CONNECTIONS, exported
from tests.listener import PATIENCE_S, until

MEANINGS = {
    "lost": Meaning("Lost."),
    "wait": Meaning("Waits.", is_summary=True),
    "open": Meaning("Open.", is_gauge=True),
    "reply": Meaning("By status.", "status"),
    "mqtt": Meaning("By broker and kind.", "broker, what"),
}


def scrape(port: int | None) -> dict[tuple[str, str], float]:
    """Value by name and label."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {(s.name, "".join(s.labels.values())): s.value for family in families for s in family.samples}


def test_a_number_is_read_when_it_is_asked_for():
    numbers = {"lost": 1, "open": 2, "reply": {"ok": 3, "busy": 4}, "wait": {"count": 2, "sum": 0.5}}
    with exported(MetricsConfig(port=0), "board", MEANINGS, lambda: numbers) as port:
        assert scrape(port) == {
            ("aiflow_board_lost_total", ""): 1,
            ("aiflow_board_open", ""): 2,
            ("aiflow_board_wait_count", ""): 2,
            ("aiflow_board_wait_sum", ""): 0.5,
            ("aiflow_board_reply_total", "ok"): 3,
            ("aiflow_board_reply_total", "busy"): 4,
        }
        numbers["lost"] = 5
        assert scrape(port)["aiflow_board_lost_total", ""] == 5


@pytest.mark.parametrize(
    "label", ['a"} 1\nup{x="', "<b>\\n\r\u202e{{ 1 }}", "x" * 10_000_000], ids=["quotes", "escapes", "10 MB"]
)
def test_a_hostile_label_is_one_value_and_makes_no_other_metric(label):
    with exported(MetricsConfig(port=0), "board", MEANINGS, lambda: {"reply": {label: 3}, "lost": 1}) as port:
        assert scrape(port) == {("aiflow_board_reply_total", label): 3, ("aiflow_board_lost_total", ""): 1}


def test_kinds_of_kinds_have_two_labels():
    numbers = {"mqtt": {"servers": {"sent": 3}, "local": {"sent": 4, "dropped": 0}}}
    with (
        exported(MetricsConfig(port=0), "board", MEANINGS, lambda: numbers) as port,
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response,
    ):
        (family,) = text_string_to_metric_families(response.read().decode())
    labels = [(sample.labels["broker"], sample.labels["what"], sample.value) for sample in family.samples]
    assert labels == [("servers", "sent", 3), ("local", "sent", 4), ("local", "dropped", 0)]


def test_a_counter_never_falls_and_a_gauge_may(caplog):
    numbers = {"lost": -60, "open": 9, "reply": {"ok": 3}}
    with exported(MetricsConfig(port=0), "board", MEANINGS, lambda: numbers) as port:
        assert scrape(port)["aiflow_board_lost_total", ""] == 0
        numbers |= {"lost": 7}
        assert scrape(port)["aiflow_board_lost_total", ""] == 7
        numbers |= {"lost": 5, "open": 1, "reply": {"ok": 2}}
        for _ in range(2):
            read = scrape(port)
            assert (read["aiflow_board_lost_total", ""], read["aiflow_board_reply_total", "ok"]) == (7, 3)
            assert read["aiflow_board_open", ""] == 1
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert told == [
        "counter fell name=lost label= from=0 to=-60",
        "counter fell name=reply label=ok from=3 to=2",
    ]


def test_without_a_setting_nothing_listens():
    with exported(None, "board", MEANINGS, dict) as port:
        assert port is None


def test_a_port_that_is_taken_is_reported_and_tried_again_until_it_is_free(caplog):
    troubles: queue.Queue[str] = queue.Queue()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        exporting = exported(MetricsConfig(port=port), "board", MEANINGS, lambda: {"open": 2}, troubles.put)
        with exporting as given:
            assert given is None
            assert troubles.get(timeout=PATIENCE_S) == f"127.0.0.1:{port}: Address already in use"
            other.close()
            while troubles.get(timeout=PATIENCE_S):
                pass
            assert scrape(port) == {("aiflow_board_open", ""): 2}
    assert caplog.text.count("metrics not available yet") == 1


def test_an_end_while_the_port_is_taken_is_an_end():
    with (
        exported(MetricsConfig(port=0), "board", MEANINGS, dict) as port,
        exported(MetricsConfig(port=port), "board", MEANINGS, dict),
    ):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "metrics"]


def test_a_connection_that_says_nothing_holds_up_neither_a_scrape_nor_the_end():
    with socket.socket() as idle:
        with exported(MetricsConfig(port=0), "board", MEANINGS, lambda: {"open": 2}) as port:
            idle.connect(("127.0.0.1", port))
            assert scrape(port) == {("aiflow_board_open", ""): 2}
        with pytest.raises(OSError, match="refused"):
            scrape(port)


def threads_of_connections() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "process_request_thread" in thread.name]


def test_connections_that_never_end_hold_a_bounded_number_of_threads_and_no_scrape():
    with exported(MetricsConfig(port=0), "board", MEANINGS, lambda: {"open": 2}) as port:
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(5 * MAX_CONNECTIONS)]
        for connection in slow:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
        for _ in range(3):
            assert scrape(port) == {("aiflow_board_open", ""): 2}
        until(lambda: len(threads_of_connections()) <= MAX_CONNECTIONS)
        for connection in slow:
            connection.close()


def test_a_client_that_sends_a_byte_now_and_then_is_sent_away(monkeypatch):
    monkeypatch.setattr("edge_runtime.reporting.metrics.MAX_CONNECTION_S", 0.5)
    with exported(MetricsConfig(port=0), "board", MEANINGS, lambda: {"open": 2}) as port:
        slow = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        slow.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
        slow.settimeout(0.05)

        def is_away() -> bool:
            try:
                slow.sendall(b"x")
                return slow.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        until(is_away)
        slow.close()
