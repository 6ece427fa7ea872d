"""From a decoded picture to the head's input, or to a JPEG; the same code on the board, on the server and in training.

The whole frame is squashed to a square: nothing at its edges is lost, and no box has to be sent along.
"""

import cv2
import numpy as np

PIXELS = 224  # width and height of the head's input


def shrunk(pixels: np.ndarray, longest: int) -> np.ndarray:
    """uint8 RGB [H, W, 3] in its proportions, with a longest side of at most so many pixels."""
    height, width = pixels.shape[:2]
    if (scale := longest / max(height, width)) >= 1.0:
        return pixels
    size = max(1, round(scale * width)), max(1, round(scale * height))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def to_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """uint8 RGB [H, W, 3] to a JPEG; quality 1..100."""
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok  # an array of this type and shape always encodes
    return data.tobytes()


def to_input(pixels: np.ndarray) -> np.ndarray:
    """uint8 RGB [H, W, 3] to the head's input, uint8 [224, 224, 3]: the whole frame, squashed."""
    if pixels.shape[:2] == (PIXELS, PIXELS):
        return pixels
    # Averages of whole pixels are much faster than the general case. So halve first, as long as enough is left, ...
    while min(pixels.shape[:2]) >= 3 * PIXELS and not (pixels.shape[0] | pixels.shape[1]) & 1:
        pixels = cv2.resize(pixels, (pixels.shape[1] // 2, pixels.shape[0] // 2), interpolation=cv2.INTER_AREA)
    # ... then to the next multiple. 640 x 480 takes half the time of halving it, and is nearer to the general case.
    if min(pixels.shape[:2]) >= 2 * PIXELS:
        height, width = (side // PIXELS * PIXELS for side in pixels.shape[:2])
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    # Average over areas when shrinking, against aliasing. When enlarging, that would show blocks.
    shrinks = min(pixels.shape[:2]) >= PIXELS
    return cv2.resize(pixels, (PIXELS, PIXELS), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
