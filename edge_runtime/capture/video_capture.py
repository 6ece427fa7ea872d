"""A camera, a stream or a video file that OpenCV reads, in a process of its own: see edge_runtime/opencv_process.py.

Every wait for that process has a bound. One that gives no sign of life within it is killed, whatever its driver does.
"""

import fcntl
import math
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime import opencv_process
from edge_runtime.capture.diagnosis import why_not_opened
from edge_runtime.capture.frame import CameraError
from edge_runtime.capture.login import login_of, with_login
from edge_runtime.capture.processes import end, ending_with_parent
from edge_runtime.config import CameraConfig
from edge_runtime.decoder_stderr import DECODER_STDERR
from edge_runtime.opencv_process import GRAB, GRABBED, MAX_PACKET, OPENED, OVERWRITE, RETRIEVE, SIZE
from edge_runtime.picture_checks import MAX_PICTURE_PIXELS

ROOT = Path(__file__).parents[2]
START_S = 15.0  # to load Python and OpenCV from a slow SD card
OPEN_TIMEOUT_S = 5.0  # for FFmpeg; OpenCV's default is 30 s
OPEN_S = 2 * OPEN_TIMEOUT_S  # for any driver; FFmpeg notices its timeout itself
GRACE_S = 2.0  # beyond the timeout of a read, for the driver to notice it itself
OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
POLL_S = 0.2  # how often it looks whether it has been abandoned
GOODBYE_S = 0.5  # for an orderly end of a connection
# What the user has set in the environment stays. FFmpeg is silent, since why_not_opened finds the reason. The options
# are OpenCV's default, and that packets carry the time of their arrival. One thread: OpenBLAS reserves memory for each.
# Two threads decode, not one per core: with 1080p, each further one takes 7 MB and holds back one frame. One might be
# too slow for 25 frames per second: it takes 5.6 ms per frame of H.264 and 8.8 ms of H.265 on a core of a server (AMD
# EPYC), and a core of a Raspberry Pi is several times slower.
ENVIRONMENT = {
    "OPENCV_FFMPEG_LOGLEVEL": "-8",  # AV_LOG_QUIET
    OPTIONS: "rtsp_flags;prefer_tcp|use_wallclock_as_timestamps;1",
    "OPENBLAS_NUM_THREADS": "1",
    "OPENCV_FFMPEG_THREADS": "2",
}
KEY_FRAMES = "|avdiscard;nonkey"  # with OPTIONS: the decoder leaves out all others


class Grabbed(NamedTuple):
    """A frame that was received, and not converted yet. Times are time.monotonic()."""

    started: float  # of the read
    ended: float
    age_s: float | None  # of the frame at the end of the read; None: unknown


class DriverError(CameraError):
    """The process that reads a source hangs or has ended. Whether the source is at fault is unknown."""


