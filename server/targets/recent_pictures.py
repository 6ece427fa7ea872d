"""The last pictures of each camera, for prompts that show several in one question. In memory only.

A board sends each picture once, with its request. What is dropped here, or went to another server of the pool, is
missing in a later question, and no answer is lost for it.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass

from server.prompts import MAX_FRAMES
from server.targets.target import EarlierPicture, MediaType

MAX_AGE_S = 600.0  # an older picture shows another scene
MAX_BYTES = 64 << 20  # of all boards together: 1,000 pictures of 64 KB
MAX_BOARD_BYTES = 8 << 20  # of one board, so that no board can drop those of all others
ENTRY_BYTES = 512  # of each picture besides its own, so that many small ones are bounded, too
MAX_CAMERAS = 16  # of one board, as its configuration has


@dataclass(slots=True)
class _Kept:
    picture: bytes
    media_type: MediaType


_Pictures = dict[int, _Kept]  # of one camera, by the id of their request, which rises with time


class RecentPictures:
    """For any thread. What was not used for longest is dropped first."""

    def __init__(self, max_bytes: int = MAX_BYTES, max_board_bytes: int = MAX_BOARD_BYTES) -> None:
        self._max_bytes, self._max_board_bytes = max_bytes, max_board_bytes
        self._boards: OrderedDict[str, OrderedDict[str, _Pictures]] = OrderedDict()  # the latest last
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of all pictures."""
        with self._lock:
            return sum(map(_size, self._boards.values()))

    def add(
        self, board: str, camera: str, request_id: bytes, picture: bytes, media_type: MediaType, frames: int
    ) -> tuple[EarlierPicture, ...]:
        """Keeps a picture. Returns the camera's earlier ones for a question with so many pictures, the oldest first.

        Request ids have the time of capture in their upper 48 bits, in ms (docs/protocol.md, section 3). So the order
        does not depend on when requests arrive, and a request that is sent again gets the same pictures.
        """
        number = int.from_bytes(request_id, "big")
        with self._lock:
            cameras = self._boards.setdefault(board, OrderedDict())
            pictures = cameras.setdefault(camera, {})
            self._boards.move_to_end(board)
            cameras.move_to_end(camera)
            pictures[number] = _Kept(picture, media_type)
            earlier = [
                EarlierPicture(kept.picture, kept.media_type, ((number - other) >> 16) / 1e3)
                for other, kept in sorted(pictures.items())
                if other < number
            ]
            while len(pictures) > MAX_FRAMES:
                del pictures[min(pictures)]
            self._make_room(cameras)
        recent = [each for each in earlier if each.seconds <= MAX_AGE_S]
        return tuple(recent[max(0, len(recent) - frames + 1) :])

    def _make_room(self, cameras: OrderedDict[str, _Pictures]) -> None:
        """Under the lock. cameras: of the board that has a new picture."""
        while len(cameras) > MAX_CAMERAS or _size(cameras) > self._max_board_bytes:
            _drop_oldest(cameras)
        while sum(map(_size, self._boards.values())) > self._max_bytes:
            board, idle = next(iter(self._boards.items()))
            _drop_oldest(idle)
            if not idle:
                del self._boards[board]


def _size(cameras: OrderedDict[str, _Pictures]) -> int:
    return sum(len(kept.picture) + ENTRY_BYTES for pictures in cameras.values() for kept in pictures.values())


def _drop_oldest(cameras: OrderedDict[str, _Pictures]) -> None:
    """Of the camera that was idle for longest."""
    camera, pictures = next(iter(cameras.items()))
    del pictures[min(pictures)]
    if not pictures:
        del cameras[camera]
