"""Live cameras and streams, read by a thread of their own, since a driver or a network may block.

What reads depends on the source: OpenCV (devices, RTSP and other streams) by video_capture.py, http_pictures.py,
child.py.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf
from typing import Protocol

from edge_runtime.capture.child import ChildPictures
from edge_runtime.capture.frame import CameraError, Counters, Frame, NewestFrame, stalled
from edge_runtime.capture.http_pictures import HttpPictures
from edge_runtime.capture.video_capture import VideoCapture
from edge_runtime.config import CameraConfig
from edge_runtime.config.camera_source import HTTP, kind_of, scheme_of
from edge_runtime.errors import AiflowError
from edge_runtime.logs import is_told
from edge_runtime.picture_checks import PictureError, decode_picture
from edge_runtime.shutdown import DriverThread, threads_in_driver

logger = logging.getLogger(__name__)

# What reads a source bounds each of its waits, and knows best what is wrong. These are for what has no bound, such as
# the look-up of a name, and an answer that comes byte by byte.
FIRST_FRAME_S = 30.0  # besides stall_s
GRACE_S = 5.0  # after stall_s
LEAVE_S = 2.0  # for the last try to end, which may have to kill a process
GAP_FACTOR, GAP_S = 3.0, 0.5  # a read is long if it takes GAP_FACTOR usual intervals and GAP_S more
OPENING_FRAMES = 3  # that FFmpeg may read while it opens a stream whose frames carry no time of arrival


class Capture(Protocol):
    """One try to read a live source."""

    def run(self, slot: NewestFrame, abandoned: threading.Event) -> bool:
        """Puts frames until the source ends or `abandoned` is set. False: OpenCV can read this source, and not this.

        Raises CameraError with the reason.
        """

    def hang_up(self) -> None:
        """On any thread, after `abandoned` is set: ends what `run` waits for, if it can."""


def decoded(frame: Frame) -> Frame:
    """With the pixels of its picture. Raises PictureError."""
    return replace(frame, pixels=decode_picture(frame.encoded))


def live_frames(
    camera: CameraConfig,
    stop: threading.Event,
    counters: Counters,
    not_before: float = -inf,
    decode: Callable[[Frame], Frame] = decoded,
) -> Iterator[Frame]:
    """Frames of a live camera or stream, always the newest one. Raises CameraError when no new frame comes.

    Only frames that are due are converted or decoded. not_before: of the first frame's capture, time.monotonic().
    decode: a frame that arrived as a picture; may raise PictureError.

    A thread of its own captures, and ends when this does, unless the kernel keeps a process that it has killed. While
    it does, no further thread is started.
    """
    name = f"capture-{camera.name}"
    for last in [thread for thread in threads_in_driver() if thread.name == name]:
        last.join(LEAVE_S)  # it may be about to end
        if last.is_alive():
            raise CameraError("the last try to read from it still hangs")
    slot, abandoned, errors = NewestFrame(counters, camera.min_interval_s, not_before), threading.Event(), list[str]()
    capture = _capture_of(camera, counters)
    DriverThread(target=_capture, args=(capture, camera, slot, abandoned, errors, counters), name=name).start()
    patience_s, problem = FIRST_FRAME_S + camera.stall_s, "is open, but shows nothing"
    unreadable_since = 0.0  # 0: the last picture could be decoded
    try:
        while (frame := slot.take(patience_s, stop)) is not None:
            patience_s, problem = camera.stall_s + GRACE_S, str(stalled(camera.stall_s))
            if frame.encoded:
                try:
                    frame = decode(frame)
                except PictureError as error:
                    counters.unreadable += 1
                    if is_told(counters.unreadable):
                        logger.warning("picture unreadable camera=%s error=%s", camera.name, error)
                    if frame.captured - (unreadable_since := unreadable_since or frame.captured) > camera.stall_s:
                        raise CameraError(f"sends only pictures that cannot be decoded: {error}") from error
                    slot.give_up()
                    continue
                unreadable_since = 0.0
            yield frame
            del frame  # see Frame
    finally:
        abandoned.set()
        capture.hang_up()
    if not stop.is_set():
        raise CameraError(errors[0] if errors else problem)


def _capture_of(camera: CameraConfig, counters: Counters) -> Capture:
    kind = kind_of(camera.source)
    if kind in ("rpicam", "nvargus"):
        return ChildPictures(camera)
    if kind == "address" and scheme_of(camera.source) in HTTP:
        return HttpPictures(camera, counters)
    return OpenCv(camera, counters)


def _capture(
    capture: Capture,
    camera: CameraConfig,
    slot: NewestFrame,
    abandoned: threading.Event,
    errors: list[str],
    counters: Counters,
) -> None:
    """Runs one try to its end. Adds what failed to errors."""
    try:
        if not capture.run(slot, abandoned) and not abandoned.is_set():
            OpenCv(camera, counters).run(slot, abandoned)
    except AiflowError as error:
        errors.append(str(error))
    except Exception as error:  # whatever a driver or codec raises ends this try, and not the board
        errors.append(f"{type(error).__name__}: {error}")
    finally:
        slot.close()


class OpenCv:
    """A device, or a stream that FFmpeg can read."""

    def __init__(self, camera: CameraConfig, counters: Counters) -> None:
        self._camera, self._counters = camera, counters

    def hang_up(self) -> None:
        """Nothing to do: `run` looks at `abandoned` often."""

    def run(self, slot: NewestFrame, abandoned: threading.Event) -> bool:
        camera = self._camera
        with VideoCapture(camera, abandoned) as capture:
            arrivals = ArrivalTimes(capture.opened_at, camera.key_frames)
            while (read := capture.grab()) is not None:
                # After a read timeout, FFmpeg returns the frames that the decoder has kept since before the stream went
                # silent.
                if read.ended - read.started >= camera.stall_s:
                    break
                captured = arrivals.next(read.started, read.ended, read.age_s)
                if captured is None:
                    self._counters.skipped += 1
                    continue
                if not slot.is_due(captured):  # converting it would take longer than receiving it
                    continue
                pixels = capture.retrieve()
                if pixels is None:
                    break
                slot.put(Frame(camera.name, pixels, time.time() - (time.monotonic() - captured), captured))
                del pixels  # see Frame
        return True


class ArrivalTimes:
    """When the data of a stream's frames arrived. Decoders return frames later: by a few frames, or after a gap."""

    def __init__(self, opened: float, key_frames: bool = False) -> None:
        """opened: when the opening of the stream began; all times in seconds. key_frames: only they are decoded; then
        OpenCV has the time of a later packet for the first one.
        """
        self._opened, self._number, self._key_frames = opened, 0, key_frames
        self._usual_s = 0.0  # of a read, lately
        self._fresh_from = -inf

    def next(self, started: float, now: float, age_s: float | None) -> float | None:
        """For the next frame, whose read took from `started` to `now`. age_s: of its data, None if unknown.

        Never later than the arrival. None if the frame may be from before a gap, but with the time of its end: in some
        formats a frame is complete only when the next one starts.
        """
        self._number += 1
        if age_s is None or (self._key_frames and self._number == 1):  # read while the stream was opened, or just now
            age_s = now - self._opened if self._number <= OPENING_FRAMES else 0.0
        read_s = now - started
        if self._number > OPENING_FRAMES and read_s > GAP_FACTOR * self._usual_s + GAP_S:
            self._fresh_from = now
        self._usual_s = max(0.9 * self._usual_s, read_s)
        return now - age_s if now - age_s > self._fresh_from else None
