"""Live cameras and streams, read by a thread of their own, since a driver or a network may block.

What reads depends on the source: OpenCV (devices, RTSP and other streams), http_pictures.py, child.py.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from math import inf
from typing import Any, Protocol

import cv2

from edge_runtime.camera_source import HTTP, kind_of, scheme_of
from edge_runtime.capture.child import ChildPictures
from edge_runtime.capture.diagnosis import DIAGNOSIS_S, why_not_opened
from edge_runtime.capture.frame import POLL_S, CameraError, Counters, Frame, NewestFrame, stalled
from edge_runtime.capture.http_pictures import HttpPictures
from edge_runtime.capture.login import login_of, with_login
from edge_runtime.capture.picture_checks import PictureError, decode_picture
from edge_runtime.config import CameraConfig
from edge_runtime.errors import AiflowError
from edge_runtime.logs import is_told
from edge_runtime.shutdown import DriverThread, threads_in_driver

logger = logging.getLogger(__name__)

# OpenCV reads these when it opens its first stream; what the user has set stays. FFmpeg is silent, since why_not_opened
# finds the reason. Without IS_THREAD_SAFE, a camera that hangs while it is opened blocks the opening of all others.
# The options are OpenCV's default, and that packets carry the time of their arrival, which `_age_s` reads.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET
os.environ.setdefault("OPENCV_FFMPEG_IS_THREAD_SAFE", "1")
os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_flags;prefer_tcp|use_wallclock_as_timestamps;1")
_set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # its name to OpenCV 4, and in 5
_set_log_level(1)  # fatal errors only

OPEN_TIMEOUT_S = 5.0  # OpenCV's default is 30 s. The timeout of a read is the camera's stall_s.
GAP_FACTOR, GAP_S = 3.0, 0.5  # a read is long if it takes GAP_FACTOR usual intervals and GAP_S more
OPENING_FRAMES = 3  # that FFmpeg may read while it opens a stream whose frames carry no time of arrival
MAX_AGE_S = 3600.0  # a time before this is no time of arrival
GRACE_S = 0.5  # after stall_s: what reads notices a stall itself, and knows the reason better


class Capture(Protocol):
    """One try to read a live source."""

    def run(self, slot: NewestFrame, abandoned: threading.Event) -> bool:
        """Puts frames until the source ends or `abandoned` is set. False: OpenCV can read this source, and not this.

        Raises CameraError with the reason.
        """

    def hang_up(self) -> None:
        """On any thread, after `abandoned` is set: ends what `run` waits for, if it can."""


def live_frames(
    camera: CameraConfig, stop: threading.Event, counters: Counters, not_before: float = -inf
) -> Iterator[Frame]:
    """Frames of a live camera or stream, always the newest one. Raises CameraError when no new frame comes.

    Only frames that are due are converted or decoded. not_before: of the first frame's capture, time.monotonic().

    A thread of its own captures. If the camera stalls, this thread is left to its read timeout, and the next try starts
    a new one. While a driver blocks for ever, no further thread is started.
    """
    name = f"capture-{camera.name}"
    for last in [thread for thread in threads_in_driver() if thread.name == name]:
        last.join(POLL_S)  # it may be about to end
        if last.is_alive():
            raise CameraError("the last try to read from it still hangs in the driver")
    slot, abandoned, errors = NewestFrame(counters, camera.min_interval_s, not_before), threading.Event(), list[str]()
    capture = _capture_of(camera, counters)
    DriverThread(target=_capture, args=(capture, camera, slot, abandoned, errors, counters), name=name).start()
    patience_s, problem = OPEN_TIMEOUT_S + DIAGNOSIS_S + camera.stall_s, "is open, but shows nothing"
    unreadable_since = 0.0  # 0: the last picture could be decoded
    try:
        while (frame := slot.take(patience_s, stop)) is not None:
            patience_s, problem = camera.stall_s + GRACE_S, str(stalled(camera.stall_s))
            if frame.encoded:
                try:
                    frame = replace(frame, pixels=decode_picture(frame.encoded))
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
        """Nothing ends a read of OpenCV before its timeout."""

    def run(self, slot: NewestFrame, abandoned: threading.Event) -> bool:
        camera, capture, arrivals = self._camera, None, ArrivalTimes(time.monotonic())
        try:
            capture = open_capture(camera)
            while not abandoned.is_set():
                started = time.monotonic()
                ok = capture.grab()
                now = time.monotonic()
                # After a read timeout, FFmpeg returns the frames that the decoder has kept since before the stream went
                # silent.
                if not ok or now - started >= camera.stall_s:
                    return True
                captured = arrivals.next(started, now, _age_s(capture))
                if captured is None:
                    self._counters.skipped += 1
                    continue
                if not slot.is_due(captured):  # converting it would take longer than receiving it
                    continue
                ok, pixels = capture.retrieve()
                # After a timeout or unplugging some drivers report success without a picture.
                if not ok or pixels is None or pixels.ndim != 3:
                    return True
                rgb = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
                slot.put(Frame(camera.name, rgb, time.time() - (now - captured), captured))
            return True
        finally:
            if capture is not None:
                capture.release()


class ArrivalTimes:
    """When the data of a stream's frames arrived. Decoders return frames later: by a few frames, or after a gap."""

    def __init__(self, opened: float) -> None:
        """opened: when the opening of the stream began; all times in seconds."""
        self._opened, self._number = opened, 0
        self._usual_s = 0.0  # of a read, lately
        self._fresh_from = -inf

    def next(self, started: float, now: float, age_s: float | None) -> float | None:
        """For the next frame, whose read took from `started` to `now`. age_s: of its data, None if unknown.

        Never later than the arrival. None if the frame may be from before a gap, but with the time of its end: in some
        formats a frame is complete only when the next one starts.
        """
        self._number += 1
        if age_s is None:  # read while the stream was opened, or just now
            age_s = now - self._opened if self._number <= OPENING_FRAMES else 0.0
        read_s = now - started
        if self._number > OPENING_FRAMES and read_s > GAP_FACTOR * self._usual_s + GAP_S:
            self._fresh_from = now
        self._usual_s = max(0.9 * self._usual_s, read_s)
        return now - age_s if now - age_s > self._fresh_from else None


