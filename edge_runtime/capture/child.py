"""Cameras that only a program of the board can read: it writes JPEGs into a pipe, and we read them.

The Raspberry Pi's ribbon-cable (CSI) camera by rpicam-vid, a Jetson's by GStreamer: OpenCV's wheels open neither.
"""

import os
import selectors
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from edge_runtime.capture.frame import CameraError, NewestFrame, arrived, stalled
from edge_runtime.capture.jpeg_stream import JpegStream
from edge_runtime.capture.processes import end, ending_with_parent
from edge_runtime.config import CameraConfig
from edge_runtime.logs import printable

READ_BYTES = 1 << 16  # what a pipe holds
POLL_S = 0.2  # how often it looks whether it has been abandoned
START_S = 8.0  # for the first picture, besides stall_s
MAX_LAST_WORDS = 200  # characters of the program's last line
WIDTH, HEIGHT, FPS = 1280, 720, 10  # the defaults


@dataclass(frozen=True, slots=True)
class Program:
    """A program that writes JPEGs."""

    names: tuple[str, ...]  # newest first
    package: str  # of Debian, which has it
    arguments: Callable[[CameraConfig, int], list[str]]  # for a camera, and the descriptor to write to
    writes_to_stdout: bool


def _rpicam(camera: CameraConfig, _: int) -> list[str]:
    """raspberrypi.com/documentation/computers/camera_software.html; --flush writes each picture at once."""
    width, height, fps = _size(camera)
    size = ["--width", str(width), "--height", str(height), "--framerate", str(fps)]
    return ["--nopreview", "--timeout", "0", "--codec", "mjpeg", *size, "--flush", "--output", "-"]


def _nvargus(camera: CameraConfig, descriptor: int) -> list[str]:
    """docs.nvidia.com/jetson, "Accelerated GStreamer". nvarguscamerasrc writes messages to its standard output."""
    width, height, fps = _size(camera)
    return [
        *("-q", "nvarguscamerasrc", "!", f"video/x-raw(memory:NVMM),width={width},height={height}", "!"),
        *("videorate", "drop-only=true", f"max-rate={fps}", "!", "nvvidconv", "!", "video/x-raw,format=I420", "!"),
        *("jpegenc", "!", "fdsink", f"fd={descriptor}", "sync=false"),
    ]


def _size(camera: CameraConfig) -> tuple[int, int, int]:
    return camera.width or WIDTH, camera.height or HEIGHT, camera.fps or FPS


PROGRAMS = {
    "rpicam": Program(("rpicam-vid", "libcamera-vid"), "rpicam-apps-lite", _rpicam, writes_to_stdout=True),
    "nvargus": Program(("gst-launch-1.0",), "gstreamer1.0-tools", _nvargus, writes_to_stdout=False),
}


def missing_program(source: str) -> str:
    """What to install for a source; "" if its program is there."""
    program = PROGRAMS[source]
    if any(map(shutil.which, program.names)):
        return ""
    return f'source = "{source}" needs the program {program.names[0]}: sudo apt install {program.package}'


class ChildPictures:
    """One run of a camera's program; see live.Capture."""

    def __init__(self, camera: CameraConfig) -> None:
        self._camera = camera

    def hang_up(self) -> None:
        """Nothing to do: `run` never waits longer than POLL_S."""

    def run(self, slot: NewestFrame, abandoned: threading.Event) -> bool:
        """Ends with the program, which never outlives this. Raises CameraError with the program's last words."""
        if missing := missing_program(self._camera.source):
            raise CameraError(missing)
        program, camera = PROGRAMS[self._camera.source], self._camera
        name = next(filter(shutil.which, program.names))
        read_end, write_end = os.pipe()
        try:
            command = [name, *program.arguments(camera, write_end)]
            process = subprocess.Popen(
                ending_with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=write_end if program.writes_to_stdout else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(write_end,),
                start_new_session=True,  # Ctrl-C in a terminal ends the board, and the board ends the program
            )
        except OSError as error:
            os.close(read_end)
            raise CameraError(f"{name} cannot be started: {error.strerror}") from error
        finally:
            os.close(write_end)
        try:
            last_words = self._read(process, read_end, slot, abandoned)
        finally:
            os.close(read_end)
            ended = end(process)
        if abandoned.is_set():
            return True
        said = f": {last_words}" if last_words else ""
        raise CameraError(f"{name} {ended}{said}")

    def _read(
        self, process: "subprocess.Popen[bytes]", read_end: int, slot: NewestFrame, abandoned: threading.Event
    ) -> str:
        """Until the program closes its pipe. Returns the last line of its standard error."""
        stream, said, silent_at = JpegStream(), b"", time.monotonic() + START_S + self._camera.stall_s
        assert process.stderr is not None
        messages = process.stderr.fileno()
        with selectors.DefaultSelector() as selector:
            for descriptor in (read_end, messages):
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ)
            while not abandoned.is_set() and read_end in selector.get_map():
                for key, _ in selector.select(POLL_S):
                    with suppress(BlockingIOError):
                        data = os.read(key.fd, READ_BYTES)
                        if not data:
                            selector.unregister(key.fd)
                        elif key.fd == messages:
                            said = (said + data)[-READ_BYTES:]
                        else:
                            for picture in stream.feed(data):
                                slot.put(arrived(self._camera.name, picture))
                                silent_at = time.monotonic() + self._camera.stall_s
                if time.monotonic() > silent_at:  # seen here, since the board may wait for the next frame for hours
                    raise stalled(self._camera.stall_s)
            with suppress(BlockingIOError):
                said += os.read(messages, READ_BYTES)
        lines = said.decode(errors="replace").split("\n")
        return printable(next((line.strip() for line in reversed(lines) if line.strip()), ""), MAX_LAST_WORDS)
