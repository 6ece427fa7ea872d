"""Many boards and several servers: the answers of a site with 1, 2, 4 replicas, and the losses if one is killed.

Broker, servers and Ray's replicas are real processes. The boards are simulated: they share a few MQTT connections, and
their latents are prepared before, since one machine cannot run a thousand heads. Like a real board, each sends a
request at its interval, asks again if no reply comes or a server is busy, later each time, and counts the request as
lost after its deadline.
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
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.rate import RatedSymbols
from edge_runtime.mqtt import Message, MqttClient, MqttConfig
from edge_runtime.packages import how_to_install
from edge_runtime.pipeline import NO_PIXELS, build_request
from edge_runtime.planning import Plan
from edge_runtime.requests.timing import busy_wait_s
from edge_runtime.wire import Request, RequestIds, Status, aged, decode_reply, encode_request, topics
from testbed.broker import free_port, start_embedded
from testbed.processes import AiflowProcess, ProcessError, same_code, wait_serving

SITE = "bench"
CONNECTIONS = 20  # of all boards together
BUDGET_S = 20.0
RESEND_S = 3.0
BUSY_BOARD = 20  # times as many requests come from the first board, to see whether the others still get their share
REPLICA = "ray::ServeReplica:aiflow-"

Frames = Iterator[tuple[NDArray[np.int8], Sequence[int]]]


@dataclass
class Asked:
    """An open request."""

    board: str
    request: Request
    at: float  # seconds, monotonic
    sends: int = 0
    waits: int = 0
    resend_at: float = 0.0


class Boards:
    """Simulated boards. `with` connects them."""

    def __init__(self, port: int, bundle: Bundle, frames: Frames, count: int, interval_s: float) -> None:
        self._bundle, self._frames, self._interval_s, self._ids = bundle, frames, interval_s, RequestIds()
        self._plan = Plan("speculative", "benchmark", int(1e3 * BUDGET_S))
        self.names = [f"board-{number}" for number in range(count)]
        self._replies: queue.Queue[tuple[float, Message]] = queue.Queue()
        self._open: dict[bytes, Asked] = {}
        self._due: list[tuple[float, str, bytes]] = []  # a heap: when, board, request to send again or none
        self.reply_ms: dict[str, list[float]] = {name: [] for name in self.names}
        self.counts: Counter[str] = Counter()
        self._clients = [
            MqttClient(
                MqttConfig(port=port).settings(f"boards-{i}", queue_messages=8192),
                subscriptions=[(topics.reply(SITE, name), 1) for name in self.names[i::CONNECTIONS]],
                on_message=lambda message: self._replies.put((time.monotonic(), message)),
            )
            for i in range(min(CONNECTIONS, count))
        ]
        self._running, self._random = ExitStack(), random.Random()

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
        self._due = [(now + random.uniform(0, self._period(name)), name, b"") for name in self.names]
        heapq.heapify(self._due)
        while self._due or self._open:
            due = min(self._due[0][0], time.monotonic() + 0.1) if self._due else time.monotonic() + 0.1
            self._read_until(due)
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                _, name, request_id = heapq.heappop(self._due)
                if request_id:
                    self._again(request_id)
                elif now < end:
                    self._ask(name)
                    heapq.heappush(self._due, (now + self._period(name), name, b""))

    def _period(self, name: str) -> float:
        return self._interval_s / BUSY_BOARD if name == self.names[0] else self._interval_s

    def _ask(self, name: str) -> None:
        symbols, draft = next(self._frames)
        features = RatedSymbols(symbols, self._bundle.manifest.latent.default_level, self._bundle.tables.groups)
        request_id = self._ids.next(int(time.time() * 1e3), secrets.randbits(16))
        request = build_request(self._bundle, request_id, self._plan, NO_PIXELS, features, tuple(draft))
        self._open[request_id] = asked = Asked(name, request, time.monotonic())
        self.counts["asked"] += 1
        self._send(asked)

    def _send(self, asked: Asked) -> None:
        waited_s = time.monotonic() - asked.at
        client, left_s = self._clients[self.names.index(asked.board) % CONNECTIONS], BUDGET_S - waited_s
        payload = encode_request(aged(asked.request, waited_s, left_s))
        client.publish(topics.request(SITE, asked.board), payload, expiry_s=left_s)
        self._wait(asked, RESEND_S * 2.0**asked.sends * self._random.uniform(1, 1.5))
        asked.sends += 1

    def _wait(self, asked: Asked, wait_s: float) -> None:
        """Schedules the next send."""
        asked.resend_at = min(time.monotonic() + wait_s, asked.at + BUDGET_S)
        heapq.heappush(self._due, (asked.resend_at, asked.board, asked.request.id))

    def _again(self, request_id: bytes) -> None:
        now, asked = time.monotonic(), self._open.get(request_id)
        if asked is None or asked.resend_at > now:
            return
        if now >= asked.at + BUDGET_S:
            del self._open[request_id]
            self.counts["lost"] += 1
            self.counts["greedy_board_lost"] += asked.board == self.names[0]
        else:
            self.counts["sent_again"] += 1
            self._send(asked)

    def _read_until(self, due: float) -> None:
        """Reads all replies that have arrived, even if it is late already, and those that arrive before `due`."""
        while True:
            try:
                at, message = self._replies.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                return
            reply = decode_reply(message.payload)
            if (asked := self._open.pop(reply.id, None)) is None:
                self.counts["second_reply"] += 1
            elif reply.status is Status.BUSY:
                self.counts["busy"] += 1
                self._open[reply.id] = asked
                self._wait(asked, busy_wait_s((reply.retry_after_ms or 0) / 1e3, asked.waits, self._random))
                asked.waits += 1
            elif reply.status is Status.OK:
                self.reply_ms[asked.board].append(1e3 * (at - asked.at))
            else:
                self.counts["refused"] += 1

    def figures(self, seconds: float) -> dict[str, Any]:
        greedy, others = self.reply_ms[self.names[0]], [self.reply_ms[name] for name in self.names[1:]]
        together = [ms for replies in others for ms in replies] or [0.0]
        return {
            **{name: self.counts[name] for name in ("asked", "sent_again", "busy", "refused", "second_reply", "lost")},
            "answered": len(greedy) + sum(map(len, others)),
            "per_second": round((len(greedy) + sum(map(len, others))) / seconds, 2),
            "reply_ms_p50": round(float(np.percentile(together, 50))),
            "reply_ms_p95": round(float(np.percentile(together, 95))),
            "greedy_board_lost": self.counts["greedy_board_lost"],
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

    From two replicas on, there are two servers. A replica is killed halfway through a second run, and a server halfway
    through a third one.
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
            before_s = broker_cpu_s(port)
            with Boards(port, bundle, frames, boards, interval_s) as asking:
                with _memory_mb(servers, seconds / 6) as memory_mb:
                    asking.run(seconds)
                figures = asking.figures(seconds) | {"memory_mb": memory_mb}
            took_ms = 1e3 * (broker_cpu_s(port) - before_s)
            figures["broker_ms_per_answer"] = round(took_ms / max(1, figures["answered"]), 3)
            for process in ("replica", "server") if count > 1 else ():  # in this order: the server does not come back
                with (
                    Boards(port, bundle, frames, boards, interval_s) as asking,
                    _killing(process, servers[0], folder, seconds / 2) as killed,
                ):
                    asking.run(seconds)
                figures[f"while_a_{process}_is_killed"] = {"killed": len(killed), **asking.figures(seconds)}
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


def broker_cpu_s(port: int) -> float:
    """CPU time of the broker that listens on this port."""
    listening = (each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
    times = psutil.Process(next(each.pid for each in listening if each.laddr.port == port)).cpu_times()
    return float(times.user + times.system)


@contextmanager
def _killing(which: str, server: AiflowProcess, folder: Path, after_s: float) -> Iterator[list[int]]:
    """Kills one replica or this server after so many seconds, on a thread of its own. Yields the ids of the killed."""
    killed: list[int] = []

    def kill() -> None:
        if which == "server":
            killed.append(server.pid)
            server.kill()
            return
        for process in cluster_processes(folder):
            with suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(REPLICA):
                    process.kill()
                    killed.append(process.pid)
                    return

    timer = threading.Timer(after_s, kill)
    timer.start()
    try:
        yield killed
    finally:
        timer.join()
