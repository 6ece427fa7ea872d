"""`aiflow teach`: a question that a server answers from the features of each frame, taught with a few photos."""

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.capture.picture_files import Picture
from edge_runtime.config import QUESTION
from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import Bundle
from models import SHIPPED_BUNDLE
from testbed.argument_types import PHOTOS, new_file
from testbed.terminal import markdown_table, print_table, track

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from firmware_tools.class_photos import ClassPhotos
    from models.questions import Evidence, Question
    from models.teaching import Taught

LEAST_SURE = 5  # photos that are shown
ENOUGH = 10  # photos of a class; with fewer, its accuracy is not reliable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", type=_name, help="what boards ask, such as gate")
    parser.add_argument(
        "--images",
        **PHOTOS,
        required=True,
        help="photos named class/name.jpg, from ten per class on, as the camera sees them",
    )
    parser.add_argument(
        "--from-events",
        type=Path,
        metavar="DIR",
        help="first sort the frames of this folder, such as a camera's in [kept_frames], into --images on a page",
    )
    parser.add_argument("--classes", type=_classes, metavar="A,B", help="with --from-events: the classes to sort into")
    parser.add_argument("--out", type=new_file, metavar="FILE", help="default: <name>.safetensors")
    parser.add_argument("--bundle", type=Path, default=SHIPPED_BUNDLE, help="the boards' (default: the shipped bundle)")
    parser.add_argument("--backend", choices=["onnx", "litert"], default="onnx")


def _classes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if len(set(names)) < len(names) or len(names) < 2 or not all(re.fullmatch(r"[\w -]{1,64}", name) for name in names):
        raise argparse.ArgumentTypeError(f"{text!r}, want two names or more, such as open,closed")
    return names


def _name(text: str) -> str:
    if not re.fullmatch(QUESTION, text):
        raise argparse.ArgumentTypeError(
            f'{text!r}, want 1 to 32 of the characters A-Z, a-z, 0-9, _ and -, but not "label"'
        )
    return text


def run(args: argparse.Namespace) -> None:
    """Writes the question and prints what to expect of it."""
    from edge_runtime.inference.bundle import open_bundle

    bundle = open_bundle(args.bundle)
    if args.from_events:
        _sort(args)
    photos, taught, question = learn(bundle, args.images, args.backend)
    out = args.out or Path(f"{args.name}.safetensors")
    try:
        question.write(out)
    except OSError as error:
        raise AiflowError(f"{out} cannot be written: {error.strerror}: name another --out, or make room") from error
    _print_report(photos, taught)
    print(
        f"{out}: {args.name}, {len(photos.names)} photos, expected accuracy {question.record.accuracy:.3f}"
        f"{_without(photos)}\n"
        f'server.toml, below [questions]:   {args.name} = "{out}"\n'
        f'board.toml, below [[cameras]]:   questions = ["{args.name}"]'
    )


def learn(bundle: Bundle, images: Sequence[Path], backend: str) -> "tuple[ClassPhotos, Taught, Question]":
    """A question from photos class/name.jpg of directories and tars. Raises AiflowError, PictureError."""
    from models.teaching import inputs, label_directions, teach

    photos, known, rows = _read(bundle, images, backend)
    directions = label_directions(rows)
    with_labels, alone = (inputs(each, directions) for each in zip(*known, strict=True))
    taught = teach(with_labels, photos.labels, len(photos.classes), alone)
    return photos, taught, _question(bundle, photos, taught, directions)


def _sort(args: argparse.Namespace) -> None:
    """Shows the page until all frames are sorted, or the user ends it."""
    from firmware_tools.label_page import Labels, LabelServer

    if not args.classes or len(args.images) != 1 or args.images[0].is_file():
        raise AiflowError(
            "--from-events wants --classes, such as open,closed, and one folder for --images to sort into"
        )
    try:
        labels = Labels(args.from_events, args.classes, args.images[0])
    except OSError as error:
        raise AiflowError(
            f"{args.from_events} cannot be read: {error.strerror}: copy it, or run as its owner"
        ) from error
    with LabelServer(labels) as server:
        print(f"sort the frames in a browser on this machine: {server.address}", flush=True)
        server.serve_until_done()


def _read(
    bundle: Bundle, images: Sequence[Path], backend: str
) -> "tuple[ClassPhotos, list[tuple[Evidence, Evidence]], NDArray[np.float32]]":
    """The photos; what a server knows of each with the board's labels, and without; the rows of its classifier.

    It knows the symbols as they arrive: int8 head, encoded, decoded, tail.
    """
    import numpy as np

    from benchmarks.quality import Chain
    from firmware_tools.class_photos import read_class_photos
    from models.questions import FEATURES
    from server.loading import load_engine

    # One thread, so that the same photos give the same bytes on every number of cores.
    engine = load_engine(bundle, (), threads=1)
    chain = Chain(bundle, "split", backend, "edge", engine)

    def known(picture: Picture) -> "tuple[Evidence, Evidence]":
        job = chain.job(chain.send(picture))
        with_labels, alone = (engine.evidence([each])[0] for each in (job, replace(job, labels={})))
        return with_labels, alone

    photos, found = read_class_photos(images, known, lambda pictures: track(pictures, "photos"))
    rows = engine.classifier.linear.weight.numpy() if engine.classifier else np.zeros((0, FEATURES), np.float32)
    return photos, found, rows


def _question(bundle: Bundle, photos: "ClassPhotos", taught: "Taught", directions: "NDArray[np.float32]") -> "Question":
    from models.questions import FEATURES, Question, Record

    record = Record(
        photos.classes,
        bundle.id.hex(),
        bundle.manifest.name,
        taught.temperature,
        taught.temperature_alone,
        len(photos.names),
        taught.accuracy(photos.labels),
    )
    of_features, of_labels = taught.weight[:, :FEATURES], taught.weight[:, FEATURES:]
    return Question(record, of_features.copy(), of_labels @ directions.T, taught.bias)


def _without(photos: "ClassPhotos") -> str:
    """Classes with one photo, of which the expected accuracy says nothing: a layer without it does not know them."""
    counts = Counter(photos.labels.tolist())
    alone = [name for label, name in enumerate(photos.classes) if counts[label] == 1]
    return f" (without {', '.join(alone)}: one photo cannot be tried)" if alone else ""


def _print_report(photos: "ClassPhotos", taught: "Taught") -> None:
    """Per class what to expect, and the photos that were hardest to tell, which may be in the wrong folder."""
    counts = Counter(photos.labels.tolist())
    found = taught.held_out.argmax(1)
    rows = [("class", "photos", "right")]
    for label, name in enumerate(photos.classes):
        of_class = photos.labels == label
        right = f"{(found[of_class] == label).mean():.2f}" if counts[label] > 1 else "-"
        rows.append((name, str(counts[label]), right))
    print_table(markdown_table(rows))
    for label, name in enumerate(photos.classes):
        if counts[label] < ENOUGH:
            print(f"class {name} has too few photos for a reliable accuracy: {counts[label]}, want {ENOUGH} or more")
    if photos.again:
        print(f"{photos.again} photos left out: the same files are there twice")
    rows = [("least sure", "taken for", "probability of its class")]
    own = taught.held_out[range(len(photos.labels)), photos.labels]
    for i in [i for i in own.argsort(kind="stable") if own[i] == own[i]][:LEAST_SURE]:
        rows.append((photos.names[i], photos.classes[found[i]], f"{own[i]:.2f}"))
    print_table(markdown_table(rows))
