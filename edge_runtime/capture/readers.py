"""Reads frames from one source, once: picture files, a video file, a live camera or stream, pictures over MQTT.

A reader is a generator. It ends when its source has ended or `stop` is set, and raises an error when the source fails.
A live source keeps only its newest frame: a slow board skips frames instead of queueing them.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edge_runtime.capture.diagnosis import DIAGNOSIS_S, why_not_opened
from edge_runtime.capture.picture_checks import PictureError, decode_picture
from edge_runtime.capture.picture_files import SUFFIXES, read_pictures
from edge_runtime.config import CameraConfig
from edge_runtime.errors import AiflowError
from edge_runtime.logs import is_told, printable
from edge_runtime.shutdown import DriverThread, threads_in_driver

logger = logging.getLogger(__name__)

MAX_MQTT_PIXELS = 16_000_000  # of a picture over MQTT: anybody who may publish there sends it
# OpenCV reads these when it opens its first stream; what the user has set stays. FFmpeg is silent, since why_not_opened
# finds the reason. Without IS_THREAD_SAFE, a camera that hangs while it is opened blocks the opening of all others.
# The options are OpenCV's default, and that packets carry the time of their arrival, which `_age_s` reads.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET
os.environ.setdefault("OPENCV_FFMPEG_IS_THREAD_SAFE", "1")
os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_flags;prefer_tcp|use_wallclock_as_timestamps;1")
_set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # its name to OpenCV 4, and in 5
_set_log_level(1)  # fatal errors only

OPEN_TIMEOUT_S = 5.0  # OpenCV's default is 30 s. The timeout of a read is the camera's stall_s.
POLL_S = 0.5  # a thread that waits for a frame checks its stop event this often
GAP_FACTOR, GAP_S = 3.0, 0.5  # a read is long if it takes GAP_FACTOR usual intervals and GAP_S more
OPENING_FRAMES = 3  # that FFmpeg may read while it opens a stream whose frames carry no time of arrival
MAX_AGE_S = 3600.0  # a time before this is no time of arrival
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")
SCHEMES = ("http", "https", "mms", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp")


class CameraError(AiflowError, ValueError):
    """A camera cannot be opened, has ended or stalls. It will be opened again."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture of one camera."""

    camera: str
    pixels: np.ndarray  # uint8 RGB [H, W, 3]
    captured_unix: float  # seconds, wall clock: for people
    captured: float  # seconds, time.monotonic(): for ages and deadlines; of a stream, when its data arrived
    name: str = ""  # of the file it comes from
    encoded: bytes = b""  # the picture as it arrived, if it arrived as a picture


@dataclass(slots=True)
class Counters:
    """What happened to frames before they were used."""

    frames: int = 0  # read
    still: int = 0  # of these, held back by the motion gate
    lightning: int = 0  # of those, because the whole picture changed at once
    skipped: int = 0  # replaced by a newer one, too early, too old, or read while the camera was off
    unreadable: int = 0  # pictures that could not be decoded
    reopened: int = 0  # times that a camera stalled, ended or could not be opened, or that files failed


class NewestFrame:
    """A slot for one frame. A new frame replaces one that was not taken, which counts as skipped."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._frame: Frame | None = None
        self._closed = False
        self._changed = threading.Condition()

    def put(self, frame: Frame) -> None:
        """Never blocks."""
        with self._changed:
            self._counters.skipped += self._frame is not None
            self._frame = frame
            self._changed.notify()

    def take(self, timeout: float, stop: threading.Event) -> Frame | None:
        """Waits for the newest frame. None after the timeout, and when the slot was closed or `stop` is set."""
        until = time.monotonic() + timeout
        with self._changed:
            while not (self._frame or self._closed or stop.is_set()) and (left := until - time.monotonic()) > 0:
                self._changed.wait(min(left, POLL_S))
            frame, self._frame = self._frame, None
            return frame

    def close(self) -> None:
        """Ends all waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def reader_of(camera: CameraConfig) -> Callable[[CameraConfig, threading.Event, Counters], Iterator[Frame]]:
    """The reader for a camera's source, but for "mqtt". A source that is no address and no device is a file."""
    if "://" in camera.source or camera.source.startswith("/dev/"):
        return live_frames
    return video_frames if camera.source.lower().endswith(VIDEO_SUFFIXES) else file_frames


def file_frames(camera: CameraConfig, stop: threading.Event, counters: Counters) -> Iterator[Frame]:
    """The pictures of a directory, a tar or a single file, in order. Unreadable pictures are logged and left out.

    Raises PictureError if the source holds no picture.
    """
    while not stop.is_set():
        for picture in read_pictures(Path(camera.source)):
            started = time.monotonic()
            try:
                pixels = decode_picture(picture.data)
            except PictureError as error:
                counters.unreadable += 1
                name = printable(picture.name)
                logger.warning("picture unreadable camera=%s name=%s error=%s", camera.name, name, error)
            else:
                yield Frame(camera.name, pixels, time.time(), time.monotonic(), picture.name, picture.data)
            if stop.wait(max(0.0, camera.min_interval_s - (time.monotonic() - started))):
                return
        if not camera.repeat:
            return


def video_frames(camera: CameraConfig, stop: threading.Event, counters: Counters) -> Iterator[Frame]:
    """Frames of a video file, one per interval of the video's own time. Ends with the file unless `repeat` is set.

    Raises PictureError if no frame of the file can be decoded.
    """
    while not stop.is_set():
        capture = _open_video(camera)
        rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        stride = max(1, round(rate * camera.min_interval_s))
        number, more = 0, True
        while more and not stop.is_set():
            if number % stride == 0:
                started = time.monotonic()
                ok, pixels = capture.retrieve()
                if ok:
                    rgb = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
                    yield Frame(camera.name, rgb, time.time(), started, f"{Path(camera.source).name}#{number}")
                else:
                    counters.unreadable += 1
                stop.wait(max(0.0, camera.min_interval_s - (time.monotonic() - started)))
            number, more = number + 1, capture.grab()
        capture.release()
        if not camera.repeat:
            return


