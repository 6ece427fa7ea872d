"""Pictures of Frigate's events: one for each event, the best one that came within `wait_s`.

frigate_events.py has the rules; here are the topics, and the thread that waits.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

from edge_runtime.capture.frame import POLL_S, Counters, Frame
from edge_runtime.capture.frigate_events import COUNTED, FrigateEvents
from edge_runtime.capture.frigate_messages import FrigateMessageError, ObjectChange, ReviewChange, read_message
from edge_runtime.capture.mqtt_pictures import MAX_MQTT_PIXELS, MAX_PICTURE
from edge_runtime.config import CameraConfig
from edge_runtime.logs import is_told, printable
from edge_runtime.mqtt import Message
from edge_runtime.mqtt.routes import Rejection, Route
from edge_runtime.picture_checks import PictureError, decode_picture

if TYPE_CHECKING:
    from edge_runtime.capture.camera import Camera

logger = logging.getLogger(__name__)

WAIT_S = 5.0  # for a better picture of an event, from its first message; Frigate tells of a better one within 5 s
Change = TypeVar("Change", ObjectChange, ReviewChange)


class FrigatePictures:
    """The events of one of Frigate's cameras, each with a picture."""

    def __init__(self, camera: CameraConfig, counters: Counters) -> None:
        self._camera, self._counters = camera, counters
        self._events = FrigateEvents(WAIT_S if camera.wait_s is None else camera.wait_s)
        self._changed = threading.Condition()

    # ---- any thread; nothing here blocks ----

    def object_changed(self, change: ObjectChange) -> None:
        with self._changed:
            self._events.object_changed(change, time.monotonic())
            self._changed.notify()

    def review_changed(self, change: ReviewChange) -> None:
        with self._changed:
            self._events.review_changed(change)

    def snapshot_arrived(self, label: str, data: bytes) -> None:
        """It is decoded later, on the camera's thread, if its event is answered with it."""
        with self._changed:
            self._counters.skipped += self._events.snapshot_arrived(label, data, time.monotonic())
            self._changed.notify()

    def forget(self) -> None:
        """Drops what waits: the camera is switched off."""
        with self._changed:
            self._counters.skipped += self._events.clear()

    def counts(self) -> tuple[Counter[str], int]:
        """What became of the events, and how many wait."""
        with self._changed:
            return Counter(self._events.counts), self._events.open

    # ---- the camera's thread ----

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """A frame of each event, until `stop`, at most one per interval. Its time is that of the snapshot; its deadline
        begins when it is taken.
        """
        due = -inf
        while not stop.wait(max(0.0, due - time.monotonic())):
            with self._changed:
                now = time.monotonic()
                found = self._events.take(now)
                if found is None:
                    self._changed.wait(max(0.0, min(POLL_S, self._events.next_due() - now)))
                    continue
            event, snapshot = found
            try:
                pixels = decode_picture(snapshot.data, MAX_MQTT_PIXELS)
            except PictureError as error:
                self._counters.unreadable += 1
                if is_told(self._counters.unreadable):
                    logger.warning("picture unreadable camera=%s error=%s", self._camera.name, error)
                continue
            now = time.monotonic()
            due = now + self._camera.min_interval_s
            captured_unix = time.time() - (now - snapshot.arrived)
            yield Frame(self._camera.name, pixels, captured_unix, now, encoded=snapshot.data, frigate=event)
            del pixels  # see Frame


class FrigateTopics:
    """Frigate's topics, and which camera hears of their messages."""

    def __init__(self, prefix: str, cameras: Iterable["Camera"]) -> None:
        """cameras: those with another source than "frigate" are left out."""
        self._prefix = prefix
        self._cameras = {camera.config.name_in_frigate: camera for camera in cameras if camera.frigate}

    def routes(self) -> list[Route]:
        """To subscribe to at the users' broker. With QoS 0, a snapshot may overtake an event, never the other way."""
        if not self._cameras:
            return []
        snapshots = sorted(f"{self._prefix}/{name}/+/snapshot" for name in self._cameras)
        return [
            *(Route(topic, self._snapshot_arrived, qos=0, max_packet=MAX_PICTURE) for topic in snapshots),
            Route(f"{self._prefix}/events", self._event_arrived),
            Route(f"{self._prefix}/reviews", self._review_arrived, optional=True),
        ]

    def counts(self) -> dict[str, Any]:
        """Numbers of all cameras, with the names of reporting/counters.py; empty without cameras."""
        if not self._cameras:
            return {}
        events, waiting = Counter(dict.fromkeys(COUNTED, 0)), 0
        for name in self._cameras:
            counts, still_open = self._pictures(name).counts()
            events.update(counts)
            waiting += still_open
        return {"frigate_events": dict(events), "frigate_open": waiting}

    # ---- the MQTT client's thread ----

    def _snapshot_arrived(self, message: Message) -> Rejection | None:
        _, name, label, _ = message.topic[len(self._prefix) :].split("/")
        camera = self._cameras[name]
        if camera.is_on:
            self._pictures(name).snapshot_arrived(label, message.payload)
        else:
            camera.counters.skipped += 1
        return None

    def _event_arrived(self, message: Message) -> Rejection | None:
        return self._read(message, ObjectChange, FrigatePictures.object_changed)

    def _review_arrived(self, message: Message) -> Rejection | None:
        return self._read(message, ReviewChange, FrigatePictures.review_changed)

    def _read(
        self, message: Message, kind: type[Change], tell: Callable[[FrigatePictures, Change], None]
    ) -> Rejection | None:
        """Tells the camera that a message is about, if it is on. Other cameras are not this board's."""
        try:
            change = read_message(message.payload, kind)
        except FrigateMessageError as error:
            return "unreadable", printable(str(error), 256)
        camera = self._cameras.get(change.after.camera)
        if camera and camera.is_on:
            tell(self._pictures(change.after.camera), change)
        return None

    def _pictures(self, name: str) -> FrigatePictures:
        pictures = self._cameras[name].frigate
        assert pictures  # all of these cameras have it
        return pictures
