"""The processes of the fault matrix: the servers' broker, the boards' local broker, two servers.

Events and frames of the boards use the local broker, so that they arrive whatever happens to the servers' broker.
"""

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import Message, MqttClient, MqttConfig
from edge_runtime.wire import topics
from testbed.broker import PLAIN, Mosquitto
from testbed.processes import START_S, AiflowProcess, Process, ProcessError

SITE, BROKER, SERVER, SPARE = "faults", "broker", "server-a", "server-b"
KEEPALIVE_S = 4  # shorter than in the field, so that a scenario does not take minutes
UNLIMITED = f"{PLAIN}max_queued_messages 0\nmax_inflight_messages 0\n"  # the local broker must not drop events


class FaultSite:
    """Brokers and servers. Several scenarios share them if they leave them unharmed."""

    def __init__(self, folder: Path, bundle: Bundle, photos: list[bytes], say: Callable[[str], None]) -> None:
        self.folder, self.bundle, self.photos, self.say = folder, bundle, photos, say
        self.broker, self.local = Mosquitto(folder), Mosquitto(folder, UNLIMITED)
        self.processes: dict[str, Process] = {
            BROKER: self.broker,
            SERVER: self._server(SERVER),
            SPARE: self._server(SPARE),
        }
        self.messages: queue.Queue[tuple[float, Message]] = queue.Queue()

    @contextmanager
    def run(self) -> Iterator["FaultSite"]:
        """Runs the brokers during the `with` block, and stops every process after it."""
        with ExitStack() as stack:
            for process in (self.local, *self.processes.values()):
                stack.callback(process.stop)
            self.broker.start()
            self.local.start()
            self.client = MqttClient(
                MqttConfig(port=self.local.port).settings("harness", queue_messages=4096),
                subscriptions=[(f"{topics.ROOT}/{SITE}/+/up/event", 1)],
                on_message=lambda message: self.messages.put((time.monotonic(), message)),
            )
            if not stack.enter_context(self.client).wait_online(START_S):
                raise ProcessError(f"the local broker does not answer: {self.client.reason}")
            yield self

    def _server(self, name: str) -> AiflowProcess:
        server = {"id": name, "site": SITE, "bundle": str(self.bundle.path), "tier": "edge"}
        mqtt = {"port": self.broker.port, "keepalive_s": KEEPALIVE_S}
        return AiflowProcess("serve", {"server": server, "mqtt": mqtt}, self.folder, name)