class VideoCapture:
    """One try to read such a source: cv2.VideoCapture with bounded waits. For one thread; `with` closes it.

    A read takes at most the camera's stall_s, and GRACE_S if the driver hangs. After any error it is of no more use.
    """

    def __init__(self, camera: CameraConfig, abandoned: threading.Event) -> None:
        """Opens the source. abandoned: set on any thread, ends what this waits for, also here.

        Raises CameraError with the reason, and ConfigError if the password's file cannot be used.
        """
        source = with_login(camera.source, login_of(camera))
        if "://" not in source:
            source = os.path.abspath(source)  # the process has another working directory
        self._read_limit_s, self._abandoned, self._hangs = camera.stall_s + GRACE_S, abandoned, False
        self._memory: mmap.mmap | None = None  # with the pixels of a frame that has just arrived
        self._last: Callable[[], mmap.mmap | None] = lambda: None  # that of the last frame, while anybody has the frame
        self._process, self._board = _start(camera.stall_s, KEY_FRAMES if camera.key_frames else "")
        try:
            self._answer(START_S)
            self.opened_at = time.monotonic()  # when the opening began
            answer = self._ask(source.encode(), OPEN_S)
            is_open, fps = OPENED.unpack(answer) if answer else (True, 0.0)  # no answer: abandoned
            self.fps: float = fps  # frames per second, as the source says; 0: unknown
            if not is_open:
                raise CameraError(f"cannot be opened: {why_not_opened(source)}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VideoCapture":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, which says goodbye to a network camera if it can."""
        self._board.close()
        end(self._process, 0.0 if self._hangs else GOODBYE_S)

    def grab(self) -> Grabbed | None:
        """Waits for the next frame. None: the source has ended or is silent, or this has been abandoned.

        Raises DriverError if the process hangs or ends.
        """
        answer = self._ask(GRAB, self._read_limit_s)
        has_frame, started, ended, age_s = GRABBED.unpack(answer) if answer else (False, 0, 0, 0)
        return Grabbed(started, ended, None if math.isnan(age_s) else age_s) if has_frame else None

    def retrieve(self) -> NDArray[np.uint8] | None:
        """The frame that was grabbed, uint8 RGB [H, W, 3]. None: it has no picture, or this has been abandoned.

        Raises DriverError if the process hangs or ends, and CameraError if the frame is too large.
        """
        answer = self._ask(RETRIEVE if self._last() else OVERWRITE, self._read_limit_s)
        height, width = SIZE.unpack(answer) if answer else (0, 0)
        if not height or not width:
            return None
        if height * width > MAX_PICTURE_PIXELS:
            raise CameraError(
                f"sends frames of {width} x {height} pixels, at most {MAX_PICTURE_PIXELS} are read: let it send "
                "smaller ones"
            )
        memory, self._memory = self._memory, None
        if memory is None or len(memory) != height * width * 3:
            raise DriverError(f"the process that reads it has sent no frame of {width} x {height} pixels")
        self._last = weakref.ref(memory)
        return np.frombuffer(memory, np.uint8).reshape(height, width, 3)

    def _ask(self, request: bytes, limit_s: float) -> bytes:
        with suppress(BrokenPipeError, ConnectionResetError):  # _answer says what became of the process
            self._board.send(request)
        return self._answer(limit_s)

    def _answer(self, limit_s: float) -> bytes:
        """The next packet; b"" if this has been abandoned. Raises DriverError if the process hangs or ends."""
        until = time.monotonic() + limit_s
        while not self._abandoned.is_set():
            try:
                answer, descriptors, _, _ = socket.recv_fds(self._board, MAX_PACKET, 1)
            except TimeoutError:
                if time.monotonic() < until:
                    continue
                self._hangs = True
                raise DriverError(
                    f"its driver hangs: the process that reads it gave no sign of life for {limit_s:g} s, and is killed"
                ) from None
            except ConnectionResetError:
                answer = b""
            if not answer:
                raise DriverError(f"the process that reads it {end(self._process, GOODBYE_S)}")
            for descriptor in descriptors:
                self._memory = _mapped(descriptor)
            return answer
        return b""


def _mapped(descriptor: int) -> mmap.mmap:
    """The memory of this descriptor, which is closed.

    Raises DriverError if it could become shorter: using it would then end this process with SIGBUS.
    """
    try:
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            return mmap.mmap(descriptor, 0)
    except (OSError, ValueError):
        pass
    finally:
        os.close(descriptor)
    raise DriverError("the process that reads it has sent memory that is not sealed")


def _start(read_timeout_s: float, more_options: str) -> tuple["subprocess.Popen[bytes]", socket.socket]:
    """The process, and our end of its socket. Raises CameraError."""
    # V4L2 has no other way to set this than whole seconds in the environment.
    environment = ENVIRONMENT | {"OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT": str(math.ceil(read_timeout_s))} | os.environ
    environment[OPTIONS] += more_options
    arguments = [str(limit) for limit in (OPEN_TIMEOUT_S, read_timeout_s, MAX_PICTURE_PIXELS)]
    command = [sys.executable, "-m", opencv_process.__name__, *arguments]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            process = subprocess.Popen(
                ending_with_parent(command),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=DECODER_STDERR.own,
                cwd=ROOT,
                env=environment,
                start_new_session=True,  # Ctrl-C in a terminal ends the board, and the board ends the process
            )
        except OSError as error:
            ours.close()
            raise CameraError(f"no process to read it could be started: {error.strerror}") from error
    ours.settimeout(POLL_S)
    return process, ours
