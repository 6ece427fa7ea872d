"""The process that reads one camera or video by OpenCV; capture/video_capture.py starts it as `python -m` this.

A driver that hangs in C (V4L2, FFmpeg) cannot be interrupted, nor can a crash of a decoder be caught, but both end with
their process. Loads only numpy and OpenCV, and lies outside of capture/, whose modules would come along: a board has
little memory.

On the socket that is this process's standard input, each packet of the board is a request, and gets one answer:

    (none, once)    READY       OpenCV is loaded
    the source      OPENED      whether it could be opened, frames per second
    GRAB            GRABBED     whether there is a frame, start and end of the read (time.monotonic()), and the age of
                                the frame at its end in seconds (NaN: unknown)
    RETRIEVE        SIZE        height and width of the frame that was grabbed, in pixels; zeros: it has no picture
    OVERWRITE       SIZE        the same; the board does not use the last frame any more

With a SIZE comes the descriptor of the memory that has the pixels, uint8 RGB [H, W, 3], unless there are none or too
many. Each frame has its own, except after OVERWRITE: new memory takes about as long as the conversion. It has no name,
and goes with its last user: nobody can leave it behind. It is sealed, so that it cannot become shorter. Both processes
run on one machine, so the byte order is its own.
"""

import fcntl
import mmap
import os
import socket
import struct
import sys
import time
from contextlib import suppress
from math import inf, nan
from typing import Any, Final

import cv2
import numpy as np

READY: Final = b"ready"
GRAB: Final = b"grab"
RETRIEVE: Final = b"retrieve"
OVERWRITE: Final = b"overwrite"
OPENED = struct.Struct("?d")
GRABBED = struct.Struct("?ddd")
SIZE = struct.Struct("II")
MAX_PACKET = 1 << 16  # bytes; a source with a login in it has far less
MAX_AGE_S = 3600.0  # a time before this is no time of arrival


def main(open_timeout_s: float, read_timeout_s: float, max_pixels: int) -> None:
    """Answers requests until the board closes its end of the socket."""
    set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # its name to OpenCV 4, and in 5
    set_log_level(1)  # fatal errors only
    cv2.setNumThreads(1)
    board = socket.socket(fileno=0)
    with suppress(BrokenPipeError, ConnectionResetError):  # the board has closed its end
        board.send(READY)
        if source := board.recv(MAX_PACKET).decode():
            capture = _open(source, open_timeout_s, read_timeout_s)
            try:
                board.send(OPENED.pack(capture.isOpened(), capture.get(cv2.CAP_PROP_FPS)))
                _answer(board, capture, max_pixels)
            finally:
                capture.release()  # says goodbye to a network camera, which may allow few viewers


def _answer(board: socket.socket, capture: Any, max_pixels: int) -> None:
    descriptor, memory = _new_memory(1)  # of the last frame
    while request := board.recv(MAX_PACKET):
        if request == GRAB:
            started = time.monotonic()
            has_frame = capture.grab()
            ended = time.monotonic()
            board.send(GRABBED.pack(has_frame, started, ended, _age_s(capture, ended)))
            continue
        has_picture, pixels = capture.retrieve()
        # After a timeout or unplugging some drivers report success without a picture.
        if not has_picture or pixels is None or pixels.ndim != 3:
            board.send(SIZE.pack(0, 0))
            continue
        height, width, _ = pixels.shape
        if height * width > max_pixels:
            board.send(SIZE.pack(height, width))
            continue
        if request != OVERWRITE or len(memory) != pixels.nbytes:
            os.close(descriptor)
            descriptor, memory = _new_memory(pixels.nbytes)
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=np.frombuffer(memory, np.uint8).reshape(pixels.shape))
        del pixels  # a board has little memory
        socket.send_fds(board, [SIZE.pack(height, width)], [descriptor])


def _open(source: str, open_timeout_s: float, read_timeout_s: float) -> Any:
    if source.startswith("/dev/"):
        return cv2.VideoCapture(source, cv2.CAP_V4L2)
    open_ms, read_ms = int(1e3 * open_timeout_s), int(1e3 * read_timeout_s)
    timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, open_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, read_ms]
    return cv2.VideoCapture(source, cv2.CAP_FFMPEG, timeouts)


def _age_s(capture: Any, now: float) -> float:
    """The age of the last frame in seconds, now: time.monotonic(). NaN if OpenCV cannot tell.

    V4L2: since its driver captured it, by the same clock: CAP_PROP_POS_MSEC is the buffer's timestamp (V4L2 API,
    "Buffers"). 0: the driver has none; a driver with another clock is out of range.
    FFmpeg: since its data arrived, to about a frame's interval. CAP_PROP_PTS is the packet's time of arrival (by the
    options in video_capture.py) in units of 1 / fps, since OpenCV 4.12. MJPEG has none, but its decoder keeps no
    frames.
    """
    if capture.get(cv2.CAP_PROP_BACKEND) == cv2.CAP_V4L2:
        captured = capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
        age_s = now - captured if captured else inf
    else:
        frames_per_s = capture.get(cv2.CAP_PROP_FPS)
        pts = capture.get(getattr(cv2, "CAP_PROP_PTS", -1))
        age_s = time.time() - pts / frames_per_s if frames_per_s > 0 else inf
    return max(0.0, age_s) if -1 < age_s < MAX_AGE_S else nan


def _new_memory(size: int) -> tuple[int, mmap.mmap]:
    """So many bytes, and their descriptor."""
    descriptor = os.memfd_create("aiflow-frame", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return descriptor, mmap.mmap(descriptor, size)


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
