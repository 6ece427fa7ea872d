"""Where frames come from: files, a video, a camera or stream through OpenCV, pictures that arrive over MQTT.

Newest wins: a live source keeps one frame, and a slow board skips rather than queues. A camera that stalls, ends or
cannot be opened is opened again, for ever, with a growing pause; files are read once, at the given interval.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edge_runtime.config import CameraConfig
from edge_runtime.pictures import read_pictures
from edge_runtime.preprocess import PictureError, decode_picture

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 5.0  # OpenCV's own default is 30, and for a read too: there it is the camera's stall_s
MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0  # before a camera is opened again
LOOK_S = 0.5  # how often who waits for a frame looks whether to stop
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture of one camera."""

    camera: str
    pixels: np.ndarray  # uint8 RGB [H, W, 3]
    captured_unix: float  # seconds, wall clock: for people
    captured: float  # seconds, time.monotonic(): for ages and deadlines
    name: str = ""  # of the file it comes from
    encoded: bytes = b""  # as it arrived, where it arrived as a picture


@dataclass(slots=True)
class Counters:
    """What happened to frames before anybody looked at them."""

    skipped: int = 0  # replaced by a newer one
    unreadable: int = 0  # pictures that could not be decoded
    reopened: int = 0  # cameras that stalled or ended


class Newest:
    """A slot for one frame: a put replaces what was not taken, and counts it as skipped."""

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
        """The newest frame; None when none came in time, the slot was closed or `stop` is set."""
        until = time.monotonic() + timeout
        with self._changed:
            while not (self._frame or self._closed or stop.is_set()) and (left := until - time.monotonic()) > 0:
                self._changed.wait(min(left, LOOK_S))
            frame, self._frame = self._frame, None
            return frame

    def close(self) -> None:
        """Wakes whoever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def file_frames(camera: CameraConfig, stop: threading.Event, counters: Counters) -> Iterator[Frame]:
    """Pictures of a directory, tar or file, in order; one that cannot be read is reported and left out.

    Raises PictureError where the source holds none.
    """
    while not stop.is_set():
        for picture in read_pictures(Path(camera.source)):
            started = time.monotonic()
            try:
                pixels = decode_picture(picture.data)
            except PictureError as error:
                counters.unreadable += 1
                logger.warning("picture unreadable camera=%s name=%s error=%s", camera.name, picture.name, error)
            else:
                yield Frame(camera.name, pixels, time.time(), time.monotonic(), picture.name, picture.data)
            if stop.wait(max(0.0, camera.interval_s - (time.monotonic() - started))):
                return
        if not camera.repeat:
            return


def video_frames(camera: CameraConfig, stop: threading.Event, counters: Counters) -> Iterator[Frame]:
    """A video file at the camera's interval in the video's own time; ends with the file unless `repeat`.

    Raises PictureError for a file without a frame that can be decoded.
    """
    while not stop.is_set():
        capture = _open(camera)
        if capture is None or not capture.grab():
            raise PictureError(f"{camera.source} cannot be read as a video: is the path right and the codec known?")
        rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        stride = max(1, round(rate * camera.interval_s))
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
                stop.wait(max(0.0, camera.interval_s - (time.monotonic() - started)))
            number, more = number + 1, capture.grab()
        capture.release()
        if not camera.repeat:
            return


def camera_frames(camera: CameraConfig, stop: threading.Event, counters: Counters) -> Iterator[Frame]:
    """A live camera or stream, newest frame first, opened again whenever it stalls or ends.

    Capturing has a thread of its own, since OpenCV's read can block; the thread of a stalled camera is left to end by
    its own read timeout, and another one takes over.
    """
    pause = MIN_PAUSE_S
    while not stop.is_set():
        slot, abandoned = Newest(counters), threading.Event()
        reader = threading.Thread(
            target=_capture, args=(camera, slot, abandoned), name=f"capture-{camera.name}", daemon=True
        )
        reader.start()
        patience = OPEN_TIMEOUT_S + camera.stall_s  # opening may take its time before a frame can be missed
        while (frame := slot.take(patience, stop)) is not None:
            patience, pause = camera.stall_s, MIN_PAUSE_S
            yield frame
            stop.wait(max(0.0, camera.interval_s - (time.monotonic() - frame.captured)))
        abandoned.set()
        if not stop.is_set():
            counters.reopened += 1
            logger.warning("camera stalled camera=%s reopen_in_s=%.0f", camera.name, pause)
            stop.wait(pause)
            pause = min(MAX_PAUSE_S, pause * 2)


def _capture(camera: CameraConfig, slot: Newest, abandoned: threading.Event) -> None:
    capture = _open(camera)
    try:
        while capture is not None and not abandoned.is_set():
            ok, pixels = capture.read()
            # Some drivers say ok after a timeout or unplugging: trust the array, not the flag.
            if not ok or pixels is None or pixels.ndim != 3:
                break
            rgb = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
            slot.put(Frame(camera.name, rgb, time.time(), time.monotonic()))
    finally:
        slot.close()
        if capture is not None:
            capture.release()


def _open(camera: CameraConfig) -> Any:
    """A cv2.VideoCapture with bounded waits, or None."""
    if camera.source.startswith("/dev/"):
        capture = cv2.VideoCapture(camera.source, cv2.CAP_V4L2)
    else:
        open_ms, read_ms = int(1e3 * OPEN_TIMEOUT_S), int(1e3 * camera.stall_s)
        timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, open_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, read_ms]
        capture = cv2.VideoCapture(camera.source, cv2.CAP_FFMPEG, timeouts)
    if capture.isOpened():
        return capture
    capture.release()
    return None


class ArrivingFrames:
    """Pictures that camera software publishes on the board's `down/frame` topic; newest wins."""

    def __init__(self, camera: CameraConfig, counters: Counters) -> None:
        self._camera, self._counters, self._slot = camera, counters, Newest(counters)

    def arrived(self, data: bytes) -> None:
        """One encoded picture, on the MQTT client's thread: decoded later, by whoever takes it."""
        self._slot.put(Frame(self._camera.name, np.empty((0, 0, 3), np.uint8), time.time(), time.monotonic(), "", data))

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Decoded frames until `stop`."""
        while not stop.is_set():
            frame = self._slot.take(inf, stop)
            if frame is None:
                continue
            try:
                pixels = decode_picture(frame.encoded)
            except PictureError as error:
                self._counters.unreadable += 1
                logger.warning("picture unreadable camera=%s error=%s", frame.camera, error)
                continue
            yield Frame(frame.camera, pixels, frame.captured_unix, frame.captured, "", frame.encoded)


def frames_of(camera: CameraConfig) -> Callable[[CameraConfig, threading.Event, Counters], Iterator[Frame]]:
    """The reader for a camera's source: what is no address and no device is a file, and must be there."""
    if "://" in camera.source or camera.source.startswith("/dev/"):
        return camera_frames
    return video_frames if camera.source.lower().endswith(VIDEO_SUFFIXES) else file_frames


