"""Prometheus reads a board and a server; the rules and the dashboard of examples/ use metrics that they have."""

import json
import re
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import cv2
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge_runtime.app import run_board
from edge_runtime.config import BoardConfig, CameraConfig, KeptFramesConfig, MetricsConfig, RuntimeConfig
from edge_runtime.config.frigate import FrigateConfig
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import MqttConfig
from edge_runtime.reporting import BOARD
from edge_runtime.wire import Event
from server.app import run_server
from server.config import Config, OpenAIConfig, ServerConfig
from server.counters import SERVER
from testbed.broker import free_port
from testbed.chat_server import ChatServer
from testbed.processes import Process
from tests.brokers import Mosquitto
from tests.edge_runtime.reporting.test_counters import NOT_EVERYWHERE
from tests.listener import PATIENCE_S, until

EXAMPLES = Path(__file__).parents[1] / "examples" / "prometheus"
PAGE = (Path(__file__).parents[1] / "docs" / "monitoring.md").read_text()
ALERTS = (EXAMPLES / "alerts.yaml").read_text()
DASHBOARD = json.loads((EXAMPLES / "dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
METRIC = re.compile(r"\baiflow_(?:board|server)_\w+")
NEEDS_PROMETHEUS = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")),
    reason="Prometheus is not installed: apt install --no-install-recommends prometheus",
)


@dataclass
class Exposed:
    """Where a board and a server are read, and what was read after both have worked."""

    ports: dict[str, int]
    texts: dict[str, str]

    def names(self) -> set[str]:
        """Of all metrics, as queries call them, whether they have a value yet or not."""
        names = set()
        for text in self.texts.values():
            for family in text_string_to_metric_families(text):
                suffixes = {"counter": ("_total",), "summary": ("_count", "_sum")}.get(family.type, ("",))
                names |= {family.name + suffix for suffix in suffixes}
        return names


def read(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as response:
        return str(response.read().decode())


@pytest.fixture(scope="module")
def exposed(board_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exposed]:
    """A running board and a running server, whose target is another server with a budget."""
    folder, stop, answered = tmp_path_factory.mktemp("exposed"), threading.Event(), threading.Event()
    ports = {"board": free_port(), "server": free_port()}
    (folder / "photo.jpg").write_bytes(cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes())

    def listener(event: Event) -> None:
        if event.type == "update":
            answered.set()

    with Mosquitto(folder) as broker, ChatServer() as other:
        mqtt, near = MqttConfig(port=broker.port), MqttConfig(port=broker.port, username="b1")
        server = Config(
            ServerConfig("s1", target=f"openai:{other.url}"),
            mqtt,
            openai=OpenAIConfig("fake", input_price=1.0, budget_per_day=100.0),
            metrics=MetricsConfig(ports["server"]),
        )
        # One frame, and then the board rests: nothing is counted while its numbers are read.
        door = CameraConfig("door", str(folder / "photo.jpg"), interval_s=600, repeat=True)
        board = RuntimeConfig(
            BoardConfig("b1", str(board_bundle.path), paradigm="offload", deadline_ms=60_000),
            (door, CameraConfig("front", "frigate")),
            mqtt,
            near,
            metrics=MetricsConfig(ports["board"]),
            kept_frames=KeptFramesConfig(str(folder / "kept")),
            frigate=FrigateConfig(url="http://127.0.0.1:1"),
        )
        threads = [
            threading.Thread(target=run_server, args=(server, stop)),
            threading.Thread(target=run_board, args=(board, stop, listener)),
        ]
        for thread in threads:
            thread.start()
        try:
            assert answered.wait(PATIENCE_S)
            yield Exposed(ports, {name: read(port) for name, port in ports.items()})
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE_S)


def test_a_board_and_a_server_expose_every_number_that_has_a_meaning(exposed):
    for name, meanings in (("board", BOARD), ("server", SERVER)):
        families = {family.name for family in text_string_to_metric_families(exposed.texts[name])}
        missing = {f"aiflow_{name}_{number}" for number in meanings} - families
        assert missing <= {f"aiflow_board_{number}" for number in NOT_EVERYWHERE}


def test_what_was_answered_is_in_the_numbers(exposed):
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for text in exposed.texts.values()
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["aiflow_board_handled_total", "offload"] >= 1
    assert samples["aiflow_board_paradigm", "offload"] == 1
    assert samples["aiflow_board_request_bytes_total",] > samples["aiflow_board_jpeg_bytes_total",] > 0
    assert samples["aiflow_board_answer_seconds_count",] == samples["aiflow_board_answered_total",] >= 1
    assert samples["aiflow_board_answer_seconds_sum",] > 0
    assert samples["aiflow_board_cameras", "live"] == samples["aiflow_board_mqtt_connected", "servers"] == 1
    assert samples["aiflow_server_batch_seconds_count",] == samples["aiflow_server_batched_total",] >= 1
    assert samples["aiflow_server_target_cost_today",] > 0
    assert (samples["aiflow_server_target_budget_per_day",], samples["aiflow_server_queue_capacity",]) == (100, 64)
    assert samples["aiflow_server_accepting",] == 1


@pytest.mark.parametrize("query", [*QUERIES, *re.findall(r"expr: (?:>\n)?((?:.+\n)+?) +(?:for|labels):", ALERTS)])
def test_each_query_uses_metrics_that_exist(exposed, query):
    used = set(METRIC.findall(query))
    assert used or query.startswith("up{")
    assert used - exposed.names() - {f"aiflow_board_{name}" for name in NOT_EVERYWHERE} == set()


def test_a_metric_that_does_not_exist_would_be_seen(exposed):
    assert set(METRIC.findall("rate(aiflow_board_losts_total[5m])")) - exposed.names() == {"aiflow_board_losts_total"}


def test_the_dashboard_is_what_grafana_imports():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {panel["type"] for panel in panels} == {"row", "timeseries"}
    taken = [(p["gridPos"]["x"] + x, p["gridPos"]["y"] + y) for p in panels for x in range(p["gridPos"]["w"])
             for y in range(p["gridPos"]["h"])]  # fmt: skip
    assert len(set(taken)) == len(taken)
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) <= known


