"""The life cycle of one camera: opened, opened again after a failure, gated by motion, switched on and off.

Whatever goes wrong with a camera is tried again for ever, with a growing pause, and does not touch other cameras.
"""

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Literal

from edge_runtime.capture.frame import Counters, Frame
from edge_runtime.capture.frigate import FrigatePictures
from edge_runtime.capture.live import decoded, live_frames
from edge_runtime.capture.login import login_of
from edge_runtime.capture.motion_gate import MotionGate, shrink
from edge_runtime.capture.mqtt_pictures import MqttPictures
from edge_runtime.capture.readers import no_answer, reader_of
from edge_runtime.capture.watched_folder import WatchedFolder
from edge_runtime.config import CameraConfig
from edge_runtime.config.camera_source import Kind, kind_of
from edge_runtime.errors import ConfigError
from edge_runtime.logs import printable
from edge_runtime.picture_checks import decode_small

logger = logging.getLogger(__name__)

MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0  # before a camera is opened again
FIRST_PICTURE_S = 60.0  # without a picture and without a failure; then the camera is waiting
MAX_REASON = 256  # characters

StateName = Literal["starting", "waiting", "live", "stalled", "frozen", "lost", "ended", "off"]
MISSING: dict[Kind, str] = {  # what to look at if no picture comes
    "mqtt": " over MQTT: does the camera's software publish on its topic?",
    "frigate": " with an event of Frigate: are frigate_camera and the prefix those of Frigate?",
}


@dataclass(frozen=True, slots=True)
class CameraState:
    """The state of a camera."""

    state: StateName
    why: str  # of waiting, stalled, frozen, lost and off; printable
    since_unix: float  # seconds, wall clock
    enabled: bool
    motion: bool  # the motion gate is on
    counters: Counters


