"""Decodes the pictures that boards send whole, in a process with a bound on time and memory (picture_worker.py).

Knows nothing of messages, queues and the engine.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import AiflowError
from edge_runtime.inference.preprocess import PIXELS
from edge_runtime.picture_checks import PictureError
from server import picture_worker
from server.picture_worker import OK, PICTURE, receive, send

START_S = 30.0  # for Python, numpy and OpenCV to load on a small and busy machine
ROOT = Path(__file__).parents[1]  # where the packages `server` and `edge_runtime` are


@dataclass(frozen=True, slots=True)
class Limits:
    """What one picture may cost. An honest one of 4 megapixels takes 60 ms and 60 MiB on a desktop CPU."""

    pixels: int = 4_000_000  # boards send 224 x 224
    cpu_s: float = 1.0
    wall_s: float = 10.0  # on a machine that is busy with other things
    memory_bytes: int = 128 << 20  # beyond what the process needs to be ready


class PictureCostError(PictureError):
    """A picture that took more time or memory than one may."""


class PictureWorkerError(AiflowError):
    """Nothing here can read a picture now; another server may."""


class PictureDecoder:
    """One process, started at the first picture and again after each that it did not survive. Use it with `with`.

    For one thread, except `kill`.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = threading.Event()

    def __enter__(self) -> "PictureDecoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._end()

    def kill(self) -> None:
        """Ends the process now: `decode` raises PictureWorkerError from now on. Any thread."""
        self._killed.set()
        if process := self._process:
            process.kill()

    def decode(self, picture: bytes) -> NDArray[np.uint8]:
        """An encoded picture to the head's input, uint8 RGB [224, 224, 3].

        Raises PictureError if it cannot be decoded, PictureCostError if that takes too much, and PictureWorkerError if
        there is no process to do it.
        """
        if self._process is None or self._process.poll() is not None:  # it may have been killed while it was idle
            self._end()
            self._start()
        try:
            send(self._stream, PICTURE, picture)
            answer = receive(self._stream)
        except OSError:  # it did not answer in time, or has ended
            answer = None
        if answer is None:
            reason = self._end()
            self._start()  # now, so that the board that caused it is charged for it
            raise PictureCostError(f"picture of {len(picture)} bytes {reason}: send a smaller or a simpler one")
        kind, content = answer
        if kind != OK:
            raise PictureError(content.decode(errors="replace"))
        return np.frombuffer(bytearray(content), np.uint8).reshape(PIXELS, PIXELS, 3)

    def _start(self) -> None:
        if self._killed.is_set():
            raise PictureWorkerError("this server is stopping")
        limits = self.limits
        # OpenCV has a bound of its own. One thread: each of OpenBLAS's would reserve memory that counts.
        environment = {"OPENCV_IO_MAX_IMAGE_PIXELS": str(limits.pixels), "OPENBLAS_NUM_THREADS": "1"}
        arguments = [str(limit) for limit in (limits.cpu_s, limits.memory_bytes, limits.pixels)]
        try:
            ours, theirs = socket.socketpair()
            with ours, theirs:  # the stream keeps our end open
                self._process = subprocess.Popen(
                    [sys.executable, "-m", picture_worker.__name__, *arguments],
                    stdin=theirs.fileno(),
                    cwd=ROOT,
                    env=os.environ | environment,
                )
                self._stream = ours.makefile("rwb")
                if self._killed.is_set():  # while it started
                    self._process.kill()
                theirs.close()
                ours.settimeout(START_S)
                is_ready = receive(self._stream) is not None
                ours.settimeout(limits.wall_s)
        except OSError as error:
            self._end()
            raise PictureWorkerError(f"no process to decode pictures could be started: {error}") from error
        if not is_ready:
            raise PictureWorkerError(f"the process to decode pictures {self._end()} at its start, see the log")

    def _end(self) -> str:
        """Ends the process, if there is one. Returns what became of it."""
        if self._process is None:
            return "is not there"
        process, self._process = self._process, None
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)  # its end of the socket closes a little earlier than it ends
        is_late = process.poll() is None
        process.kill()
        code = process.wait()
        with suppress(OSError):  # what could not be sent
            self._stream.close()
        if is_late:
            return f"took more than {self.limits.wall_s:g} s"
        if code == -signal.SIGPROF:
            return f"took more than {self.limits.cpu_s:g} s of CPU time"
        return f"ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