def test_the_page_has_each_alert_and_names_files_that_exist():
    alerts = set(re.findall(r"- alert: (\w+)", ALERTS))
    assert alerts == set(re.findall(r"^\| `(Aiflow\w+)` \|", PAGE, re.MULTILINE))
    assert set(METRIC.findall(PAGE)) <= set(METRIC.findall(ALERTS + json.dumps(DASHBOARD)))
    links = [link for link in re.findall(r"\]\(([^)#]+)", PAGE) if "://" not in link]
    assert links
    assert not [link for link in links if not (EXAMPLES.parents[1] / "docs" / link).exists()]


def promtool(*words: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *words], input=text, capture_output=True, text=True, check=False)


@NEEDS_PROMETHEUS
@pytest.mark.parametrize(
    "words",
    [
        ("check", "config", EXAMPLES / "prometheus.yaml"),
        ("check", "rules", EXAMPLES / "alerts.yaml"),
        ("test", "rules", Path(__file__).parent / "prometheus" / "alerts_test.yaml"),
    ],
    ids=lambda words: " ".join(map(str, words[:2])),
)
def test_promtool_accepts_the_examples(words):
    result = promtool(*words)
    assert result.returncode == 0, result.stdout + result.stderr


@NEEDS_PROMETHEUS
def test_the_names_follow_prometheus_conventions(exposed):
    for text in exposed.texts.values():
        result = promtool("check", "metrics", text=text)
        assert result.returncode == 0, result.stderr


@NEEDS_PROMETHEUS
def test_a_real_prometheus_reads_both_and_can_answer_every_query(exposed, tmp_path):
    config = (EXAMPLES / "prometheus.yaml").read_text().replace("15s", "1s")
    for name, place in (("board", "porch.lan:9464"), ("server", "attic.lan:9465")):
        assert place in config
        config = config.replace(place, f"127.0.0.1:{exposed.ports[name]}")
    (tmp_path / "prometheus.yaml").write_text(config)
    shutil.copy(EXAMPLES / "alerts.yaml", tmp_path)
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]

    def ask(path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"http://{address}/api/v1/{path}?{urlencode(query)}", timeout=PATIENCE_S) as answer:
            return json.load(answer)["data"]

    def both_are_read() -> bool:
        try:
            targets = ask("targets")["activeTargets"]
        except OSError:  # it starts
            return False
        return len(targets) == 2 and all(target["health"] == "up" for target in targets)

    with Process([*command, f"--web.listen-address={address}"], tmp_path / "prometheus.log", "prometheus"):
        until(both_are_read)
        until(lambda: all(rule["lastEvaluation"] > "1" for group in ask("rules")["groups"] for rule in group["rules"]))
        assert {rule["health"] for group in ask("rules")["groups"] for rule in group["rules"]} == {"ok"}
        assert ask("query", query="aiflow_board_accepted_total > 0")["result"][0]["metric"]["board"] == "porch"
        for query in QUERIES:
            full = query.replace("$__rate_interval", "1m").replace("$board", ".*").replace("$server", ".*")
            ask("query", query=full)  # raises for one that Prometheus does not understand