def _age_s(capture: Any) -> float | None:
    """Seconds since the data of the last frame arrived, to about a frame's interval. None if OpenCV cannot tell.

    CAP_PROP_PTS is the packet's time of arrival (see OPENCV_FFMPEG_CAPTURE_OPTIONS above) in units of 1 / fps, with
    FFmpeg and since OpenCV 4.12. MJPEG has none, but its decoder keeps no frames.
    """
    frames_per_s = capture.get(cv2.CAP_PROP_FPS)
    pts = capture.get(getattr(cv2, "CAP_PROP_PTS", -1))
    age_s = time.time() - pts / frames_per_s if frames_per_s > 0 else inf
    return max(0.0, age_s) if -1 < age_s < MAX_AGE_S else None


def open_capture(camera: CameraConfig) -> Any:
    """A cv2.VideoCapture of a device, a stream or a video file, with bounded waits. Raises CameraError with the reason.

    Raises ConfigError if the password's file cannot be used.
    """
    source = with_login(camera.source, login_of(camera))
    if source.startswith("/dev/"):
        capture = cv2.VideoCapture(source, cv2.CAP_V4L2)
    else:
        open_ms, read_ms = int(1e3 * OPEN_TIMEOUT_S), int(1e3 * camera.stall_s)
        timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, open_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, read_ms]
        capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, timeouts)
    if capture.isOpened():
        return capture
    capture.release()
    raise CameraError(f"cannot be opened: {why_not_opened(source)}")
