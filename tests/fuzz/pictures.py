"""Foreign pictures: what the checks accept is decoded too, and has the size that it claims."""

from edge_runtime.picture_checks import PictureError, check_picture, decode_picture
from tests.fuzz.target import Target

MAX_PIXELS = 1 << 16  # what decoding costs grows with the pixels; a fuzzer finds nothing new in many of them


def checks(data: bytes) -> None:
    """Without decoding: most inputs go here, since it is fast."""
    width, height, checked = check_picture(data)
    assert check_picture(checked) == (width, height, checked)
    assert len(checked) <= len(data) + 32


def decoding(data: bytes) -> None:
    pixels = decode_picture(data, MAX_PIXELS)
    assert pixels.size <= 3 * MAX_PIXELS


TARGETS = {
    "picture": Target(checks, PictureError, 8192, weight=4),
    "decoding": Target(decoding, PictureError, 8192, weight=1),
}
