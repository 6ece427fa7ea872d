"""What a server gives to many boards: requests a second and reply times, one board alone against many at once.

Broker, server process and the boards' MQTT clients are real. A board has one question open and asks the next when the
reply is there, so more boards mean larger batches, never a longer queue than there are boards.
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

from edge_runtime.config import MqttConfig
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt.client import Message, MqttClient
from edge_runtime.pipeline import build_request
from edge_runtime.planning import Plan
from edge_runtime.wire import RequestIds, decode_reply, encode_request, topics
from testbed.broker import start_embedded
from testbed.processes import Child, wait_serving

SITE, SERVER = "bench", "bench-server"
DRAIN_S = 10.0  # for the questions that are open when the time is up
NO_PIXELS = np.empty((0, 0, 3), np.uint8)  # latents travel, not pictures

Drafts = Sequence[Sequence[int]]


class Board:
    """Asks, one question after the other, from when it is told to start until it is told to stop."""

    def __init__(self, port: int, name: str, bundle: Bundle, frames: Iterator[tuple[NDArray[np.int8], Sequence[int]]]):
        self.reply_ms: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.is_asking = False
        self._bundle, self._frames, self._ids = bundle, frames, RequestIds()
        self._plan, self._topic = Plan("speculative", "benchmark", 60_000), topics.request(SITE, name)
        self._asked_at, self._asked = 0.0, b""  # nothing is open
        self.client = MqttClient(
            MqttConfig(port=port).settings(name),
            subscriptions=[(topics.reply(SITE, name), 1)],
            on_message=self._replied,
        )

    @property
    def is_waiting(self) -> bool:
        return bool(self._asked)

    def ask(self) -> None:
        symbols, draft = next(self._frames)
        self._asked = self._ids.next(int(time.time() * 1e3), secrets.randbits(16))
        request = build_request(self._bundle, self._asked, self._plan, NO_PIXELS, symbols, tuple(draft))
        self._asked_at = time.perf_counter()
        self.client.publish(self._topic, encode_request(request))

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
    """A bundle's tier on symbols int8 [N, 64, 7, 7] with a draft each: one board, many, and their ratio."""
    frames = cycle(list(zip(symbols, drafts, strict=True)))
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="aiflow-bench-")))
        port = running.enter_context(start_embedded())
        server = {"id": SERVER, "site": SITE, "bundle": str(bundle.path), "tier": tier, "threads": threads}
        child = running.enter_context(Child("serve", {"server": server, "mqtt": {"port": port}}, folder))
        askers = [Board(port, f"board-{number}", bundle, frames) for number in range(boards)]
        for asker in askers:
            running.enter_context(asker.client).wait_online(60.0)
        wait_serving(child, port, SITE, SERVER)
        alone = _measure(askers[:1], child, seconds)
        together = _measure(askers, child, seconds)
    return {
        "tier": tier,
        "threads": threads,
        "alone": alone,
        f"{boards} boards": together,
        "together_to_alone": round(together["per_second"] / alone["per_second"], 3) if alone["per_second"] else 0.0,
    }


def _measure(askers: Sequence[Board], server: Child, seconds: float) -> dict[str, Any]:
    """Lets boards ask for so long; the replies of that time."""
    started = time.monotonic()
    for asker in askers:
        asker.reply_ms.clear()
        asker.statuses.clear()
        asker.is_asking = True
        asker.ask()
    while time.monotonic() < started + seconds:
        server.has_ended()
        time.sleep(0.1)
    replies = [ms for asker in askers for ms in asker.reply_ms]
    elapsed = time.monotonic() - started
    for asker in askers:
        asker.is_asking = False
    while any(asker.is_waiting for asker in askers) and time.monotonic() < started + seconds + DRAIN_S:
        time.sleep(0.05)
    return {
        "per_second": round(len(replies) / elapsed, 2),
        "reply_ms_p50": round(float(np.percentile(replies or [0.0], 50)), 1),
        "reply_ms_p95": round(float(np.percentile(replies or [0.0], 95)), 1),
        "statuses": dict(sum((asker.statuses for asker in askers), Counter())),
        "unanswered": sum(asker.is_waiting for asker in askers),
    }
