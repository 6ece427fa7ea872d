"""What the demo and the benchmarks look at: freely licensed photos that pip packages carry, or the user's own.

Nothing is downloaded: the photos lie in the wheels of packages of the `demo` extra, which are not imported.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import cv2

from edge_runtime.capture.picture_checks import PictureError, decode_picture
from edge_runtime.capture.picture_files import Picture, read_pictures

logger = logging.getLogger(__name__)

# Package, path in it, name, credit and licence as its documentation states them.
SHIPPED = (
    ("skimage", "data/chelsea.png", "cat", "Stéfan van der Walt, CC0"),
    ("skimage", "data/astronaut.png", "astronaut", "NASA, public domain"),
    ("skimage", "data/camera.png", "photographer", "Lav Varshney, CC0"),
    ("sklearn", "datasets/images/china.jpg", "temple", "danielbuechele, flickr 6061409035, CC BY 2.0"),
    ("skimage", "data/rocket.jpg", "rocket", "SpaceX, public domain"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "portrait", "US Navy, public domain"),
    ("sklearn", "datasets/images/flower.jpg", "flower", "vultilion, flickr 6056698931, CC BY 2.0"),
    ("skimage", "data/coffee.png", "coffee", "Rachel Michetti, CC0"),
)


@dataclass(frozen=True, slots=True)
class Photo:
    """One picture that can be decoded."""

    name: str
    data: bytes  # JPEG, PNG or WebP
    credit: str = ""


def collect(images: Sequence[Path] | None = None, video: Path | None = None, limit: int | None = None) -> list[Photo]:
    """The user's pictures, stills of a video, or the shipped photos. Raises PictureError when there is none."""
    found: Iterator[Photo]
    if video:
        found = stills(video)
    elif images:
        found = (Photo(p.name, p.data) for source in images for p in read_pictures(source) if is_readable(p))
    else:
        found = shipped()
    photos = list(islice(found, limit))
    if not photos:
        raise PictureError(
            "no picture can be read: name others, or pip install 'aiflow-edge[demo]' for the shipped ones"
        )
    return photos


def shipped() -> Iterator[Photo]:
    """The photos of the packages that are installed."""
    for package, path, name, credit in SHIPPED:
        spec = find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            file = Path(folder) / path
            if file.is_file():
                yield Photo(name, file.read_bytes(), credit)


def stills(video: Path) -> Iterator[Photo]:
    """A JPEG of every second of a video file. Raises PictureError for a file without a frame."""
    capture = cv2.VideoCapture(str(video), cv2.CAP_FFMPEG)
    try:
        if not capture.grab():
            raise PictureError(f"{video} cannot be read as a video: is the path right and the codec known?")
        stride = max(1, round(capture.get(cv2.CAP_PROP_FPS) or 25.0))
        number, more = 0, True
        while more:
            if number % stride == 0:
                ok, pixels = capture.retrieve()
                if ok:
                    jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
                    yield Photo(f"{video.stem} {number // stride} s", jpeg)
            number, more = number + 1, capture.grab()
    finally:
        capture.release()


def is_readable(picture: Picture) -> bool:
    """Whether it can be decoded; one that cannot is named in the log."""
    try:
        decode_picture(picture.data)
    except PictureError as error:
        logger.warning("picture unreadable name=%s error=%s", picture.name, error)
        return False
    return True
