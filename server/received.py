"""A request that has reached a server, as it goes from stage to stage."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.wire import Request
from server.gateway import Arrival
from server.reply_cache import Key


@dataclass(frozen=True, slots=True)
class Received:
    """A request that could be read. It ends in a reply: the answer, or why there is none."""

    arrival: Arrival
    request: Request
    deadline: float  # seconds, time.monotonic()
    pixels: NDArray[np.uint8] | None = None  # its picture, decoded: the head's input [224, 224, 3]
    picture_ms: float = 0.0  # what decoding it took

    @property
    def key(self) -> Key:
        return self.arrival.board, self.request.id
