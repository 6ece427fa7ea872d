"""What a static camera sees, made from photos: the same scene again and again, with all that changes in it.

For the tables that code a frame against an earlier one, and for `aiflow bench static`.
"""

import math
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

SCENES = ("noise", "drift", "shake", "object")  # each with sensor noise
NOISE = 1.0, 4.0  # standard deviation at 224 pixels, of 255: a good camera by day, a cheap one at dusk
DRIFT, DRIFT_FRAMES = 0.15, 75  # the exposure rises and falls by this share, once in so many frames
SHAKE = 0.004  # standard deviation, share of the width
OBJECT, CROSSING = 0.3, 12  # side of the moving object, share of the height; frames from one side to the other

Pixels = NDArray[np.uint8]


def frames_of(scene: str, photo: Pixels, other: Pixels, rng: np.random.Generator) -> Iterator[Pixels]:
    """Frames uint8 [H, W, 3] without end, like the photo. other: the photo that an object is cut from."""
    still: NDArray[np.float32] = photo.astype(np.float32)
    height, width = photo.shape[:2]
    deviation = rng.uniform(*NOISE) * height / 224  # it shrinks as the frame is shrunk
    phase, side = rng.uniform(0, 2 * math.pi), round(OBJECT * height)
    thing = cv2.resize(other, (side, side), interpolation=cv2.INTER_AREA)
    number = 0
    while True:
        seen: NDArray[Any] = still
        if scene == "drift":
            seen = still * (1 + DRIFT * math.sin(phase + 2 * math.pi * number / DRIFT_FRAMES))
        elif scene == "shake":
            x, y = rng.normal(0, SHAKE * width, 2)
            moved = np.array([[1, 0, x], [0, 1, y]], np.float32)
            seen = cv2.warpAffine(still, moved, (width, height), borderMode=cv2.BORDER_REFLECT)
        elif scene == "object":
            left = round((width - side) * (0.5 + 0.5 * math.sin(phase + math.pi * number / CROSSING)))
            seen = still.copy()
            seen[-side:, left : left + side] = thing
        yield (seen + rng.normal(0, deviation, still.shape)).clip(0, 255).astype(np.uint8)
        number += 1
