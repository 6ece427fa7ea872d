"""Which reader a source has, the readers of files, and what is looked at before the start.

A reader is a generator. It ends when its source has ended or `stop` is set, and raises an error when the source fails.
A live source keeps only its newest frame: a slow board skips frames instead of queueing them.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from edge_runtime.capture.child import missing_program
from edge_runtime.capture.frame import CameraError, Counters, Frame
from edge_runtime.capture.live import live_frames
from edge_runtime.capture.picture_files import SUFFIXES, read_pictures
from edge_runtime.capture.video_capture import DriverError, VideoCapture
from edge_runtime.config import CameraConfig
from edge_runtime.config.camera_source import SCHEMES, kind_of, path_of, scheme_of
from edge_runtime.logs import printable
from edge_runtime.picture_checks import PictureError, decode_picture
from edge_runtime.shutdown import DriverThread

logger = logging.getLogger(__name__)

ANSWER_S = 5.0  # for a drive, before the start; all cameras together must stay below the service's TimeoutStartSec


def reader_of(camera: CameraConfig) -> Callable[[CameraConfig, threading.Event, Counters], Iterator[Frame]]:
    """The reader of a source, but for "mqtt", "frigate" and "watch:", which remember what they have read."""
    kind = kind_of(camera.source)
    if kind == "video":
        return video_frames
    return file_frames if kind == "pictures" else live_frames


def file_frames(camera: CameraConfig, stop: threading.Event, counters: Counters) -> Iterator[Frame]:
    """The pictures of a directory, a tar or a single file, in order. Unreadable pictures are logged and left out.

    Raises PictureError if the source holds no picture.
    """
    while not stop.is_set():
        for picture in read_pictures(Path(camera.source)):
            started = time.monotonic()
            try:
                pixels = decode_picture(picture.data)
            except PictureError as error:
                counters.unreadable += 1
                name = printable(picture.name)
                logger.warning("picture unreadable camera=%s name=%s error=%s", camera.name, name, error)
            else:
                yield Frame(camera.name, pixels, time.time(), time.monotonic(), picture.name, picture.data)
                del pixels  # see Frame
            if stop.wait(max(0.0, camera.min_interval_s - (time.monotonic() - started))):
                return
        if not camera.repeat:
            return


def video_frames(camera: CameraConfig, stop: threading.Event, counters: Counters) -> Iterator[Frame]:
    """Frames of a video file, one per interval of the video's own time. Ends with the file unless `repeat` is set.

    Raises PictureError if no frame of the file can be decoded.
    """
    while not stop.is_set():
        with _open_video(camera, stop) as capture:
            stride = max(1, round((capture.fps or 25.0) * camera.min_interval_s))
            number, more = 0, True
            while more and not stop.is_set():
                if number % stride == 0:
                    started = time.monotonic()
                    pixels = capture.retrieve()
                    if pixels is not None:
                        yield Frame(camera.name, pixels, time.time(), started, f"{Path(camera.source).name}#{number}")
                    else:
                        counters.unreadable += not stop.is_set()
                    del pixels  # see Frame
                    stop.wait(max(0.0, camera.min_interval_s - (time.monotonic() - started)))
                number, more = number + 1, capture.grab() is not None
        if not camera.repeat:
            return


def _open_video(camera: CameraConfig, stop: threading.Event) -> VideoCapture:
    """With its first frame grabbed. Raises PictureError, and DriverError if opening it hangs or crashes."""
    try:
        capture = VideoCapture(camera, stop)
    except DriverError:
        raise
    except CameraError as error:
        raise PictureError(f"{camera.source} {error}") from error
    try:
        if capture.grab() is None and not stop.is_set():
            raise PictureError(f"{camera.source} has no frame that can be decoded: is it a complete video?")
    except BaseException:
        capture.close()
        raise
    return capture


def check_source(camera: CameraConfig) -> tuple[str, str]:
    """Looks at a source once, on this thread. Returns an error and a warning, "" for none.

    The error is what can never work: an unknown scheme, a missing program, a file that is no picture, video or tar. The
    warning is what may pass by itself: a path that does not exist yet or cannot be read, a directory without a picture.
    Does not contact streams.
    """
    kind = kind_of(camera.source)
    if "\0" in camera.source:
        return "its source contains a zero byte", ""
    if kind in ("device", "watch", "video", "pictures"):
        return _check_path(camera)
    if kind == "address" and (scheme := scheme_of(camera.source)) not in SCHEMES:
        known = f"want one of {', '.join(SCHEMES)}, or the path of a file"
        return f"{scheme[:32]}:// is an unknown kind of stream: {known}", ""
    return missing_program(camera.source) if kind in ("rpicam", "nvargus") else "", ""


def no_answer(seconds: float) -> str:
    """What a drive does, for messages."""
    return f"has not answered for {seconds:g} s: is its drive, or the server of that, there?"


def _ask_drive(path: Path) -> None:
    """Raises TimeoutError if a call for the path blocks, as on a network drive whose server is away.

    The thread of the call is left behind then.
    """

    def ask() -> None:
        with suppress(OSError):
            path.stat()

    asking = DriverThread(target=ask, name=f"check-{path.name}")
    asking.start()
    asking.join(ANSWER_S)
    if asking.is_alive():
        raise TimeoutError(errno.ETIMEDOUT, f"it {no_answer(ANSWER_S)}")


def _check_path(camera: CameraConfig) -> tuple[str, str]:
    kind = kind_of(camera.source)
    path = Path(path_of(camera.source))
    try:
        _ask_drive(path)
        if path.is_file():
            path.open("rb").close()
        path.stat()
        if kind == "watch" and not path.is_dir():
            return f"{path} is not a folder: name the folder that gets the pictures", ""
        if kind == "video":
            _open_video(camera, threading.Event()).close()
        elif kind == "pictures":
            first = next(read_pictures(path))
            if path.suffix.lower() in SUFFIXES and path.is_file():
                decode_picture(first.data)
    except FileNotFoundError:
        return "", f"{path} does not exist yet"
    except OSError as error:
        return "", f"{path} cannot be read: {error.strerror}"
    except PictureError as error:
        # A directory may be mounted or filled later.
        return (str(error), "") if path.is_file() else ("", str(error))
    except DriverError as error:
        return "", f"{path}: {error}"
    return "", ""
