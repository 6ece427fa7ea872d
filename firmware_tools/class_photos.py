"""Photos in folders named by their classes, checked: what a question is taught with."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime.capture.picture_files import Picture, read_pictures
from edge_runtime.errors import AiflowError
from edge_runtime.picture_checks import PictureError
from models.questions import MAX_CLASS, MAX_CLASSES, MAX_PHOTOS

MIN_PHOTOS = 3
MAX_TOLD = 5  # photos that a message names

T = TypeVar("T")


@dataclass(frozen=True)
class ClassPhotos:
    """Different photos of at least two classes, two of one class or more, in the order of their names."""

    names: list[str]
    classes: tuple[str, ...]  # in alphabetical order
    labels: NDArray[np.int64]  # of each photo, a place in `classes`
    again: int  # photos left out, since the same file is there already, in the same class


def read_class_photos(
    sources: Sequence[Path],
    use: Callable[[Picture], T],
    progress: Callable[[Iterable[Picture]], Iterable[Picture]] = lambda pictures: pictures,
) -> tuple[ClassPhotos, list[T]]:
    """The photos class/name.jpg of directories and tars, and what `use` made of each, which may raise PictureError.

    Raises AiflowError, which names the photos and what to do; PictureError for a source without photos.
    """
    # All photos are read twice. So mistakes in names and duplicates are found before the first call of `use`, which is
    # slow, and the photos need not be in memory together.
    photos, left = _check(sources)
    used: list[T] = []
    unreadable: list[str] = []
    for picture in progress(_read(sources)):
        digest = _digest(picture)
        if left.get(digest) != picture.name:
            continue  # the same file again, or one that has changed
        del left[digest]
        try:
            used.append(use(picture))
        except PictureError as error:
            unreadable.append(f"{picture.name} ({error})")
    if unreadable:
        raise AiflowError(f"{len(unreadable)} photos cannot be read, remove or replace them: {_told(unreadable)}")
    if left:
        raise AiflowError(f"{len(left)} photos changed while they were read: {_told(list(left.values()))}: try again")
    return photos, used


def _check(sources: Sequence[Path]) -> tuple[ClassPhotos, dict[bytes, str]]:
    """The photos without what is in them, and their names by digest. Raises AiflowError, PictureError."""
    names: dict[bytes, str] = {}
    of_class: list[str] = []
    known: set[str] = set()
    again = 0
    for picture in _read(sources):
        label, digest = _class_of(picture.name), _digest(picture)
        if (first := names.get(digest)) is not None:
            if _class_of(first) != label:
                raise AiflowError(f"{first} and {picture.name} are the same file in two classes: remove the wrong one")
            again += 1
            continue
        if len(names) == MAX_PHOTOS:
            raise AiflowError(f"there are more than {MAX_PHOTOS} photos: leave some out, a few per class suffice")
        names[digest] = picture.name
        of_class.append(label)
        known.add(label)
        if len(known) > MAX_CLASSES:
            raise AiflowError(
                f"the photos have more than {MAX_CLASSES} classes, which no answer can hold: want photos named "
                "class/name.jpg, and fewer classes"
            )
    if len(names) < MIN_PHOTOS:
        raise AiflowError(f"there are {len(names)} different photos, want at least {MIN_PHOTOS}: add some")
    classes = tuple(sorted(known))
    if len(classes) < 2:
        raise AiflowError(f"all photos are of the class {classes[0]!r}: add a folder with photos of another one")
    if len(classes) == len(names):
        raise AiflowError(
            f"each of the {len(classes)} classes has one photo, so no accuracy can be measured: want two different "
            "photos of a class or more"
        )
    labels = np.array([classes.index(label) for label in of_class])
    return ClassPhotos(list(names.values()), classes, labels, again), names


def _read(sources: Sequence[Path]) -> Iterator[Picture]:
    return (picture for source in sources for picture in read_pictures(source))


def _digest(picture: Picture) -> bytes:
    """Of the file. Of the name if the file cannot be read: each such file is to be named, and none is a copy."""
    return hashlib.sha256(picture.data or picture.name.encode(errors="surrogateescape")).digest()


def _told(names: Sequence[str]) -> str:
    return "; ".join(names[:MAX_TOLD]) + (f", and {len(names) - MAX_TOLD} more" if len(names) > MAX_TOLD else "")


def _class_of(name: str) -> str:
    label = PurePosixPath(name).parent.name
    if not label:
        raise AiflowError(f"photo {name} is in no folder: want class/name.jpg, such as open/1.jpg")
    if len(label) > MAX_CLASS or not label.isprintable() or '"' in label:  # a condition puts it in quotes
        raise AiflowError(
            f"class {label[:MAX_CLASS]!r}: want a name of 1 to {MAX_CLASS} printable characters without quotes: "
            "rename the folder"
        )
    return label
