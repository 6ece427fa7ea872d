"""The latest frames of each board, which its later frames may be coded against. For any number of threads.

A board uses a frame only after it has the reply to it. If the server has dropped the frame by then, it tells the board,
which sends the next one whole. So a dropped frame costs bytes, and never causes a wrong answer.
"""

import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.wire.bitstream import KEPT_FRAMES, Header

MAX_BYTES = 64 << 20  # of all boards together: 20,000 frames of 3 KB


class _Frame(NamedTuple):
    symbols: NDArray[np.int8]  # [C, H, W]
    level: int
    groups: int


class References:
    """At most `max_bytes` of symbols. If they are more, the board that was idle for longest loses its oldest frames."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes, self.bytes = max_bytes, 0
        self._lock = threading.Lock()
        self._boards: OrderedDict[str, OrderedDict[int, _Frame]] = OrderedDict()  # the latest last; frames by name

    def keep(self, board: str, request_id: bytes, header: Header, symbols: NDArray[np.int8]) -> None:
        """The symbols of a request that gets an answer."""
        with self._lock:
            frames = self._boards.setdefault(board, OrderedDict())
            self._boards.move_to_end(board)
            name = int.from_bytes(request_id[-2:], "big")
            if name in frames:
                self._drop(frames, name)
            frames[name] = _Frame(symbols, header.level, header.groups)
            self.bytes += symbols.nbytes
            if len(frames) > KEPT_FRAMES:
                self._drop(frames, next(iter(frames)))
            while self.bytes > self._max_bytes:
                longest_idle, frames = next(iter(self._boards.items()))
                self._drop(frames, next(iter(frames)))
                if not frames:
                    del self._boards[longest_idle]

    def find(self, board: str, header: Header) -> NDArray[np.int8] | None:
        """The reference that a header of this board names, if it is here and has the same level and groups."""
        with self._lock:
            frames = self._boards.get(board)
            frame = frames.get(header.reference) if frames and header.reference is not None else None
        if frame is None or (frame.level, frame.groups) != (header.level, header.groups):
            return None
        return frame.symbols

    def _drop(self, frames: OrderedDict[int, _Frame], name: int) -> None:
        self.bytes -= frames.pop(name).symbols.nbytes
