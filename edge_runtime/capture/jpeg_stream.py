"""Cuts a stream of bytes into the JPEGs in it: MJPEG over HTTP, or from a program that writes to a pipe.

It goes from marker to marker (ITU-T T.81, B.1.1), so that a preview picture inside a JPEG is no picture of its own.
Whatever lies between two pictures is left out, such as the headers of multipart/x-mixed-replace. A damaged picture is
left out too: the next one starts at the next start marker. Knows no sockets and no processes.
"""

import re

from edge_runtime.capture.frame import CameraError
from edge_runtime.picture_checks import END_OF_IMAGE, MAX_PICTURE_BYTES, START_OF_SCAN

MAX_GAP_BYTES = 4 << 20  # without a complete picture; the headers between two have about 100 bytes
START = b"\xff\xd8\xff"
# A scan's data ends at the next marker that is no restart marker. FF 00 is a data byte.
END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
STANDALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length


class JpegStream:
    """`feed` gets the bytes as they come."""

    def __init__(self, max_picture_bytes: int = MAX_PICTURE_BYTES, max_gap_bytes: int = MAX_GAP_BYTES) -> None:
        self._max_picture_bytes, self._max_gap_bytes = max_picture_bytes, max_gap_bytes
        self._data = bytearray()
        self._gap = 0  # bytes since the last picture
        self._at = 0  # where to go on in _data; 0: its start is not the start of a picture
        self._in_scan = False

    def feed(self, data: bytes) -> list[bytes]:
        """The pictures that are complete now, in order. Takes time in proportion to the bytes, whatever they are.

        Raises CameraError if too many bytes contain no picture, or if a picture does not end.
        """
        self._data += data
        pictures = []
        while picture := self._next():
            pictures.append(picture)
        if len(self._data) > self._max_picture_bytes:
            raise CameraError(f"sends a picture of more than {self._max_picture_bytes} bytes: let it send smaller ones")
        return pictures

    def _next(self) -> bytes | None:
        """The first complete picture, which is removed. None: more bytes are needed."""
        while True:
            if not self._at and not self._find_start():
                return None
            if self._in_scan:
                end = END_OF_SCAN.search(self._data, self._at)
                if end is None:
                    self._at = max(self._at, len(self._data) - 1)  # the last byte may begin the marker
                    return None
                self._at, self._in_scan = end.start(), False
            if len(self._data) < self._at + 2:
                return None
            marker = self._data[self._at + 1]
            if self._data[self._at] != 0xFF or marker in (0x00, 0xD8):  # damaged, or cut off by the next picture
                self._drop(self._at)
            elif marker == 0xFF:  # a fill byte
                self._at += 1
            elif marker == END_OF_IMAGE:
                picture = bytes(self._data[: self._at + 2])
                self._drop(len(picture))
                self._gap = 0
                return picture
            elif marker in STANDALONE:
                self._at += 2
            elif len(self._data) < self._at + 4:
                return None
            else:
                self._in_scan = marker == START_OF_SCAN
                self._at += 2 + max(2, int.from_bytes(self._data[self._at + 2 : self._at + 4], "big"))

    def _find_start(self) -> bool:
        start = self._data.find(START)
        self._drop(start if start >= 0 else max(0, len(self._data) - len(START) + 1))
        self._at = 2 if start >= 0 else 0
        return start >= 0

    def _drop(self, count: int) -> None:
        del self._data[:count]
        self._at, self._in_scan = 0, False
        self._gap += count
        if self._gap > self._max_gap_bytes:
            raise CameraError(f"sends {self._max_gap_bytes} bytes without a complete JPEG: is it a stream of JPEGs?")
