"""Where events go: the board's event topic, its retained last event, and a listener in the same process.

An answer that makes a camera's trigger true is told first as an event of the trigger, then as itself.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import msgspec

from edge_runtime.mqtt import MqttClient
from edge_runtime.reporting.trigger import Trigger
from edge_runtime.wire import Event, WireError, encode_event, topics

logger = logging.getLogger(__name__)


class Events:
    def __init__(
        self,
        client: MqttClient,
        site: str,
        board: str,
        listener: Callable[[Event], None] | None = None,
        triggers: Mapping[str, Sequence[Trigger]] | None = None,
    ) -> None:
        """triggers: by camera."""
        self._client, self._listener, self._triggers = client, listener, triggers or {}
        # Over the triggers and the next two: answers come on one thread, those that are used again on another.
        self._stepping = threading.Lock()
        self._told: set[Trigger] = set()  # whose unknown class was logged
        self.triggered = 0  # events of triggers
        self._event, self._last = topics.event(site, board), topics.last(site, board)

    def publish(self, event: Event) -> None:
        """Never blocks; any thread."""
        payload = encode_event(event)
        for trigger in self._triggers.get(event.camera, ()):
            with self._stepping:
                news = self._step(trigger, event)
            if news:
                self._send(*news)
        self._send(event, payload)

    def _step(self, trigger: Trigger, event: Event) -> tuple[Event, bytes] | None:
        """The trigger's event, if it has one to tell."""
        if trigger not in self._told and (unknown := trigger.unknown_class(event)):
            self._told.add(trigger)
            logger.warning(
                "trigger compares %s with %r, which is none of its classes: %s when=%r",
                unknown.question,
                unknown.name,
                ", ".join(event.answers[unknown.question]),
                trigger.when,
            )
        if not trigger.step(event):
            return None
        # What the condition does not need is in the event that follows.
        news = msgspec.structs.replace(
            event, type="trigger", final=False, trigger=trigger.when, tokens=(), explain=None, timings_ms={}, hops=()
        )
        try:
            payload = encode_event(news)
        except WireError as error:  # the condition was too much for an event that is full already
            logger.error("trigger not told camera=%s when=%r error=%s", event.camera, trigger.when, error)
            return None
        self.triggered += 1
        return news, payload

    def _send(self, event: Event, payload: bytes) -> None:
        self._client.publish(self._event, payload, qos=1)
        self._client.publish(self._last, payload, qos=1, retain=True)
        if self._listener:
            try:
                self._listener(event)
            except Exception:  # the listener is the caller's code: the runtime must go on whatever it raises
                logger.exception("event listener raised")
