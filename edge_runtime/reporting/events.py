"""Where events go: the board's event topic, its retained last event, and a listener in the same process."""

import logging
from collections.abc import Callable

from edge_runtime.mqtt import MqttClient
from edge_runtime.wire import Event, encode_event, topics

logger = logging.getLogger(__name__)


class Events:
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
            except Exception:  # the listener is the caller's code: the runtime must go on whatever it raises
                logger.exception("event listener raised")
