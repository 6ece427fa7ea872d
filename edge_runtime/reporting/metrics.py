"""Counters over HTTP for Prometheus: read when somebody asks.

A scrape never disturbs the frame path, whoever sends it: connections are few and short, and a port that cannot be had
is tried again in the background. On loopback unless configured otherwise, since counters tell when somebody is at home.
"""

import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from edge_runtime.config import MetricsConfig
from edge_runtime.reporting.counters import Meaning, Value, Values, kinds

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 8  # one thread each; one more ends the oldest
MAX_CONNECTION_S = 10.0  # a scrape takes milliseconds; a client that sends a byte now and then would hold a thread
CHECK_S = 0.25  # between two looks at the age of connections, and whether to stop
FIRST_TRY_S = 1.0  # that a start waits for the port
MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0  # before the next try to bind, doubled each time


class _Reader(Collector):
    """Reads the numbers at each scrape. A counter never falls, whatever is read: Prometheus takes a fall for a restart
    and would count everything again.
    """

    def __init__(self, prefix: str, meanings: Mapping[str, Meaning], read: Callable[[], Values]) -> None:
        self._prefix, self._meanings, self._read = prefix, meanings, read
        self._highest: dict[tuple[str, ...], float] = {}
        self._fell: set[tuple[str, ...]] = set()
        self._lock = threading.Lock()  # two scrapes at once: what was read first must not be told last

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            families = [self._family(name, value) for name, value in self._read().items()]
        yield from families

    def _family(self, name: str, value: Value) -> Metric:
        meaning, numbers = self._meanings[name], dict(kinds(value))
        if meaning.is_summary:
            count, total = int(numbers["count",]), numbers["sum",]
            return SummaryMetricFamily(f"aiflow_{self._prefix}_{name}", meaning.text, count, total)
        family = GaugeMetricFamily if meaning.is_gauge else CounterMetricFamily
        metric = family(f"aiflow_{self._prefix}_{name}", meaning.text, labels=meaning.labels)
        for labels, number in numbers.items():
            metric.add_metric(labels, number if meaning.is_gauge else self._counted((name, *labels), number))
        return metric

    def _counted(self, name: tuple[str, ...], number: float) -> float:
        """name: with its labels."""
        highest = self._highest.get(name, 0.0)
        if number < highest and name not in self._fell:  # a bug of the component that counts
            self._fell.add(name)
            logger.error("counter fell name=%s label=%s from=%g to=%g", name[0], ",".join(name[1:]), highest, number)
        self._highest[name] = max(highest, number)
        return self._highest[name]


class _Handler(WSGIRequestHandler):
    timeout = MAX_CONNECTION_S  # of each read and write

    def log_message(self, *_: Any) -> None:
        """Nothing: a scrape every few seconds would fill the log."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """An HTTP server with bounds on the number and the age of its connections."""

    daemon_threads = True  # none is waited for at the end
    timeout = CHECK_S

    def __init__(self, host: str, port: int) -> None:
        """Raises OSError if the address cannot be had."""
        self._open: dict[Any, float] = {}  # connection -> since when, the oldest first
        self.address_family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        super().__init__(address[:2], _Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's would ask the DNS for our name, which may take long
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        for oldest in list(self._open)[: len(self._open) - MAX_CONNECTIONS + 1]:
            self._end(oldest)
        self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:  # on the connection's thread
        self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or was sent away: nothing to report."""
        logger.debug("metrics connection failed", exc_info=True)

    def end_connections(self, min_age_s: float) -> None:
        for request, since in list(self._open.items()):
            if time.monotonic() - since >= min_age_s:
                self._end(request)

    def _end(self, request: Any) -> None:
        """Its thread reads the end of the connection, and ends."""
        self._open.pop(request, None)
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)


class _Exporter(threading.Thread):
    """Binds, as often as it takes, and serves."""

    def __init__(self, config: MetricsConfig, app: Any, on_trouble: Callable[[str], None]) -> None:
        super().__init__(name="metrics", daemon=True)
        self._config, self._app, self._on_trouble = config, app, on_trouble
        self.ended, self.tried = threading.Event(), threading.Event()
        self.port: int | None = None

    def run(self) -> None:
        pause = MIN_PAUSE_S
        while (server := self._bind()) is None:
            if self.ended.wait(pause):
                return
            pause = min(2 * pause, MAX_PAUSE_S)
        with server:
            while not self.ended.is_set():
                server.handle_request()
                server.end_connections(MAX_CONNECTION_S)
            server.end_connections(0.0)

    def _bind(self) -> _Server | None:
        """None: the port is taken, or the interface is not up yet. Both pass by themselves."""
        place = f"{self._config.host}:{self._config.port}"
        try:
            server = _Server(self._config.host, self._config.port)
        except OSError as error:
            if not self.tried.is_set():  # once; the status shows it as long as it lasts
                logger.warning("metrics not available yet address=%s reason=%s", place, error.strerror)
            self._on_trouble(f"{place}: {error.strerror}")
            self.tried.set()
            return None
        server.set_app(self._app)
        self.port = server.server_port
        logger.info("metrics at http://%s:%d/metrics", self._config.host, self.port)
        self._on_trouble("")
        self.tried.set()
        return server


@contextmanager
def exported(
    config: MetricsConfig | None,
    prefix: str,
    meanings: Mapping[str, Meaning],
    read: Callable[[], Values],
    on_trouble: Callable[[str], None] = lambda _: None,
) -> Iterator[int | None]:
    """Serves what `read` returns at every request, as aiflow_<prefix>_<name>; gives the port.

    None: no configuration, or the address cannot be had yet; then it is tried again with growing pauses. `on_trouble`
    gets the reason, and "" when the address could be had. `on_trouble` and `read` are called on threads of their own.
    """
    if config is None:
        yield None
        return
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Reader(prefix, meanings, read))
    exporter = _Exporter(config, make_wsgi_app(registry), on_trouble)
    exporter.start()
    exporter.tried.wait(FIRST_TRY_S)
    try:
        yield exporter.port
    finally:
        exporter.ended.set()
        exporter.join(2 * FIRST_TRY_S)  # a name that does not resolve may hold it for longer: it is left behind
