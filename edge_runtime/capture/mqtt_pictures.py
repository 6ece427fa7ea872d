"""Pictures that camera software publishes over MQTT, for one camera."""

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from math import inf

from edge_runtime.capture.frame import Counters, Frame, NewestFrame, arrived
from edge_runtime.config import CameraConfig
from edge_runtime.logs import is_told
from edge_runtime.picture_checks import PictureError, decode_picture

logger = logging.getLogger(__name__)

MAX_PICTURE = 8 << 20  # bytes of a packet with one
MAX_MQTT_PIXELS = 16_000_000  # of a picture over MQTT: anybody who may publish there sends it


class MqttPictures:
    """Pictures that camera software publishes for one camera. The newest one wins."""

    def __init__(self, camera: CameraConfig, counters: Counters) -> None:
        self._camera, self._counters, self._slot = camera, counters, NewestFrame(counters)

    def put(self, data: bytes) -> None:
        """One encoded picture, on the MQTT client's thread. It is decoded later, on the camera's thread."""
        self._slot.put(arrived(self._camera.name, data))

    def forget(self) -> None:
        """Drops a waiting picture: a camera that is switched on again must not show an old one."""
        self._counters.skipped += self._slot.take(0, threading.Event()) is not None

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Decoded frames until `stop`, on average at most one per interval. Pictures in between are skipped."""
        interval, due = self._camera.min_interval_s, -inf
        while not stop.is_set():
            frame = self._slot.take(inf, stop)
            if frame is None:
                continue
            # Up to half an interval early is in time: a camera that sends unevenly at the interval loses no picture.
            if frame.captured < due - interval / 2:
                self._counters.skipped += 1
                continue
            try:
                pixels = decode_picture(frame.encoded, MAX_MQTT_PIXELS)
            except PictureError as error:
                self._counters.unreadable += 1
                if is_told(self._counters.unreadable):
                    logger.warning("picture unreadable camera=%s error=%s", frame.camera, error)
                continue
            due = max(due, frame.captured) + interval
            yield replace(frame, pixels=pixels)
            del pixels  # see Frame
