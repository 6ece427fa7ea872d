"""A frame, the counters of a camera, and the slot through which a live source hands over its newest frame."""

import threading
import time
from dataclasses import dataclass
from math import inf

import numpy as np

from edge_runtime.errors import AiflowError
from edge_runtime.wire.event import FrigateEvent

POLL_S = 0.5  # a thread that waits for a frame checks its stop event this often
NOT_DECODED = np.empty((0, 0, 3), np.uint8)  # the pixels of a frame that has only its encoded picture yet


class CameraError(AiflowError, ValueError):
    """A camera cannot be opened, has ended or stalls. It will be opened again."""


def stalled(stall_s: float) -> CameraError:
    """The error of a live camera that worked until now."""
    return CameraError(f"has ended, or shows no new frame for {stall_s:g} s")


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture of one camera.

    A picture of 1080p has 6 MB. Code that has passed a frame on deletes its own variable before it reads the next
    frame, so that this memory is free by then.
    """

    camera: str
    pixels: np.ndarray  # uint8 RGB [H, W, 3]
    captured_unix: float  # seconds, wall clock: for people
    # Seconds, time.monotonic(): for ages and deadlines. Of a stream, when its data arrived; of a device, as it says.
    captured: float
    name: str = ""  # of the file it comes from
    encoded: bytes = b""  # the picture as it arrived, if it arrived as a picture
    small: np.ndarray | None = None  # uint8 grey [h, w], for the motion gate, of a picture that is not decoded yet
    frigate: FrigateEvent | None = None  # the event that the picture belongs to, if it comes from Frigate


def arrived(camera: str, encoded: bytes, captured: float | None = None) -> Frame:
    """A picture that is decoded when it is taken. captured: time.monotonic(); None: it has just arrived."""
    now = time.monotonic()
    captured = now if captured is None else captured
    return Frame(camera, NOT_DECODED, time.time() - (now - captured), captured, "", encoded)


@dataclass(slots=True)
class Counters:
    """What happened to frames before they were used."""

    frames: int = 0  # read
    still: int = 0  # of these, held back by the motion gate
    lightning: int = 0  # of those, because the whole picture changed at once
    # Replaced by a newer one, too early, too old, unchanged, read while the camera was off, or in a folder before.
    skipped: int = 0
    unreadable: int = 0  # pictures that could not be decoded
    reopened: int = 0  # times that a camera stalled, ended or could not be opened, or that files failed


class NewestFrame:
    """A slot for one frame. A new frame replaces one that was not taken, which counts as skipped.

    With an interval, a frame that was captured before the next one is due is skipped too, so its pixels need not even
    be converted: see `is_due`. On average there is one frame per interval.
    """

    def __init__(self, counters: Counters, interval_s: float = 0.0, not_before: float = -inf) -> None:
        """not_before: of the first frame's capture, time.monotonic()."""
        self._counters, self._interval_s = counters, interval_s
        self._due, self._due_before, self._quiet_until = not_before, not_before, -inf
        self._frame: Frame | None = None
        self._closed = False
        self._changed = threading.Condition()

    @property
    def due(self) -> float:
        """When the next frame is due, time.monotonic()."""
        return self._due

    def is_due(self, captured: float) -> bool:
        """Whether a frame of this time is wanted. If not, it counts as skipped."""
        with self._changed:
            is_due = captured >= self._due
            self._counters.skipped += not is_due
            return is_due

    def put(self, frame: Frame) -> bool:
        """Never blocks. False: the frame is too early, and counts as skipped."""
        with self._changed:
            if frame.captured < self._due:
                self._counters.skipped += 1
                return False
            self._counters.skipped += self._frame is not None
            self._frame = frame
            self._changed.notify()
            return True

    def quiet_until(self, until: float) -> None:
        """The source works, and its next frame cannot come before this time."""
        with self._changed:
            self._quiet_until = until
            self._changed.notify()

    def take(self, timeout: float, stop: threading.Event) -> Frame | None:
        """Waits for the newest frame until `timeout` after it could have come. None then, and after a close or stop."""
        started = time.monotonic()
        with self._changed:
            while not (self._frame or self._closed or stop.is_set()):
                left = max(started, self._due, self._quiet_until) + timeout - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, POLL_S))
            frame, self._frame = self._frame, None
            if frame:
                # On a grid, so that a source whose frames do not fit the interval has the right rate on average.
                self._due_before = self._due
                self._due += self._interval_s
                if self._due <= frame.captured:
                    self._due = frame.captured + self._interval_s
            return frame

    def give_up(self) -> None:
        """The frame that was just taken is of no use: the next one is due at once."""
        with self._changed:
            self._due = self._due_before

    def close(self) -> None:
        """Ends all waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
