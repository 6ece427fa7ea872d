"""An MQTT client for tests: it collects the messages of some topics and can answer them."""

import itertools
import queue
import time
from collections.abc import Callable

from edge_runtime.mqtt import Message, MqttClient, MqttSettings, Timing
from tests import event_contract

PATIENCE_S = 60.0  # for something that takes much less than a second if nothing is wrong
QUICK = Timing(backoff_base=0.02, backoff_cap=0.1, refused_cap=0.2, handshake=2.0, degraded=0.3, short_session=0.0)
_numbers = itertools.count()  # a broker disconnects a client when another one with its id connects


class Listener:
    """`with` connects it and waits until its subscriptions are active."""

    def __init__(self, port: int, *topics: str, answer: Callable[[bytes], bytes] | None = None, to: str = "") -> None:
        """answer: called with every payload, on the client's thread; its result is published on the topic `to`."""
        self.heard: queue.Queue[Message] = queue.Queue()
        self._answer, self._to = answer, to
        self.client = MqttClient(
            MqttSettings("127.0.0.1", port, client_id=f"listener-{next(_numbers)}", keepalive_s=2),
            subscriptions=[(topic, 1) for topic in topics],
            on_message=self._on_message,
            timing=QUICK,
        )

    def _on_message(self, message: Message) -> None:
        if message.topic.endswith(("/up/event", "/up/last")):
            event_contract.written.append(message.payload)
        self.heard.put(message)
        if self._answer:
            self.client.publish(self._to, self._answer(message.payload))

    def next(self) -> bytes:
        """The payload of the next message."""
        return self.heard.get(timeout=PATIENCE_S).payload

    def __enter__(self) -> "Listener":
        self.client.start()
        assert self.client.wait_online(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()


def until(condition: Callable[[], bool]) -> None:
    """Waits for something without an event, such as another thread's counters."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.01)
