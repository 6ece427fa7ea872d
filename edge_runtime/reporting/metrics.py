"""The counters of a board or a server for Prometheus: read when somebody asks, kept nowhere twice.

Every name has a meaning in one table, and one that has none is an error of the test suite. On loopback unless
configured otherwise: counters tell when somebody is at home.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_runtime.config import MetricsConfig
from edge_runtime.errors import ConfigError

logger = logging.getLogger(__name__)

Values = Mapping[str, float | Mapping[str, float]]  # a mapping inside becomes one series a key


class Meaning(NamedTuple):
    """What a number means, for people."""

    text: str
    label: str = ""  # of a number that comes in kinds
    is_gauge: bool = False  # may fall


BOARD = {
    "accepted": Meaning("Requests that the board took on: accepted + found = answered + lost + open + kept"),
    "found": Meaning("Requests that an earlier run left in the outbox"),
    "answered": Meaning("Requests that a server answered"),
    "lost": Meaning("Requests that ended without an answer, each reported in an event"),
    "open": Meaning("Requests that wait for an answer", is_gauge=True),
    "kept": Meaning("Requests in the outbox, to be asked again", is_gauge=True),
    "replayed": Meaning("Requests asked again out of the outbox"),
    "resent": Meaning("Requests sent once more, with the same id, since no reply came"),
    "busy": Meaning("Replies that asked to come back later"),
    "duplicate": Meaning("Replies to what was answered already"),
    "late": Meaning("Replies to what was lost or kept already"),
    "unknown": Meaning("Replies to nothing that the board remembers"),
    "reply": Meaning(
        "Replies, by what they said; overflow: no room to read them, overtaken: ended before the draft was told, "
        "not_final_again: nothing new, over_budget: requests not sent again for want of bytes",
        "status",
    ),
    "frames_failed": Meaning("Frames that head or coder could not handle"),
    "frames": Meaning("Frames read from cameras, files and MQTT"),
    "still": Meaning("Frames held back by the motion gate"),
    "lightning": Meaning("Frames held back because the whole picture changed at once"),
    "skipped": Meaning("Frames replaced by a newer one before anybody looked at them, or too early"),
    "unreadable": Meaning("Pictures that could not be decoded"),
    "reopened": Meaning("Cameras opened again after a stall, an end or an error"),
    "switch": Meaning(
        "Messages to run-time switches: set, refused, unknown (no such switch), retained (ignored)", "what"
    ),
    "ignored": Meaning(
        "What was told and not used: status_refused (a server's status that is none), status_contradicted (far from "
        "what was measured), hops_refused (a server that worked longer than the board waited), passes_refused (more "
        "passes than its text has tokens), servers_forgotten, bad_value, overflow",
        "what",
    ),
    "mqtt": Meaning("Messages to and from the servers' broker, by what became of them", "what", is_gauge=True),
    "local": Meaning("The same of the near broker, where there is one", "what", is_gauge=True),
}


def by_kind(meanings: Mapping[str, Meaning], flat: Mapping[str, float]) -> dict[str, float | dict[str, float]]:
    """Counters named <name>_<kind> under their names, where the meaning has a label."""
    values: dict[str, float | dict[str, float]] = {}
    for name, value in flat.items():
        kinds = next(
            (known for known, meaning in meanings.items() if meaning.label and name.startswith(f"{known}_")), None
        )
        if kinds is None:
            values[name] = value
        else:
            values[kinds] = {**values.get(kinds, {}), name.removeprefix(f"{kinds}_"): value}  # type: ignore[dict-item]
    return values


class _Read(Collector):
    def __init__(self, prefix: str, meanings: Mapping[str, Meaning], read: Callable[[], Values]) -> None:
        self._prefix, self._meanings, self._read = prefix, meanings, read

    def collect(self) -> Iterator[Metric]:
        for name, value in self._read().items():
            meaning = self._meanings[name]
            family = GaugeMetricFamily if meaning.is_gauge else CounterMetricFamily
            labels = [meaning.label] if meaning.label else []
            metric = family(f"aiflow_{self._prefix}_{name}", meaning.text, labels=labels)
            kinds = value.items() if isinstance(value, Mapping) else [("", value)]
            for kind, number in kinds:
                metric.add_metric([kind] * len(labels), number)
            yield metric


@contextmanager
def exported(
    config: MetricsConfig | None, prefix: str, meanings: Mapping[str, Meaning], read: Callable[[], Values]
) -> Iterator[int | None]:
    """Serves what `read` returns, at every request, as aiflow_<prefix>_<name>; gives the port, None without a config.

    `read` is called on threads of its own, one a connection. Raises ConfigError where the address cannot be had.
    """
    if config is None:
        yield None
        return
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Read(prefix, meanings, read))
    try:
        server, thread = start_http_server(config.port, config.host, registry)
    except OSError as error:
        raise ConfigError(
            f"metrics: {config.host}:{config.port}: {error.strerror}: choose another port, or 0 for any"
        ) from error
    port = server.server_port
    logger.info("metrics at http://%s:%d/metrics", config.host, port)
    try:
        yield port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