def merged_frames(
    cameras: Sequence[CameraConfig], arriving: dict[str, ArrivingFrames], stop: threading.Event, counters: Counters
) -> Iterator[Frame]:
    """Frames of all cameras as they come, until every source has ended or `stop` is set.

    One thread a camera. It looks for its next frame only when its last one has been handled: nothing queues, and a
    slow board gets the newest frame. What a source raises is raised here.
    """
    handover: queue.SimpleQueue[tuple[Frame | Exception | None, threading.Event]] = queue.SimpleQueue()

    def read(camera: CameraConfig) -> None:
        handled = threading.Event()
        try:
            source = arriving.get(camera.name)
            for frame in source.frames(stop) if source else frames_of(camera)(camera, stop, counters):
                handover.put((frame, handled))
                while not handled.wait(LOOK_S) and not stop.is_set():
                    pass
                handled.clear()
            handover.put((None, handled))
        except Exception as error:  # told to whoever handles frames: a source must not die in silence
            handover.put((error, handled))

    for camera in cameras:
        threading.Thread(target=read, args=(camera,), name=f"source-{camera.name}", daemon=True).start()
    running = len(cameras)
    while running and not stop.is_set():
        try:
            item, handled = handover.get(timeout=LOOK_S)
        except queue.Empty:
            continue
        if isinstance(item, Exception):
            raise item
        if item is None:
            running -= 1
        else:
            yield item
            handled.set()
