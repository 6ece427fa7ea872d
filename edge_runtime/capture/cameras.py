"""Where frames come from: files, a video, a camera or stream through OpenCV, pictures that arrive over MQTT.

Newest wins: a live source keeps one frame, and a slow board skips rather than queues. Files are read once, at the given
interval. A camera that stalls, ends or cannot be opened, and files that fail on the way, are opened again, for ever,
with a growing pause, while the other cameras go on; only a source that can never work ends the board, at its start.
"""

import logging
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from edge_runtime.capture.motion_gate import Gate, shrink
from edge_runtime.capture.picture_checks import PictureError, decode_picture
from edge_runtime.capture.picture_files import read_pictures
from edge_runtime.config import CameraConfig, ConfigError
from edge_runtime.errors import AiflowError
from edge_runtime.logs import is_told

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 5.0  # OpenCV's own default is 30, and for a read too: there it is the camera's stall_s
MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0  # before a camera is opened again
LOOK_S = 0.5  # how often who waits for a frame looks whether to stop
CLOSE_S = 2.0  # for the cameras' threads to end; one that hangs in a driver is left behind
MAX_WHY = 256  # characters; a codec may have a lot to say
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")
SCHEMES = ("http", "https", "mms", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp")

StateName = Literal["starting", "live", "stalled", "frozen", "lost", "ended", "off"]


class CameraError(AiflowError, ValueError):
    """A camera that cannot be opened, has ended or stalls; it is tried again."""


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

    frames: int = 0  # read
    still: int = 0  # of these, held back by the gate
    lightning: int = 0  # of those, because the whole picture changed at once
    skipped: int = 0  # replaced by a newer one, sooner than the interval, or while the camera was off
    unreadable: int = 0  # pictures that could not be decoded
    reopened: int = 0  # cameras that stalled, ended or could not be opened, and files that failed


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
            if stop.wait(max(0.0, camera.min_interval_s - (time.monotonic() - started))):
                return
        if not camera.repeat:
            return


def video_frames(camera: CameraConfig, stop: threading.Event, counters: Counters) -> Iterator[Frame]:
    """A video file at the camera's interval in the video's own time; ends with the file unless `repeat`.

    Raises PictureError for a file without a frame that can be decoded.
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


def camera_frames(camera: CameraConfig, stop: threading.Event, counters: Counters) -> Iterator[Frame]:
    """A live camera or stream, newest frame first, opened once. Raises CameraError when it shows no new frame.

    Capturing has a thread of its own, since OpenCV's read can block; the thread of a stalled camera is left to end by
    its own read timeout, and then another one takes over: a driver that hangs for ever has one thread, not one a try.
    """
    slot, abandoned, troubles = Newest(counters), threading.Event(), list[str]()
    name = f"capture-{camera.name}"
    for last in [thread for thread in threading.enumerate() if thread.name == name]:
        last.join(LOOK_S)  # it may just be on its way out
        if last.is_alive():
            raise CameraError("the driver of the last try hangs")
    threading.Thread(target=_capture, args=(camera, slot, abandoned, troubles), name=name, daemon=True).start()
    patience, trouble = OPEN_TIMEOUT_S + camera.stall_s, "cannot be opened, or shows nothing"
    try:
        while (frame := slot.take(patience, stop)) is not None:
            patience, trouble = camera.stall_s, f"has ended, or shows no new frame for {camera.stall_s:g} s"
            yield frame
            stop.wait(max(0.0, camera.min_interval_s - (time.monotonic() - frame.captured)))
    finally:
        abandoned.set()
    if not stop.is_set():
        raise CameraError(troubles[0] if troubles else trouble)


def _capture(camera: CameraConfig, slot: Newest, abandoned: threading.Event, troubles: list[str]) -> None:
    """Frames into the slot until there are none; what a driver or codec raised is told, and the board goes on."""
    capture = None
    try:
        capture = _open(camera)
        while capture is not None and not abandoned.is_set():
            ok, pixels = capture.read()
            # Some drivers say ok after a timeout or unplugging: trust the array, not the flag.
            if not ok or pixels is None or pixels.ndim != 3:
                break
            rgb = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
            slot.put(Frame(camera.name, rgb, time.time(), time.monotonic()))
    except Exception as error:
        troubles.append(f"{type(error).__name__}: {error}")
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


def _open_video(camera: CameraConfig) -> Any:
    """A cv2.VideoCapture with its first frame grabbed. Raises PictureError."""
    capture = _open(camera)
    if capture is None or not capture.grab():
        raise PictureError(f"{camera.source} cannot be read as a video: is the path right and the codec known?")
    return capture


class ArrivingFrames:
    """Pictures that camera software publishes on the board's `down/frame` topic; newest wins."""

    def __init__(self, camera: CameraConfig, counters: Counters) -> None:
        self._camera, self._counters, self._slot = camera, counters, Newest(counters)

    def arrived(self, data: bytes) -> None:
        """One encoded picture, on the MQTT client's thread: decoded later, by whoever takes it."""
        self._slot.put(Frame(self._camera.name, np.empty((0, 0, 3), np.uint8), time.time(), time.monotonic(), "", data))

    def forget(self) -> None:
        """Drops what waits: a camera that is switched on again must not show what it saw while it was off."""
        self._counters.skipped += self._slot.take(0, threading.Event()) is not None

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Decoded frames until `stop`, on average at most one an interval; those between are skipped, not delayed."""
        interval, due = self._camera.min_interval_s, -inf
        while not stop.is_set():
            frame = self._slot.take(inf, stop)
            if frame is None:
                continue
            # Half an interval early is in time: of a camera that sends at the interval, but unevenly, each counts.
            if frame.captured < due - interval / 2:
                self._counters.skipped += 1
                continue
            try:
                pixels = decode_picture(frame.encoded)
            except PictureError as error:
                self._counters.unreadable += 1
                if is_told(self._counters.unreadable):
                    logger.warning("picture unreadable camera=%s error=%s", frame.camera, error)
                continue
            due = max(due, frame.captured) + interval
            yield replace(frame, pixels=pixels)


def frames_of(camera: CameraConfig) -> Callable[[CameraConfig, threading.Event, Counters], Iterator[Frame]]:
    """The reader for a camera's source: what is no address and no device is a file, and must be there."""
    if "://" in camera.source or camera.source.startswith("/dev/"):
        return camera_frames
    return video_frames if camera.source.lower().endswith(VIDEO_SUFFIXES) else file_frames


def _fault(camera: CameraConfig) -> str:
    scheme, separator, _ = camera.source.partition("://")
    if separator:
        known = f"want one of {', '.join(SCHEMES)}; a file is named by its path"
        return "" if scheme.lower() in SCHEMES else f"{scheme[:32]}:// is no kind of stream that is known: {known}"
    try:
        reader = frames_of(camera)
        if camera.source != "mqtt" and reader is video_frames:
            _open_video(camera).release()
        elif camera.source != "mqtt" and reader is file_frames:
            next(read_pictures(Path(camera.source)))
    except (PictureError, OSError) as error:
        return str(error)
    return ""


@dataclass(frozen=True, slots=True)
class CameraState:
    """What a camera is doing."""

    state: StateName
    why: str  # of stalled, frozen and lost
    since_unix: float  # seconds, wall clock
    enabled: bool
    motion: bool  # the gate wants it
    counters: Counters


class Camera:
    """One camera at run time: opened again for ever, gated, switched on and off.

    starting: no frame yet; live; stalled: worked until now, is opened again; lost: the last try brought nothing, more
    follow; frozen: live, but always the same picture, which a reopening would not change; ended: files; off: switched.
    Of pictures over MQTT nobody knows when the next is due: they are never stalled. Switching a camera off closes it;
    files begin anew when they are switched on again.
    """

    def __init__(self, config: CameraConfig, on_change: Callable[[], None] = lambda: None) -> None:
        """on_change: called on any thread when it does something else. Raises ConfigError."""
        self.config, self.counters, self._on_change = config, Counters(), on_change
        try:
            self.gate = Gate(config.motion, config.max_interval_s)
        except ConfigError as error:
            raise ConfigError(f"camera {config.name}: {error}") from error
        self.arriving = ArrivingFrames(config, self.counters) if config.source == "mqtt" else None
        is_live = self.arriving is not None or frames_of(config) is camera_frames  # a file may well show one thing
        self._can_freeze = config.frozen_s > 0 and is_live
        self._state: tuple[StateName, str, float] = ("starting", "", time.time())
        self._enabled, self._paused, self._closed = True, False, False
        self._switched = threading.Condition()
        self._closing = threading.Event()  # ends what is open now
        self._handled = threading.Event()

    # ---- any thread ----

    @property
    def is_on(self) -> bool:
        """Neither switched off nor paused."""
        return self._enabled and not self._paused

    def state(self) -> CameraState:
        """A copy."""
        state, why, since_unix = self._state
        if state != "ended" and not self.is_on:
            state, why = "off", "switched off" if not self._enabled else "paused"
        return CameraState(state, why, since_unix, self._enabled, self.gate.enabled, replace(self.counters))

    def switch(self, *, enabled: bool | None = None, paused: bool | None = None, closed: bool = False) -> None:
        """Changes what is given. A camera that is off is closed, and its pictures are dropped."""
        with self._switched:
            was_on = self.is_on
            self._enabled = self._enabled if enabled is None else enabled
            self._paused = self._paused if paused is None else paused
            self._closed |= closed
            if self.is_on != was_on and self._state[0] != "ended":
                self._become("starting" if self.is_on else "off")
            if self._closed or not self.is_on:
                self._closing.set()
            self._switched.notify_all()
        if self.arriving and not self.is_on:
            self.arriving.forget()
        if closed:
            self._handled.set()

    def arrived(self, data: bytes) -> None:
        """A picture over MQTT, which may be for this camera."""
        if self.arriving and self.is_on:
            self.arriving.arrived(data)
        elif self.arriving:
            self.counters.skipped += 1

    def handled(self) -> None:
        """The frame that was handed over last is done with; the next one may come."""
        self._handled.set()

    # ---- the camera's own thread ----

    def hand_over(self, handover: "queue.SimpleQueue[tuple[Camera, Frame | None]]") -> None:
        """Puts one frame after the other, each when the last one has been handled, and None at the end."""
        try:
            for frame in self._frames():
                self._handled.clear()
                handover.put((self, frame))
                if not self._closed:
                    self._handled.wait()
        finally:
            handover.put((self, None))

    def _frames(self) -> Iterator[Frame]:
        """What passes the gate, until files end or the camera is closed for good."""
        pause = MIN_PAUSE_S
        while (closing := self._next_try()) is not None:
            trouble: StateName = "lost"
            try:
                for frame in self._opened(closing):
                    trouble, pause = "stalled", MIN_PAUSE_S
                    if self._passes(frame):
                        yield frame
                if not closing.is_set():
                    self._become("ended")
                    return
            except Exception as error:  # whatever a driver, a codec or a damaged file runs into: the others go on
                if not closing.is_set():
                    self._become(trouble, str(error)[:MAX_WHY])
                    self.counters.reopened += 1
                    # Never less than half: cameras behind one switch come back together, and a driver wants its time.
                    closing.wait(random.uniform(pause / 2, pause))
                    pause = min(MAX_PAUSE_S, pause * 2)

    def _next_try(self) -> threading.Event | None:
        """What will end it; None when the camera is closed for good. Waits while it is off."""
        with self._switched:
            self._switched.wait_for(lambda: self.is_on or self._closed)
            self._closing = threading.Event()
            return None if self._closed else self._closing

    def _opened(self, closing: threading.Event) -> Iterator[Frame]:
        if self.arriving:
            return self.arriving.frames(closing)
        return frames_of(self.config)(self.config, closing, self.counters)

    def _passes(self, frame: Frame) -> bool:
        passes = True
        if not (self._can_freeze or self.gate.enabled):
            self._become("live")
        else:
            look = self.gate.look(shrink(frame.pixels, self.config.motion.frame_height), frame.captured)
            if self._can_freeze and look.same_s >= self.config.frozen_s:
                kind = "of one colour " if look.flat else ""
                self._become("frozen", f"exactly the same picture {kind}for {self.config.frozen_s:g} s and more")
            else:
                self._become("live")
            passes = look.passes
            self.counters.still += not passes
            self.counters.lightning += look.why == "lightning"
        self.counters.frames += 1
        return passes

    def _become(self, state: StateName, why: str = "") -> None:
        """A fault that repeats is logged once: a camera that is away for a night must not fill the log."""
        if self._state[:2] != (state, why):
            level = logging.WARNING if why else logging.INFO  # only trouble has a reason
            logger.log(level, "camera %s camera=%s%s", state, self.config.name, f" reason={why}" if why else "")
            self._state = state, why, time.time()
            self._on_change()


class Cameras:
    """All cameras of a board."""

    def __init__(self, configs: Sequence[CameraConfig], on_change: Callable[[], None] = lambda: None) -> None:
        """Opens nothing yet. on_change: called on any thread when one does something else. Raises ConfigError."""
        self._cameras = {config.name: Camera(config, on_change) for config in configs}

    def __getitem__(self, name: str) -> Camera:
        return self._cameras[name]

    def __iter__(self) -> Iterator[Camera]:
        return iter(self._cameras.values())

    @property
    def wants_pictures(self) -> bool:
        """`down/frame` is to be subscribed to."""
        return any(camera.arriving for camera in self)

    def arrived(self, data: bytes) -> None:
        """A picture on `down/frame`; never blocks."""
        for camera in self:
            camera.arrived(data)

    def pause(self, paused: bool) -> None:
        """Closes all cameras until it is called with False."""
        for camera in self:
            camera.switch(paused=paused)

    def states(self) -> dict[str, CameraState]:
        """What each camera is doing, by name."""
        return {camera.config.name: camera.state() for camera in self}

    def totals(self) -> Counters:
        """The counters of all cameras together."""
        total: Counter[str] = Counter()
        for camera in self:
            total.update(asdict(camera.counters))
        return Counters(**total)

    def check(self) -> None:
        """Raises PictureError, naming each, for sources that cannot work whatever happens: a path that is not there,
        files without a picture, an unknown scheme. A camera or stream that is away is none of these.
        """
        faults = [
            f"camera {name}: {fault}" for name, camera in self._cameras.items() if (fault := _fault(camera.config))
        ]
        if faults:
            raise PictureError("; ".join(faults))

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Frames of all cameras as they come, until every source has ended or `stop` is set; once.

        One thread a camera. It looks for its next frame only when its last one has been handled: nothing queues, and
        a slow board gets the newest frame.
        """
        handover: queue.SimpleQueue[tuple[Camera, Frame | None]] = queue.SimpleQueue()
        threads = [
            threading.Thread(target=camera.hand_over, args=(handover,), name=f"source-{name}", daemon=True)
            for name, camera in self._cameras.items()
        ]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running and not stop.is_set():
                try:
                    camera, frame = handover.get(timeout=LOOK_S)
                except queue.Empty:
                    continue
                if frame is None:
                    running -= 1
                    continue
                if camera.is_on:
                    yield frame
                else:  # switched off since
                    camera.counters.skipped += 1
                camera.handled()
        finally:
            for camera in self:
                camera.switch(closed=True)
            until = time.monotonic() + CLOSE_S
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))
