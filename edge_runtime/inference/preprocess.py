"""From encoded pictures to the head's input; the same code on the board, on the server and in training.

The whole frame is squashed to a square: nothing at its edges is lost, and no box has to be sent along.
"""

import os
import struct

from edge_runtime.errors import AiflowError

# Read by OpenCV once, at its import: its own guard against pictures that are small to send and huge to decode.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 26))

import cv2
import numpy as np

PIXELS = 224
MAX_PICTURE_BYTES = 32 << 20  # a 24 megapixel JPEG at the best quality has about 20 MB
MAX_PICTURE_PIXELS = 50_000_000  # 50 megapixels: 150 MB once decoded
MAX_JPEG_SEGMENTS = 4096  # before the frame header; 32 MB of metadata in the largest segments are 512


class PictureError(AiflowError, ValueError):
    """Bytes that are no picture we can decode, or one that is too large to try."""


def decode_picture(data: bytes, max_pixels: int = MAX_PICTURE_PIXELS) -> np.ndarray:
    """An encoded picture (JPEG, PNG, WebP, ...) to uint8 RGB [H, W, 3]. Raises PictureError.

    The size that the header claims, at most max_pixels, is checked before a pixel is allocated.
    """
    if len(data) > MAX_PICTURE_BYTES:
        raise PictureError(f"picture has {len(data)} bytes, at most {MAX_PICTURE_BYTES} are read: send a smaller one")
    width, height = claimed_size(data)
    if width * height > max_pixels:
        raise PictureError(
            f"picture claims {width} x {height} pixels, at most {max_pixels} are decoded: send a smaller one"
        )
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if pixels is None:
            raise PictureError(f"{len(data)} bytes starting {data[:4].hex()} are not a complete picture: send it again")
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    except cv2.error as error:
        raise PictureError(f"picture cannot be decoded: {error.msg}") from error


def claimed_size(data: bytes) -> tuple[int, int]:
    """Width and height that the header of a JPEG, PNG or WebP claims, without decoding. Raises PictureError."""
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            width, height = struct.unpack(">II", data[16:24])
        elif data[:3] == b"\xff\xd8\xff":
            width, height = _jpeg_size(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            width, height = _webp_size(data)
        else:
            raise PictureError(f"{data[:4].hex()!r} does not start a JPEG, PNG or WebP: convert the picture")
    except (struct.error, IndexError) as error:
        raise PictureError("picture ends within its header: was it cut?") from error
    return width, height


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """ITU-T T.81, B.2.2: walk the marker segments to the frame header (SOF0..SOF15 without DHT, JPG and DAC)."""
    at = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        if data[at] != 0xFF:
            raise PictureError(f"no JPEG marker at byte {at}: the picture is damaged")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        elif marker == 0x01 or 0xD0 <= marker <= 0xD9:  # these stand alone, without a length (table B.1)
            at += 2
        else:
            at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
    raise PictureError(f"no JPEG frame header within {MAX_JPEG_SEGMENTS} segments: the picture is damaged")


def _webp_size(data: bytes) -> tuple[int, int]:
    """RFC 9649, section 2: the first chunk is VP8 (lossy), VP8L (lossless) or VP8X (extended)."""
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        bits = struct.unpack("<I", data[21:25])[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind != b"VP8X":
        raise PictureError(f"a WebP cannot start with a chunk {kind!r}: the picture is damaged")
    width, width_high, height, height_high = struct.unpack("<HBHB", data[24:30])
    return (width | width_high << 16) + 1, (height | height_high << 16) + 1


def to_input(pixels: np.ndarray) -> np.ndarray:
    """uint8 RGB [H, W, 3] to the head's input, uint8 [224, 224, 3]; the whole frame, squashed."""
    if pixels.shape[:2] == (PIXELS, PIXELS):
        return pixels
    # Halves first: averages of whole pixels take a fraction of the time of the general case, and 640 x 480 half of it.
    while min(pixels.shape[:2]) >= 2 * PIXELS and not (pixels.shape[0] | pixels.shape[1]) & 1:
        pixels = cv2.resize(pixels, (pixels.shape[1] // 2, pixels.shape[0] // 2), interpolation=cv2.INTER_AREA)
    # Averaging over areas when shrinking (no aliasing); it would show blocks when enlarging.
    shrinks = min(pixels.shape[:2]) >= PIXELS
    return cv2.resize(pixels, (PIXELS, PIXELS), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
