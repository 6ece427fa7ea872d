"""Many boards and several servers: the answers of a site with 1, 2, 4 replicas, and the losses if one is killed.

Broker, servers and Ray's replicas are real processes. The boards are simulated: they share a few MQTT connections, and
their latents are prepared before, since one machine cannot run a thousand heads. Each sends a request at its interval.
What becomes of it, edge_runtime/requests/lifecycle.py decides, as for a real board.
"""

import heapq
import os
import queue
import random
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray

from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.rate import RatedSymbols
from edge_runtime.mqtt import Message, MqttClient, MqttConfig
from edge_runtime.packages import how_to_install
from edge_runtime.pipeline import NO_PIXELS, build_request
from edge_runtime.planning import Plan
from edge_runtime.requests.actions import Action, Answer, Lose, Send
from edge_runtime.requests.lifecycle import RequestLifecycle
from edge_runtime.wire import Request, RequestIds, aged, decode_reply, encode_request, topics
from testbed.broker import free_port, start_embedded
from testbed.processes import AiflowProcess, ProcessError, same_code, wait_serving

SITE = "bench"
CONNECTIONS = 20  # of all boards together
BUDGET_S = 20.0
RESEND_S = 3.0
NO_LIMIT = 1 << 30  # of open requests: the boards have none together
GREEDY = 20  # times as many requests come from the first board, to see whether the others still get their share
REPLICA = "ray::ServeReplica:aiflow-"

Frames = Iterator[tuple[NDArray[np.int8], Sequence[int]]]


class Asked(NamedTuple):
    """A request of a simulated board."""

    board: int
    request: Request
    at: float  # seconds, monotonic


class Boards:
    """Simulated boards. `with` connects them."""

    def __init__(self, port: int, bundle: Bundle, frames: Frames, count: int, interval_s: float) -> None:
        self._bundle, self._frames, self._interval_s, self._ids = bundle, frames, interval_s, RequestIds()
        self._plan = Plan("speculative", "benchmark", int(1e3 * BUDGET_S))
        self._names = [f"board-{number}" for number in range(count)]
        self._replies: queue.SimpleQueue[tuple[float, Message]] = queue.SimpleQueue()
        # One for all boards, which share a thread, too. So they also share what they learn of the time of a reply.
        self._lifecycle: RequestLifecycle[Asked] = RequestLifecycle(
            NO_LIMIT, min_resend_s=RESEND_S, rng=random.Random()
        )
        self._refused = 0
        self._reply_ms: list[list[float]] = [[] for _ in self._names]
        self._clients = [
            MqttClient(
                MqttConfig(port=port).settings(f"boards-{i}", queue_messages=8192),
                subscriptions=[(topics.reply(SITE, name), 1) for name in self._names[i::CONNECTIONS]],
                on_message=lambda message: self._replies.put((time.monotonic(), message)),
            )
            for i in range(min(CONNECTIONS, count))
        ]
        self._running = ExitStack()

    def __enter__(self) -> "Boards":
        with ExitStack() as started:
            for client in self._clients:
                started.enter_context(client).wait_online(60.0)
            self._running = started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def run(self, seconds: float) -> None:
        """Asks for this time, then waits for the replies that are still to come."""
        now = time.monotonic()
        end = now + seconds
        due = [(now + random.uniform(0, self._period(board)), board) for board in range(len(self._names))]
        heapq.heapify(due)
        while due or self._lifecycle.open_count:
            self._read_until(min(due[0][0] if due else inf, time.monotonic() + 0.1))
            now = time.monotonic()
            self._perform(self._lifecycle.on_time(now), now)
            while due and due[0][0] <= now:
                _, board = heapq.heappop(due)
                if now < end:
                    self._ask(board, now)
                    heapq.heappush(due, (now + self._period(board), board))

    def _period(self, board: int) -> float:
        return self._interval_s if board else self._interval_s / GREEDY

    def _ask(self, board: int, now: float) -> None:
        symbols, draft = next(self._frames)
        features = RatedSymbols(symbols, self._bundle.manifest.latent.default_level, self._bundle.tables.groups)
        request_id = self._ids.next(int(time.time() * 1e3), secrets.randbits(16))
        request = build_request(self._bundle, request_id, self._plan, NO_PIXELS, features, tuple(draft))
        self._perform(self._lifecycle.on_request(request_id, Asked(board, request, now), now + BUDGET_S, now), now)

    def _read_until(self, due: float) -> None:
        """Reads all replies that have arrived, even if it is late already, and those that arrive before `due`."""
        while True:
            try:
                at, message = self._replies.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                return
            self._perform(self._lifecycle.on_reply(decode_reply(message.payload), at), at)

    def _perform(self, actions: Sequence[Action[Asked]], now: float) -> None:
        for action in actions:
            match action:
                case Send(_, (board, request, _), waited_s, left_s):
                    payload = encode_request(aged(request, waited_s, left_s))
                    topic = topics.request(SITE, self._names[board])
                    self._clients[board % CONNECTIONS].publish(topic, payload, expiry_s=max(0.0, left_s))
                case Answer(_, (board, _, asked_at)):
                    self._reply_ms[board].append(1e3 * (now - asked_at))
                case Lose(_, _, why):
                    self._refused += why.code not in ("no_reply", "busy")

    @property
    def counts(self) -> dict[str, int]:
        counts = self._lifecycle.counts
        return {
            "asked": counts.accepted,
            "sent_again": counts.resent,
            "busy": counts.busy,
            "refused": self._refused,
            "second_reply": counts.duplicate + counts.late + counts.unknown,
            "lost": counts.lost - self._refused,
        }

    def figures(self, seconds: float) -> dict[str, Any]:
        greedy, *others = self._reply_ms
        together = [ms for replies in others for ms in replies] or [0.0]
        answered = sum(map(len, self._reply_ms))
        return {
            **self.counts,
            "answered": answered,
            "per_second": round(answered / seconds, 2),
            "reply_ms_p50": round(float(np.percentile(together, 50))),
            "reply_ms_p95": round(float(np.percentile(together, 95))),
            "greedy_board_p50": round(float(np.percentile(greedy or [0.0], 50))),
            "boards_without_answer": sum(not replies for replies in others),
        }