def live_frames(camera: CameraConfig, stop: threading.Event, counters: Counters) -> Iterator[Frame]:
    """Frames of a live camera or stream, always the newest one. Raises CameraError when no new frame comes.

    A thread of its own captures, since OpenCV's read can block. If the camera stalls, this thread is left to its read
    timeout, and the next try starts a new one. While a driver blocks for ever, no further thread is started.
    """
    name = f"capture-{camera.name}"
    for last in [thread for thread in threads_in_driver() if thread.name == name]:
        last.join(POLL_S)  # it may be about to end
        if last.is_alive():
            raise CameraError("the last try to read from it still hangs in the driver")
    slot, abandoned, errors = NewestFrame(counters), threading.Event(), list[str]()
    DriverThread(target=_capture, args=(camera, slot, abandoned, errors, counters), name=name).start()
    patience_s, problem = OPEN_TIMEOUT_S + DIAGNOSIS_S + camera.stall_s, "is open, but shows nothing"
    try:
        while (frame := slot.take(patience_s, stop)) is not None:
            patience_s, problem = camera.stall_s, f"has ended, or shows no new frame for {camera.stall_s:g} s"
            yield frame
            stop.wait(max(0.0, camera.min_interval_s - (time.monotonic() - frame.captured)))
    finally:
        abandoned.set()
    if not stop.is_set():
        raise CameraError(errors[0] if errors else problem)


def _capture(
    camera: CameraConfig, slot: NewestFrame, abandoned: threading.Event, errors: list[str], counters: Counters
) -> None:
    """Puts frames into the slot until the camera ends, stalls or is abandoned. Adds what failed to errors."""
    capture, arrivals = None, ArrivalTimes(time.monotonic())
    try:
        capture = _open(camera)
        while not abandoned.is_set():
            started = time.monotonic()
            ok, pixels = capture.read()
            now = time.monotonic()
            # After a timeout or unplugging some drivers report success without a picture. After a read timeout, FFmpeg
            # returns the frames that the decoder has kept since before the stream went silent.
            if not ok or pixels is None or pixels.ndim != 3 or now - started >= camera.stall_s:
                break
            captured = arrivals.next(started, now, _age_s(capture))
            if captured is None:
                counters.skipped += 1
                continue
            rgb = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
            slot.put(Frame(camera.name, rgb, time.time() - (now - captured), captured))
    except CameraError as error:
        errors.append(str(error))
    except Exception as error:  # whatever a driver or codec raises ends this try, and not the board
        errors.append(f"{type(error).__name__}: {error}")
    finally:
        slot.close()
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


def _open(camera: CameraConfig) -> Any:
    """A cv2.VideoCapture with bounded waits. Raises CameraError with the reason."""
    if camera.source.startswith("/dev/"):
        capture = cv2.VideoCapture(camera.source, cv2.CAP_V4L2)
    else:
        open_ms, read_ms = int(1e3 * OPEN_TIMEOUT_S), int(1e3 * camera.stall_s)
        timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, open_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, read_ms]
        capture = cv2.VideoCapture(camera.source, cv2.CAP_FFMPEG, timeouts)
    if capture.isOpened():
        return capture
    capture.release()
    raise CameraError(f"cannot be opened: {why_not_opened(camera.source)}")


def _open_video(camera: CameraConfig) -> Any:
    """A cv2.VideoCapture with its first frame grabbed. Raises PictureError."""
    try:
        capture = _open(camera)
    except CameraError as error:
        raise PictureError(f"{camera.source} {error}") from error
    if not capture.grab():
        raise PictureError(f"{camera.source} has no frame that can be decoded: is it a complete video?")
    return capture


class MqttPictures:
    """Pictures that camera software publishes for one camera. The newest one wins."""

    def __init__(self, camera: CameraConfig, counters: Counters) -> None:
        self._camera, self._counters, self._slot = camera, counters, NewestFrame(counters)

    def put(self, data: bytes) -> None:
        """One encoded picture, on the MQTT client's thread. It is decoded later, on the camera's thread."""
        self._slot.put(Frame(self._camera.name, np.empty((0, 0, 3), np.uint8), time.time(), time.monotonic(), "", data))

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


def check_source(camera: CameraConfig) -> tuple[str, str]:
    """Looks at a source once, on this thread. Returns an error and a warning, "" for none.

    The error is what can never work: an unknown scheme, a file that is no picture, video or tar. The warning is what
    may pass by itself: a path that does not exist yet or cannot be read, a directory without a picture. Does not
    contact streams.
    """
    scheme, separator, _ = camera.source.partition("://")
    if separator and scheme.lower() not in SCHEMES:
        known = f"want one of {', '.join(SCHEMES)}, or the path of a file"
        return f"{scheme[:32]}:// is an unknown kind of stream: {known}", ""
    if separator or camera.source == "mqtt":
        return "", ""
    path, reader = Path(camera.source), reader_of(camera)
    try:
        if path.is_file():
            path.open("rb").close()
        path.stat()
        if reader is video_frames:
            _open_video(camera).release()
        elif reader is file_frames:
            first = next(read_pictures(path))
            if path.suffix.lower() in SUFFIXES and path.is_file():
                decode_picture(first.data)
    except FileNotFoundError:
        return "", f"{path} does not exist yet"
    except OSError as error:
        return "", f"{path} cannot be read: {error.strerror}"
    except PictureError as error:
        return (str(error), "") if path.is_file() else ("", str(error))
    return "", ""
