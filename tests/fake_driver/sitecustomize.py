"""A camera's driver that does what the environment says, for the process that reads a camera by OpenCV.

Python runs this file when it starts, if its folder is in PYTHONPATH. Each frame has the shade of its number.
"""

import fcntl
import os
import signal
import time

import cv2
import numpy as np

does = os.environ["FAKE_DRIVER"]


class VideoCapture:
    """See cv2.VideoCapture."""

    def __init__(self, *_: object) -> None:
        self._number = 0
        self._hangs_if(does == "hangs when opened")

    def isOpened(self) -> bool:  # noqa: N802 its name in OpenCV
        return True

    def get(self, _: int) -> float:
        return 0.0

    def grab(self) -> bool:
        time.sleep(0.01)
        self._number += 1
        self._hangs_if(does == "hangs at its first frame" or (does == "hangs" and self._number > 3))
        if does == "crashes" and self._number > 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        return True

    def retrieve(self) -> tuple[bool, np.ndarray]:
        if does == "raises":
            raise ValueError("no such register")
        if does == "sends too large frames":
            return True, np.zeros((8000, 8000, 3), np.uint8)
        height = 60 + self._number // 3 if does == "changes size" else 60
        return True, np.full((height, 80, 3), self._number % 256, np.uint8)

    def release(self) -> None:
        self._hangs_if(does == "hangs when closed")

    def _hangs_if(self, now: bool) -> None:
        """As C code does, that never looks whether Python has a signal."""
        if now:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            while True:
                time.sleep(3600)


cv2.VideoCapture = VideoCapture
if does == "does not seal its memory":
    fcntl.fcntl = lambda *_: None  # type: ignore[assignment]
