"""Photos in folders named by their classes, checked: what a question is taught with."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
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
    """Photos of at least two classes, in the order of their names."""

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
    names: dict[bytes, str] = {}  # by digest
    of_class: list[str] = []
    unreadable: list[str] = []
    used: list[T] = []
    known: set[str] = set()
    again = 0
    for picture in progress(picture for source in sources for picture in read_pictures(source)):
        label = _class_of(picture.name)
        digest = hashlib.sha256(picture.data).digest()
        if (first := names.get(digest)) is not None and picture.data:
            if _class_of(first) != label:
                raise AiflowError(f"{first} and {picture.name} are the same file in two classes: remove the wrong one")
            again += 1
            continue
        known.add(label)
        if len(known) > MAX_CLASSES:
            raise AiflowError(
                f"the photos have more than {MAX_CLASSES} classes, which no answer can hold: want photos named "
                "class/name.jpg, and fewer classes"
            )
        if len(names) == MAX_PHOTOS:
            raise AiflowError(f"there are more than {MAX_PHOTOS} photos: leave some out, a few per class suffice")
        try:
            result = use(picture)
        except PictureError as error:
            unreadable.append(f"{picture.name} ({error})")
            continue
        names[digest] = picture.name
        of_class.append(label)
        used.append(result)
    if unreadable:
        more = f", and {len(unreadable) - MAX_TOLD} more" if len(unreadable) > MAX_TOLD else ""
        raise AiflowError(
            f"{len(unreadable)} photos cannot be read, remove or replace them: {'; '.join(unreadable[:MAX_TOLD])}{more}"
        )
    if len(used) < MIN_PHOTOS:
        raise AiflowError(f"there are {len(used)} different photos, want at least {MIN_PHOTOS}: add some")
    classes = tuple(sorted(known))
    if len(classes) < 2:
        raise AiflowError(f"all photos are of the class {classes[0]!r}: add a folder with photos of another one")
    return ClassPhotos(list(names.values()), classes, np.array([classes.index(c) for c in of_class]), again), used


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
