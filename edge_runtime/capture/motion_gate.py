"""Decides which frames of a camera go on: frames with motion, and one frame per interval without.

The method is that of Frigate's motion detection (docs.frigate.video/configuration/motion_detection), with the same
names, so that settings found there can be used here: the background is a running average, and a large enough area that
differs from it is motion. Works on small pictures of about 100 lines. Knows no cameras, clocks or threads: the time is
an argument.
"""

from dataclasses import dataclass
from math import inf
from typing import Literal

import cv2
import numpy as np

from edge_runtime.config import MotionConfig
from edge_runtime.errors import ConfigError

Grey = np.ndarray  # uint8 [h, w]
Why = Literal["off", "motion", "interval", "still", "warm-up", "lightning"]

SAMPLES = 4  # 4 x 4 pixels of a frame are averaged into one, against noise; all of 1080p would take 3 to 18 ms
MAX_WIDTH = 8  # times the height; a camera may send any width
THUMBNAIL = 32  # pixels per side of the picture that is compared to find a frozen camera
CALM = 0.05, 4  # at most this fraction of the picture and this many areas change: the background has been learned
WARM_UP_FRAMES = 10  # at most, since a busy street is never calm
WARM_UP_ALPHA = 0.2  # weight of a new frame in the background during warm-up
STAYS_FRAMES = 10  # frames with motion in a row, before the moving object is blended into the background
CONTRAST_ALPHA = 1 / 50  # weight of a new frame in the range of greys, so that a lamp does not rescale all at once
MIN_RANGE = 64.0  # greys that are stretched to 256; stretching further would turn the noise of a night into motion


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the gate found in one frame."""

    passes: bool  # the frame goes on
    why: Why
    changed: float = 0.0  # fraction of the picture outside the mask that differs from the background, 0..1
    same_s: float = 0.0  # seconds for which the picture has been exactly the same
    flat: bool = False  # of one colour: a covered lens, a cut cable, a black night


def shrink(pixels: np.ndarray, frame_height: int) -> Grey:
    """uint8 RGB [H, W, 3] or grey [H, W] to grey [h, w]. h is at most frame_height, w at most 8 * frame_height; never
    enlarged.
    """
    full_height, full_width = pixels.shape[:2]
    height = min(frame_height, full_height)
    width = min(max(1, round(full_width * height / full_height)), full_width, MAX_WIDTH * frame_height)
    samples = min(SAMPLES * width, full_width), min(SAMPLES * height, full_height)
    small = cv2.resize(pixels, samples, interpolation=cv2.INTER_NEAREST)
    small = cv2.resize(small, (width, height), interpolation=cv2.INTER_AREA)
    return small if small.ndim == 2 else cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)


class MotionGate:
    """The gate of one camera. The same frames at the same times give the same results."""

    def __init__(self, settings: MotionConfig, max_interval_s: float = 0.0) -> None:
        """max_interval_s: a frame passes after so long without motion; 0: never. Raises ConfigError for the mask."""
        self.settings, self.max_interval_s = settings, max_interval_s
        self.enabled = settings.enabled  # may be switched by another thread; the background is learned again then
        if not _unmasked(settings, (100, 100)).any():
            raise ConfigError("motion.mask covers the whole picture, so nothing could move: make it smaller")
        self._last_passed = -inf
        self._thumbnail: Grey | None = None
        self._same_since = -inf
        self._outside: np.ndarray = np.empty((0, 0), np.bool_)  # bool [h, w]: outside the mask, at the last size
        self._background: np.ndarray | None = None  # float32 [h, w]
        self._low, self._high = 0.0, 255.0  # the range of greys in use
        self._warming = 0  # frames left of the warm-up
        self._moving = 0  # frames in a row with motion

    def inspect(self, grey: Grey, now: float) -> Inspection:
        """grey: one frame, shrunk by `shrink`; now: seconds, when the frame was captured."""
        if grey.shape != self._outside.shape:  # the first frame, or the camera changed its resolution
            self._outside, self._background = _unmasked(self.settings, grey.shape), None
        same_s, flat = self._compare(grey, now)
        why: Why = "off"
        changed = 0.0
        if self.enabled:
            why, changed = self._motion(grey)
        else:
            self._background = None
        if why not in ("off", "motion") and 0 < self.max_interval_s <= now - self._last_passed:
            why = "interval"
        passes = why in ("off", "motion", "interval")
        if passes:
            self._last_passed = now
        return Inspection(passes, why, changed, same_s, flat)

    def _compare(self, grey: Grey, now: float) -> tuple[float, bool]:
        """Seconds for which the picture has been the same, and whether it has one colour.

        Only outside the mask: a clock may go on in a frozen picture.
        """
        masked = np.where(self._outside, grey, np.uint8(0))
        thumbnail = cv2.resize(masked, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
        if self._thumbnail is None or not np.array_equal(thumbnail, self._thumbnail):
            self._thumbnail, self._same_since = thumbnail, now
        unmasked = grey[self._outside]
        return now - self._same_since, not unmasked.size or bool(unmasked.min() == unmasked.max())

    def _motion(self, grey: Grey) -> tuple[Why, float]:
        settings = self.settings
        picture = self._prepared(grey)
        if self._background is None:
            self._background, self._warming, self._moving = picture.astype(np.float32), WARM_UP_FRAMES, 0
            return "warm-up", 0.0
        different = cv2.absdiff(picture, cv2.convertScaleAbs(self._background))
        areas = _areas(cv2.threshold(different, settings.threshold, 255, cv2.THRESH_BINARY)[1])
        # The fraction is of the unmasked area: otherwise a large mask would switch the lightning rule off.
        changed = min(1.0, sum(areas) / max(1, int(self._outside.sum())))
        large = sum(area > settings.contour_area for area in areas)
        if changed > settings.lightning_threshold:  # a lamp, the change to infrared, a moved camera
            self._background = None  # learn it again, from the next frame
            return "lightning", changed
        calm = changed < CALM[0] and large <= CALM[1]
        self._warming = 0 if calm else max(0, self._warming - 1)
        if self._warming:
            cv2.accumulateWeighted(picture, self._background, WARM_UP_ALPHA)
            return "warm-up", changed
        self._moving = self._moving + 1 if large else 0
        if not large or self._moving >= STAYS_FRAMES:
            cv2.accumulateWeighted(picture, self._background, settings.frame_alpha)
        return ("motion" if large else "still"), changed

    def _prepared(self, grey: Grey) -> Grey:
        """Stretched, masked, smoothed. Masked after stretching, since the mask's black would count as a grey in use."""
        if self.settings.improve_contrast:
            low, high = np.percentile(grey, (4, 96))
            weight = 1.0 if self._background is None else CONTRAST_ALPHA
            self._low, self._high = self._low + weight * (low - self._low), self._high + weight * (high - self._high)
            gain = 255 / max(MIN_RANGE, self._high - self._low)
            grey = np.clip((grey - self._low) * gain, 0, 255).astype(np.uint8)
        return cv2.GaussianBlur(np.where(self._outside, grey, np.uint8(0)), (3, 3), 0)


def _unmasked(settings: MotionConfig, shape: tuple[int, ...]) -> np.ndarray:
    """The pixels outside the mask, bool [h, w]."""
    height, width = shape
    mask = np.zeros((height, width), np.uint8)
    for polygon in settings.polygons():
        cv2.fillPoly(mask, [np.rint(np.multiply(polygon, (width, height))).astype(np.int32)], 1)
    return np.equal(mask, 0)


def _areas(different: Grey) -> list[float]:
    """The areas that differ, in pixels. Each grows by one pixel, so that parts of one object count together."""
    grown = cv2.dilate(different, np.ones((3, 3), np.uint8))
    return [cv2.contourArea(c) for c in cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]]
