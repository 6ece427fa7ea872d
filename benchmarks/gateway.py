"""A server's throughput: requests per second and reply times, one board alone against many boards.

Broker, server process and the boards' MQTT clients are real. A board has one open request and sends the next one when
the reply arrives. So more boards mean larger batches, and the queue is never longer than the number of boards.
"""

import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.rate import RatedSymbols
from edge_runtime.mqtt import Message, MqttClient, MqttConfig
from edge_runtime.pipeline import NO_PIXELS, build_request
from edge_runtime.planning import Plan
from edge_runtime.wire import RequestIds, decode_reply, encode_request, topics
from testbed.broker import start_embedded
from testbed.processes import AiflowProcess, wait_serving

SITE, SERVER = "bench", "bench-server"
DRAIN_S = 10.0  # for the requests that are open when the time is up

Drafts = Sequence[Sequence[int]]


class BoardClient:
    """A board's MQTT client. It sends one request after the other while `is_asking` is true."""

    def __init__(self, port: int, name: str, bundle: Bundle, frames: Iterator[tuple[NDArray[np.int8], Sequence[int]]]):
        self.reply_ms: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.is_asking = False
        self._bundle, self._frames, self._ids = bundle, frames, RequestIds()
        self._plan, self._topic = Plan("speculative", "benchmark", 60_000), topics.request(SITE, name)
        self._asked_at, self._asked = 0.0, b""  # no open request
        self.mqtt = MqttClient(
            MqttConfig(port=port).settings(name),
            subscriptions=[(topics.reply(SITE, name), 1)],
            on_message=self._replied,
        )

    @property
    def is_waiting(self) -> bool:
        return bool(self._asked)

    def ask(self) -> None:
        symbols, draft = next(self._frames)
        features = RatedSymbols(symbols, self._bundle.manifest.latent.default_level, self._bundle.tables.groups)
        self._asked = self._ids.next(int(time.time() * 1e3), secrets.randbits(16))
        request = build_request(self._bundle, self._asked, self._plan, NO_PIXELS, features, tuple(draft))
        self._asked_at = time.perf_counter()
        self.mqtt.publish(self._topic, encode_request(request))

    def _replied(self, message: Message) -> None:
        reply = decode_reply(message.payload)
        if reply.id != self._asked:
            return
        self._asked = b""
        self.reply_ms.append(1e3 * (time.perf_counter() - self._asked_at))
        self.statuses[reply.status.name.lower()] += 1
        if self.is_asking:
            self.ask()


def run(
    bundle: Bundle,
    symbols: NDArray[np.int8],
    drafts: Drafts,
    tier: str = "edge",
    boards: int = 16,
    seconds: float = 10.0,
    threads: int = 1,
) -> dict[str, Any]:
    """Measures a bundle's tier on symbols int8 [N, 64, 7, 7] with a draft each: one board, many, and their ratio."""
    frames = cycle(list(zip(symbols, drafts, strict=True)))
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="aiflow-bench-")))
        port = running.enter_context(start_embedded())
        server = {"id": SERVER, "site": SITE, "bundle": str(bundle.path), "tier": tier, "threads": threads}
        process = running.enter_context(AiflowProcess("serve", {"server": server, "mqtt": {"port": port}}, folder))
        clients = [BoardClient(port, f"board-{number}", bundle, frames) for number in range(boards)]
        for client in clients:
            running.enter_context(client.mqtt).wait_online(60.0)
        wait_serving(process, port, SITE, SERVER)
        alone = _measure(clients[:1], process, seconds)
        together = _measure(clients, process, seconds)
    return {
        "tier": tier,
        "threads": threads,
        "alone": alone,
        f"{boards} boards": together,
        "together_to_alone": round(together["per_second"] / alone["per_second"], 3) if alone["per_second"] else 0.0,
    }


def _measure(clients: Sequence[BoardClient], server: AiflowProcess, seconds: float) -> dict[str, Any]:
    """Lets boards ask for this time, and returns the figures of the replies in it."""
    started = time.monotonic()
    for client in clients:
        client.reply_ms.clear()
        client.statuses.clear()
        client.is_asking = True
        client.ask()
    while time.monotonic() < started + seconds:
        server.has_ended()
        time.sleep(0.1)
    replies = [ms for client in clients for ms in client.reply_ms]
    elapsed = time.monotonic() - started
    for client in clients:
        client.is_asking = False
    while any(client.is_waiting for client in clients) and time.monotonic() < started + seconds + DRAIN_S:
        time.sleep(0.05)
    return {
        "per_second": round(len(replies) / elapsed, 2),
        "reply_ms_p50": round(float(np.percentile(replies or [0.0], 50)), 1),
        "reply_ms_p95": round(float(np.percentile(replies or [0.0], 95)), 1),
        "statuses": dict(sum((client.statuses for client in clients), Counter())),
        "unanswered": sum(client.is_waiting for client in clients),
    }
