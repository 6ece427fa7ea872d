"""The processes of an end-to-end run: brokers and servers that stay, and boards that come and go."""

import json
import os
import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.config import MqttConfig
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt.client import Message, MqttClient
from edge_runtime.wire import Event, decode_event, topics
from testbed.broker import start_embedded
from testbed.link_simulator import Link
from testbed.processes import START_S, Child, ChildError, wait_serving
from testbed.shaping import Profile

SITE = "bench"
BACKHAUL = Profile("backhaul", 100_000, 100_000, 20)  # from the edge server to the cloud's broker
DEADLINE_S = 30.0  # generous: a late answer is a slow one, not a lost one
GRACE_S = 5.0  # after it, for the board's last word
# Nothing is lost on a link that only delays: a request that is sent again would only wait behind itself.
RESEND_S = 15.0


@dataclass(frozen=True, slots=True)
class Site:
    """What stays; brokers are ports of this machine."""

    bundle: Bundle
    folder: Path
    local: int  # the board's own broker, not behind the link
    cloud: int  # the cloud server's
    edge: int  # the escalating edge server's; 0: there is none
    servers: Sequence[Child]


@contextmanager
def site(bundle: Bundle, folder: Path, escalates: bool) -> Iterator[Site]:
    """Brokers, a cloud server, and an edge server below it if wanted. Raises BrokerError, ChildError."""
    with ExitStack() as running:
        ports = [running.enter_context(start_embedded()) for _ in range(2 + escalates)]
        local, cloud, edge = (*ports, 0)[:3]
        tables: dict[str, dict[str, Any]] = {"cloud": {"mqtt": {"port": cloud}}}
        if escalates:
            backhaul = running.enter_context(Link(("127.0.0.1", cloud), BACKHAUL))
            upstream = {"upstream": {"site": SITE}, "upstream.mqtt": {"port": backhaul.port}}
            tables["edge"] = {"mqtt": {"port": edge}} | upstream
        servers = {}
        for tier, more in tables.items():
            (folder / tier).mkdir()
            server = {"id": f"bench-{tier}", "site": SITE, "bundle": str(bundle.path.resolve()), "tier": tier}
            servers[tier] = running.enter_context(Child("serve", {"server": server} | more, folder / tier))
        for tier, child in servers.items():
            wait_serving(child, tables[tier]["mqtt"]["port"], SITE, f"bench-{tier}")
        yield Site(bundle, folder, local, cloud, edge, list(servers.values()))


class Board:
    """A board of one paradigm behind a link, and a user of it on its local broker. Start it with `with`."""

    def __init__(self, site: Site, name: str, link: Link, settings: dict[str, Any]) -> None:
        self._site, self._name = site, name
        (folder := site.folder / name).mkdir()
        board = {"id": name, "site": SITE, "bundle": str(site.bundle.path.resolve()), **settings}
        board |= {"deadline_ms": int(1e3 * DEADLINE_S), "resend_ms": int(1e3 * RESEND_S)}
        tables = {"board": board, "mqtt": {"port": link.port}, "local": {"port": site.local}}
        self._child = Child("run", tables | {"cameras": [{"name": "photos", "source": "mqtt"}]}, folder)
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._client = MqttClient(
            MqttConfig(port=site.local).settings(f"user-of-{name}"),
            subscriptions=[(topics.event(SITE, name), 1), (topics.status(SITE, name), 1)],
            on_message=self._inbox.put,
        )
        self._running = ExitStack()
        self._earlier: set[str] = set()  # frames that were waited for

    def __enter__(self) -> "Board":
        with ExitStack() as running:
            running.enter_context(self._client)
            running.enter_context(self._child)
            self._wait_online()
            self._running = running.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def show(self, picture: bytes) -> list[Event]:
        """Sends a picture as camera software would and waits for its last event: its events, at most one is final.

        Raises ChildError for a process that ended.
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

    def _wait_online(self) -> None:
        """Its status comes behind its subscriptions: what is sent now reaches it."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            message = self._next_message()
            is_status = message and message.topic == topics.status(SITE, self._name)
            if message and is_status and json.loads(message.payload)["state"] == "online":
                return
        raise ChildError(f"the board did not start within {START_S:.0f} s: try again when the machine is less busy")

    def _next_event(self) -> Event | None:
        message = self._next_message()
        is_event = message and message.topic == topics.event(SITE, self._name)
        return decode_event(message.payload) if message and is_event else None

    def _next_message(self) -> Message | None:
        for child in (*self._site.servers, self._child):
            if child.has_ended():
                raise ChildError(f"`aiflow {child.name}` ended by itself, with success: was it told to stop?")
        with suppress(queue.Empty):
            return self._inbox.get(timeout=0.2)
        return None


def machine() -> dict[str, Any]:
    """What all of this shares."""
    load = os.getloadavg()[0]
    return {"cores": os.cpu_count(), "load": round(load, 2), "shared_by": "board, servers, brokers, link, benchmark"}
