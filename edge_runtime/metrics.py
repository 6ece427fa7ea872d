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

from edge_runtime.config import ConfigError, MetricsConfig

logger = logging.getLogger(__name__)

Values = Mapping[str, float | Mapping[str, float]]  # a mapping inside becomes one series a key


class Meaning(NamedTuple):
    """What a number means, for people."""

    text: str
    label: str = ""  # of a number that comes in kinds
    is_gauge: bool = False  # may fall


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

    `read` is called on a thread of its own. Raises ConfigError where the address cannot be had.
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
    port: int = server.server_address[1]
    logger.info("metrics at http://%s:%d/metrics", config.host, port)
    try:
        yield port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
