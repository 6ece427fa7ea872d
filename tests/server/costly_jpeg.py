"""Progressive JPEGs that are small to send and expensive to decode: one scan of a real one, repeated."""

import struct

import cv2
import numpy as np


def costly_jpeg(side: int, scans: int) -> bytes:
    """A grey picture of side x side pixels with so many more scans, each of which visits every block again."""
    picture = np.zeros((side, side), np.uint8)
    picture[: side // 2] = 200
    data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    end = data.rindex(b"\xff\xd9")
    last_scan = data.rindex(b"\xff\xda", 0, end)
    return data[:end] + scans * data[last_scan:end] + data[end:]


def scans_of(data: bytes) -> int:
    """How many scans a JPEG has (ITU-T T.81, B.1.1.2)."""
    at, scans = 2, 0
    while data[at + 1] != 0xD9:
        scans += data[at + 1] == 0xDA
        at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        while data[at] != 0xFF or data[at + 1] == 0:  # entropy-coded data
            at += 1
    return scans
