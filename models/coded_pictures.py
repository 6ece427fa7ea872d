"""Pictures as JPEG, WebP and AVIF at small sizes, to compare the features with. Knows nothing of networks."""

from collections.abc import Mapping
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_runtime.inference.preprocess import to_input

SIZES = (64, 96, 112, 160, 224)  # width and height in pixels; the last one is the input of the network


class PictureCodec(NamedTuple):
    """One of OpenCV's encoders."""

    suffix: str
    quality_flag: int
    qualities: tuple[int, ...]  # from a few hundred bytes to more than the network can use
    flags: tuple[int, ...] = ()

    def code(self, pixels: NDArray[np.uint8], size: int, quality: int) -> tuple[bytes, NDArray[np.uint8]]:
        """uint8 RGB [224, 224, 3] to a picture of size x size, and what a server makes of it, in the first shape."""
        small = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
        flags = [self.quality_flag, quality, *self.flags]
        data = cv2.imencode(self.suffix, cv2.cvtColor(small, cv2.COLOR_RGB2BGR), flags)[1]
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
        assert decoded is not None
        return data.tobytes(), to_input(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB))


def picture_codecs() -> Mapping[str, PictureCodec]:
    """The codecs of this build of OpenCV, by name."""
    known = {
        # Huffman tables of the picture's own: 350 to 750 bytes less. Progressive pictures of this size are longer.
        "jpeg": PictureCodec(".jpg", cv2.IMWRITE_JPEG_QUALITY, (5, 10, 20, 40, 75), (cv2.IMWRITE_JPEG_OPTIMIZE, 1)),
        "webp": PictureCodec(".webp", cv2.IMWRITE_WEBP_QUALITY, (1, 10, 25, 50, 80)),
        # With the default speed, 9: speed 4 takes 50 times as long for about 5 % fewer bytes (12 photos).
        "avif": PictureCodec(".avif", cv2.IMWRITE_AVIF_QUALITY, (5, 15, 30, 45, 70)),
    }
    return {name: codec for name, codec in known.items() if cv2.haveImageWriter(f"picture{codec.suffix}")}


def without_container(picture: bytes) -> int:
    """Bytes of the picture's data alone: an AVIF has about 300 bytes of boxes around it. Others as they are."""
    if picture[4:12] != b"ftypavif":
        return len(picture)
    box = picture.index(b"mdat")
    return int.from_bytes(picture[box - 4 : box], "big") - 8
