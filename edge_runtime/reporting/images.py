"""Small pictures of the cameras' frames for users, if the configuration lets pictures leave the board."""

import time
from collections.abc import Callable

import numpy as np

from edge_runtime.inference.preprocess import shrunk, to_jpeg
from edge_runtime.mqtt import Publish
from edge_runtime.wire import topics

PERIOD_S = 5.0  # between two pictures of a camera; encoding one takes milliseconds
MAX_SIDE = 640  # pixels
MAX_IMAGE = 128 * 1024  # bytes
QUALITIES = (75, 50, 25, 5)  # of a JPEG; even noise of 640 x 640 pixels fits with the last one


class Images:
    """Publishes pictures on `up/image/<camera>`. They are not retained: no broker keeps them."""

    def __init__(self, publish: Callable[[Publish], None], site: str, board: str) -> None:
        """publish: to the users' broker, never blocks."""
        self._publish, self._site, self._board = publish, site, board
        self._due: dict[str, float] = {}  # by camera

    def show(self, camera: str, pixels: np.ndarray) -> None:
        """A frame that was handled, uint8 RGB [H, W, 3]. Never waits for the network."""
        now = time.monotonic()
        if now < self._due.get(camera, now):
            return
        self._due[camera] = now + PERIOD_S
        self._publish(Publish(topics.image(self._site, self._board, camera), small_jpeg(pixels), qos=0))


def small_jpeg(pixels: np.ndarray) -> bytes:
    """uint8 RGB [H, W, 3] to a JPEG with sides of at most MAX_SIDE pixels and at most MAX_IMAGE bytes."""
    small = shrunk(pixels, MAX_SIDE)
    for quality in QUALITIES:
        data = to_jpeg(small, quality)
        if len(data) <= MAX_IMAGE:
            break
    return data
