"""Photos for the demo and the benchmarks: the user's own, or freely licensed ones from installed packages.

Nothing is downloaded: the photos are files in packages of the `demo` extra. Those packages are not imported.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_runtime.capture.picture_files import Picture, read_pictures
from edge_runtime.inference import preprocess
from edge_runtime.packages import how_to_install
from edge_runtime.picture_checks import PictureError, decode_picture

logger = logging.getLogger(__name__)

# Package, path in it, name, credit and licence, as stated in the package's documentation.
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

# The demo's question is taught with these photos, by class, and asked about the others.
TAUGHT = {"nobody": ("temple", "flower", "coffee"), "somebody": ("astronaut", "photographer")}

MAX_TOLD = 5  # pictures that a message names


@dataclass(frozen=True, slots=True)
class Photo:
    """A picture that can be decoded."""

    name: str
    data: bytes  # JPEG, PNG or WebP
    credit: str = ""


def collect(images: Sequence[Path] | None = None, limit: int | None = None) -> list[Photo]:
    """The user's pictures, or the shipped photos. Raises PictureError if there are none."""
    pictures = (picture for source in images or () for picture in read_pictures(source))
    failed: list[str] = []
    users = (Photo(picture.name, picture.data) for picture in pictures if is_readable(picture, failed))
    photos = list(islice(users if images else shipped(), limit))
    if not photos and failed:
        raise PictureError(f"no picture can be read, name others: {'; '.join(failed)}")
    if not photos:
        raise PictureError(
            f"no picture can be read: name others, or, for the shipped ones, {how_to_install('skimage')}"
        )
    return photos


def frames(images: Sequence[Path] | None, limit: int) -> Iterator[NDArray[np.uint8]]:
    """uint8 RGB [H, W, 3]: the user's photos; or of each shipped photo the whole, its mirror image and its quarters."""
    photos = (decode_picture(photo.data) for photo in collect(images, limit=limit))
    return photos if images else islice((view for photo in photos for view in _views(photo)), limit)


def _views(photo: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    y, x = photo.shape[0] // 2, photo.shape[1] // 2
    for view in (photo, photo[:, ::-1], photo[:y, :x], photo[:y, x:], photo[y:, :x], photo[y:, x:]):
        yield np.ascontiguousarray(view)


def write_taught(folder: Path) -> int:
    """Writes class/name.png for the photos of TAUGHT: each whole, its four corners, and all of these mirrored.

    Returns how many it has written: 0 if a photo is not installed.
    """
    found = {photo.name: photo for photo in shipped()}
    classes = {name: label for label, names in TAUGHT.items() for name in names}
    if not found.keys() >= classes.keys():
        return 0
    views = [
        (Path(label, f"{name}-{number}.png"), np.ascontiguousarray(view))
        for name, label in classes.items()
        for number, view in enumerate(
            v for crop in _crops(decode_picture(found[name].data)) for v in (crop, crop[:, ::-1])
        )
    ]
    for path, view in views:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(cv2.imencode(".png", cv2.cvtColor(view, cv2.COLOR_RGB2BGR))[1].tobytes())
    return len(views)


def _crops(photo: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """The whole, and the corners with 80 % of width and height."""
    y, x = photo.shape[0] // 5, photo.shape[1] // 5
    yield from (photo, photo[:-y, :-x], photo[:-y, x:], photo[y:, :-x], photo[y:, x:])


def shipped() -> Iterator[Photo]:
    """The photos of the installed packages."""
    for package, path, name, credit in SHIPPED:
        spec = find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            file = Path(folder) / path
            if file.is_file():
                yield Photo(name, file.read_bytes(), credit)


def shrunk_jpeg(pixels: NDArray[np.uint8], longest: int, quality: int) -> bytes:
    """uint8 RGB [H, W, 3] as a JPEG, shrunk if its longer side has more than `longest` pixels."""
    return preprocess.to_jpeg(preprocess.shrunk(pixels, longest), quality)


def is_readable(picture: Picture, failed: list[str]) -> bool:
    """True if it can be decoded; otherwise its name is logged. `failed` gets the first names with their reasons."""
    try:
        decode_picture(picture.data)
    except PictureError as error:
        logger.warning("picture unreadable name=%s error=%s", picture.name, error)
        if len(failed) < MAX_TOLD:
            failed.append(f"{picture.name} ({error})")
        return False
    return True