def run(
    bundle: Bundle,
    symbols: NDArray[np.int8],
    drafts: Sequence[Sequence[int]],
    tier: str,
    boards: int,
    interval_s: float,
    seconds: float,
    replicas: Sequence[int],
) -> dict[str, Any]:
    """The figures by number of replicas; 0: the server's own process, without Ray.

    From two replicas on, there are two servers, and halfway through a second run one replica and one server are killed.
    """
    frames = cycle(list(zip(symbols, drafts, strict=True)))
    result: dict[str, Any] = {"tier": tier, "boards": boards, "interval_s": interval_s, "seconds": seconds}
    for count in replicas:
        with ExitStack() as running:
            folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="aiflow-bench-")))
            port = running.enter_context(start_embedded())
            address = running.enter_context(ray_cluster(folder, count)) if count else None
            servers = [
                running.enter_context(_server(name, bundle, tier, port, folder, address, count))
                for name in (("one", "two") if count > 1 else ("one",))
            ]
            for server, name in zip(servers, ("one", "two"), strict=False):
                wait_serving(server, port, SITE, name)
            figures = {}
            with Boards(port, bundle, frames, boards, interval_s) as asking:
                with _memory_mb(servers, seconds / 6) as memory_mb:
                    asking.run(seconds)
                figures = asking.figures(seconds) | {"memory_mb": memory_mb}
            if count > 1:
                with (
                    Boards(port, bundle, frames, boards, interval_s) as asking,
                    _killing(servers[0], folder, seconds / 2) as killed,
                ):
                    asking.run(seconds)
                    figures["while_some_are_killed"] = {"killed": killed, **asking.figures(seconds)}
        result[f"{count} replicas" if count else "without Ray"] = figures
    return result


def _server(
    name: str, bundle: Bundle, tier: str, port: int, folder: Path, address: str | None, replicas: int
) -> AiflowProcess:
    server = {"id": name, "site": SITE, "bundle": str(bundle.path), "tier": tier, "queue": 1024}
    tables: dict[str, Any] = {"server": server, "mqtt": {"port": port}}
    if address:
        tables["ray"] = {"address": address, "replicas": replicas}
    return AiflowProcess("serve", tables, folder, name)


@contextmanager
def _memory_mb(servers: Sequence[AiflowProcess], period_s: float) -> Iterator[list[float]]:
    """The resident memory of all servers together: at the start, after each period, and at the end."""
    samples, is_over = list[float](), threading.Event()

    def sample() -> None:
        samples.append(round(sum(int(psutil.Process(server.pid).memory_info().rss) for server in servers) / 1e6, 1))

    def watch() -> None:
        while not is_over.wait(period_s):
            sample()

    sample()
    thread = threading.Thread(target=watch, name="memory")
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()
        sample()


@contextmanager
def ray_cluster(folder: Path, cpus: int) -> Iterator[str]:
    """A cluster of this machine alone, on ports of its own. Yields its address."""
    port = free_port()
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    own = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--num-cpus={cpus}"]
    own.append(f"--temp-dir={folder / 'ray'}")
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }  # of this cluster, for the servers
    with (folder / "ray.log").open("wb") as log:
        started = subprocess.run([*ray, "start", *own], stdout=log, stderr=log, env=same_code(), check=False)
    if started.returncode:
        raise ProcessError(f"Ray does not start: {how_to_install('ray')}. {(folder / 'ray.log').read_text()[-500:]}")
    try:
        yield f"127.0.0.1:{port}"
    finally:
        for process in cluster_processes(folder):  # `ray stop` ends every cluster of this machine
            with suppress(psutil.NoSuchProcess):
                process.kill()


def cluster_processes(folder: Path) -> list[psutil.Process]:
    """Those of the cluster with its files in this folder, and what they have started."""
    place = str(folder / "ray")
    found = [each for each in psutil.process_iter(["cmdline"]) if place in " ".join(each.info["cmdline"] or [])]
    for process in list(found):
        with suppress(psutil.NoSuchProcess):
            found += process.children(recursive=True)
    return found


@contextmanager
def _killing(server: AiflowProcess, folder: Path, after_s: float) -> Iterator[list[str]]:
    """Kills one replica and this server after so many seconds, on a thread of its own. Yields what was killed."""
    killed: list[str] = []

    def kill() -> None:
        for process in cluster_processes(folder):
            with suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(REPLICA):
                    process.kill()
                    killed.append("replica")
                    break
        server.kill()
        killed.append("server")

    timer = threading.Timer(after_s, kill)
    timer.start()
    try:
        yield killed
    finally:
        timer.join()
