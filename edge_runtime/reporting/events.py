"""Where events go: the board's event topic, its retained last event, and listeners in the same process."""

import logging
from collections.abc import Callable

from edge_runtime.mqtt.client import MqttClient
from edge_runtime.wire import Event, encode_event, topics

logger = logging.getLogger(__name__)


class Events:
    """Publishes what became known about frames."""

    def __init__(
        self, client: MqttClient, site: str, board: str, listener: Callable[[Event], None] | None = None
    ) -> None:
        self._client, self._listener = client, listener
        self._event, self._last = topics.event(site, board), topics.last(site, board)

    def publish(self, event: Event) -> None:
        """Never blocks; any thread."""
        payload = encode_event(event)
        self._client.publish(self._event, payload, qos=1)
        self._client.publish(self._last, payload, qos=1, retain=True)
        if self._listener:
            try:
                self._listener(event)
            except Exception:  # it is the caller's; neither the frame path nor the answers may end with it
                logger.exception("event listener raised")