class Camera:
    """One camera at run time.

    States: starting: no frame yet. waiting: still none after FIRST_PICTURE_S, or no new picture in its folder. live.
    stalled: worked until now, and is opened again. lost: the last try brought no frame, and more tries follow. frozen:
    live, but always the same picture; opening it again would not change that. ended: the files have been read. off:
    switched off or paused.
    A camera whose pictures come over MQTT or into a folder does not stall, since nobody knows when its next one is due,
    unless the drive with the folder does not answer.
    Switching a camera off closes it; files start from the beginning when they are switched on again.
    """

    def __init__(
        self, config: CameraConfig, on_change: Callable[[], None] = lambda: None, state_folder: Path | None = None
    ) -> None:
        """on_change: called on any thread after each change of state. state_folder: see Cameras.

        Raises ConfigError for the motion mask and for a password file that cannot be used.
        """
        self.config, self.counters, self._on_change = config, Counters(), on_change
        try:
            self.gate = MotionGate(config.motion, config.max_interval_s)
        except ConfigError as error:
            raise ConfigError(f"camera {config.name}: {error}") from error
        login_of(config)
        self._kind = kind = kind_of(config.source)
        self.mqtt_pictures = MqttPictures(config, self.counters) if kind == "mqtt" else None
        self.frigate = FrigatePictures(config, self.counters) if kind == "frigate" else None
        self._watched_folder = (
            WatchedFolder(config, self.counters, self._listed, state_folder) if kind == "watch" else None
        )
        is_live = kind not in ("frigate", "watch", "video", "pictures")  # files and events may repeat a picture
        self._can_freeze = config.frozen_s > 0 and is_live
        self._not_before = -inf  # a camera that is opened again keeps its interval
        self._state: tuple[StateName, str, float] = ("starting", "", time.time())
        self._since = inf  # of the state, seconds, time.monotonic(); inf: nothing has been read yet
        self._enabled, self._paused, self._closed = True, False, False
        self._switched = threading.Condition()
        self._closing = threading.Event()  # ends the present reader
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
        """Changes what is given. A camera that is off is closed, and its waiting pictures are dropped."""
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
        if (over_mqtt := self.mqtt_pictures or self.frigate) and not self.is_on:
            over_mqtt.forget()
        if closed:
            self._handled.set()

    def tell_if_nothing_comes(self, now: float) -> None:
        """Reports a camera that has been starting for long, or whose thread waits for a drive that does not answer.

        To be called now and then; now: time.monotonic().
        """
        with self._switched:
            folder, limit_s = self._watched_folder, self.config.stall_s
            if folder and self.is_on and now - folder.asked_at > limit_s:
                self._become("stalled", printable(f"{folder.folder} {no_answer(limit_s)}", MAX_REASON))
            if self._state[0] == "starting" and self.is_on and now - self._since > FIRST_PICTURE_S:
                counters, missing = self.counters, f"no picture has come{MISSING.get(self._kind, '')}"
                if counters.unreadable and not counters.frames:
                    missing = f"none of {counters.unreadable} picture(s) could be decoded"
                self._become("waiting", missing)

    def picture_arrived(self, data: bytes) -> None:
        """A picture over MQTT for this camera. Never blocks. While the camera is off, it is skipped."""
        if self.mqtt_pictures and self.is_on:
            self.mqtt_pictures.put(data)
        else:
            self.counters.skipped += 1

    def handled(self) -> None:
        """The last frame that was handed over has been handled: the next one may come."""
        if self._watched_folder:
            self._watched_folder.handled()
        self._handled.set()

    # ---- the camera's own thread ----

    def hand_over(self, handover: "queue.Queue[tuple[Camera, Frame | None]]") -> None:
        """Puts frames into the queue, each after the last one has been handled, and None at the end."""
        self._since = time.monotonic()
        try:
            for frame in self._frames():
                self._handled.clear()
                handover.put((self, frame))
                del frame  # see Frame
                if not self._closed:
                    self._handled.wait()
        finally:
            handover.put((self, None))

    def _frames(self) -> Iterator[Frame]:
        """Frames that pass the motion gate, until the files have been read or the camera is closed for good."""
        pause = MIN_PAUSE_S
        while (closing := self._next_try()) is not None:
            failed_state: StateName = "lost"
            try:
                for frame in self._read(closing):
                    failed_state, pause = "stalled", MIN_PAUSE_S
                    self._not_before = frame.captured + self.config.min_interval_s
                    if self._passes(frame):
                        yield frame if frame.small is None else decoded(frame)
                    del frame  # see Frame
                if not closing.is_set():
                    self._become("ended")
                    return
            except Exception as error:  # whatever a driver, a codec or a damaged file raises: the other cameras go on
                if not closing.is_set():
                    self._become(failed_state, printable(str(error), MAX_REASON))
                    self.counters.reopened += 1
                    # At random, so that cameras behind one switch are not all opened in one moment; at least half,
                    # since a driver needs time.
                    closing.wait(random.uniform(pause / 2, pause))
                    pause = min(MAX_PAUSE_S, pause * 2)

    def _next_try(self) -> threading.Event | None:
        """Waits until the camera is on. Returns the event that ends the try; None if the camera is closed for good."""
        with self._switched:
            self._switched.wait_for(lambda: self.is_on or self._closed)
            self._closing = threading.Event()
            return None if self._closed else self._closing

    def _read(self, closing: threading.Event) -> Iterator[Frame]:
        if remembering := self.mqtt_pictures or self.frigate or self._watched_folder:
            return remembering.frames(closing)
        if (reader := reader_of(self.config)) is live_frames:
            return live_frames(self.config, closing, self.counters, self._not_before, self._decoded)
        return reader(self.config, closing, self.counters)

    def _decoded(self, frame: Frame) -> Frame:
        """As far as it is needed now: most pictures do not pass the motion gate. Raises PictureError."""
        if not self.gate.enabled:
            return decoded(frame)
        return replace(frame, small=decode_small(frame.encoded, self.config.motion.frame_height))

    def _listed(self, missing: str) -> None:
        """A watched folder is there. missing: it has no new picture; the next one may be hours away."""
        if self._state[0] in ("stalled", "lost"):
            self._become("starting")
        if missing and self._state[0] == "starting":
            self._become("waiting", printable(missing, MAX_REASON))

    def _passes(self, frame: Frame) -> bool:
        passes = True
        if not (self._can_freeze or self.gate.enabled):
            self._become("live")
        else:
            picture = frame.pixels if frame.small is None else frame.small
            seen = self.gate.inspect(shrink(picture, self.config.motion.frame_height), frame.captured)
            if self._can_freeze and seen.same_s >= self.config.frozen_s:
                kind = "of one colour " if seen.flat else ""
                self._become("frozen", f"exactly the same picture {kind}for {self.config.frozen_s:g} s and more")
            else:
                self._become("live")
            passes = seen.passes
            self.counters.still += not passes
            self.counters.lightning += seen.why == "lightning"
        self.counters.frames += 1
        return passes

    def _become(self, state: StateName, why: str = "") -> None:
        """Logs and reports a change. The same failure again is no change: it must not fill the log every night."""
        with self._switched:
            if self._state[:2] == (state, why):
                return
            level = logging.WARNING if why and state != "waiting" else logging.INFO  # that is no failure
            again = "; it is opened again until it works" if state in ("stalled", "lost") else ""
            logger.log(level, "camera %s camera=%s%s", state, self.config.name, f" reason={why}{again}" if why else "")
            self._state, self._since = (state, why, time.time()), time.monotonic()
            self._on_change()
