"""The processes of the case study: brokers and servers for the whole run, and one board per paradigm and link."""

import os
import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import Message, MqttClient, MqttConfig
from edge_runtime.wire import Event, topics
from testbed.broker import start_embedded
from testbed.link_simulator import LinkSimulator
from testbed.processes import AiflowProcess, read_event, wait_online, wait_serving
from testbed.shaping import Profile

SITE = "bench"
BACKHAUL = Profile("backhaul", 100_000, 100_000, 20)  # from the edge server to the cloud's broker
DEADLINE_S = 30.0  # long, so that a late answer counts as slow and not as lost
GRACE_S = 5.0  # after the deadline, for the board's last event
RESEND_S = 15.0  # long: these links delay but lose nothing, and a second request would only wait behind the first


@dataclass(frozen=True, slots=True)
class Site:
    """Brokers and servers. Brokers are given by their port on this machine."""

    bundle: Bundle
    folder: Path
    local: int  # the board's local broker, not behind the link
    cloud: int  # the cloud server's broker
    edge: int  # the broker of the edge server that escalates; 0: there is none
    servers: Sequence[AiflowProcess]


@contextmanager
def run_site(bundle: Bundle, folder: Path, escalates: bool, target: str = "bundle") -> Iterator[Site]:
    """Runs brokers, a cloud server, and if wanted an edge server below it. Raises BrokerError, ProcessError.

    target: of the cloud server, "bundle" or "lm".
    """
    with ExitStack() as running:
        ports = [running.enter_context(start_embedded()) for _ in range(2 + escalates)]
        local, cloud, edge = (*ports, 0)[:3]
        tables: dict[str, dict[str, Any]] = {"cloud": {"mqtt": {"port": cloud}}}
        if escalates:
            backhaul = running.enter_context(LinkSimulator(("127.0.0.1", cloud), BACKHAUL))
            upstream = {"upstream": {"site": SITE, "mqtt": {"port": backhaul.port}}}
            tables["edge"] = {"mqtt": {"port": edge}} | upstream
        servers = {}
        for tier, more in tables.items():
            (folder / tier).mkdir()
            server = {"id": f"bench-{tier}", "site": SITE, "bundle": str(bundle.path.resolve()), "tier": tier}
            server["target"] = target if tier == "cloud" else "bundle"
            servers[tier] = running.enter_context(AiflowProcess("serve", {"server": server} | more, folder / tier))
        for tier, process in servers.items():
            wait_serving(process, tables[tier]["mqtt"]["port"], SITE, f"bench-{tier}")
        yield Site(bundle, folder, local, cloud, edge, list(servers.values()))


class MeasuredBoard:
    """A board of one paradigm behind a link, and a user on its local broker."""

    def __init__(self, site: Site, name: str, link: LinkSimulator, settings: dict[str, Any]) -> None:
        self._site, self._name = site, name
        (folder := site.folder / name).mkdir()
        board = {"id": name, "site": SITE, "bundle": str(site.bundle.path.resolve()), **settings}
        board |= {"deadline_ms": int(1e3 * DEADLINE_S), "resend_ms": int(1e3 * RESEND_S)}
        tables = {"board": board, "mqtt": {"port": link.port}, "local": {"port": site.local}}
        self._process = AiflowProcess("run", tables | {"cameras": [{"name": "photos", "source": "mqtt"}]}, folder)
        self._inbox: queue.Queue[Message] = queue.Queue()
        self._client = MqttClient(
            MqttConfig(port=site.local).settings(f"user-of-{name}"),
            subscriptions=[(topics.event(SITE, name), 1)],
            on_message=self._inbox.put,
        )
        self._earlier: set[str] = set()  # frames of earlier calls of `show`

    @contextmanager
    def run(self) -> Iterator["MeasuredBoard"]:
        """Runs the board during the `with` block, from when frames reach it."""
        with self._client, self._process:
            wait_online(self._process, self._site.local, SITE, self._name)
            yield self

    def show(self, picture: bytes) -> list[Event]:
        """Sends a picture as camera software does, and returns its events up to the final one, or to the deadline.

        Raises ProcessError if a process has ended.
        """
        self._client.publish(topics.frame(SITE, self._name), picture, qos=0)
        events: list[Event] = []
        until = time.monotonic() + DEADLINE_S + GRACE_S
        while time.monotonic() < until and not (events and events[-1].final):
            event = self._next_event()
            if event and event.frame not in self._earlier:
                events.append(event)
        self._earlier |= {event.frame for event in events}
        return events

    def _next_event(self) -> Event | None:
        for process in (*self._site.servers, self._process):
            process.check_running()
        with suppress(queue.Empty):
            return read_event(self._inbox.get(timeout=0.2).payload)
        return None


def machine() -> dict[str, Any]:
    """The machine that all processes share, for the report."""
    load = os.getloadavg()[0]
    return {"cores": os.cpu_count(), "load": round(load, 2), "shared_by": "board, servers, brokers, link, benchmark"}
