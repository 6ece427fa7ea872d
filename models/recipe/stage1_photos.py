"""Photos and captions to arrays: pixels [N, 224, 224, 3], caption tokens, the vocabulary, splits.

The TSV has a header line with the columns split, image, caption; photos are in directories or tar files. Class photos
are named `class/name.jpg`. At least one photo must be in the split `dev`, since decisions must not be made on training
photos.
"""

import collections
from pathlib import Path

import numpy as np

from edge_runtime.capture.picture_checks import decode_picture
from edge_runtime.capture.picture_files import read_pictures
from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import BOS, EOS, PAD, UNKNOWN
from edge_runtime.inference.preprocess import PIXELS, to_input
from models.captions import read_captions, words_of
from models.recipe.workspace import Workspace

NAME = "1-photos"
SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")
MIN_COUNT = 4  # words in fewer captions are not learnt
MAX_TOKENS = 24  # per caption, with its end token: 99 % are shorter
CAPTIONS = 5  # kept per photo
CLASS_STAND_INS = 64


class RecipeError(AiflowError, ValueError):
    """Input that the recipe cannot train on."""


def run(work: Workspace, images: list[Path], tsv: Path, classes: list[Path]) -> None:
    """Writes photos, captions, class photos and vocabulary.txt."""
    captions = read_captions(tsv)
    counts = collections.Counter(
        w for split, texts in captions.values() if split == "train" for t in texts for w in set(words_of(t))
    )
    words = [*SPECIAL, *sorted(w for w, n in counts.items() if n >= MIN_COUNT)]
    (work / "vocabulary.txt").write_text("\n".join(words) + "\n")
    ids = {word: i for i, word in enumerate(words)}

    splits: dict[str, list[str]] = {"train": [], "dev": []}
    for name, (split, _) in captions.items():
        splits.setdefault(split, []).append(name)
    found: dict[str, tuple[str, int]] = {}
    arrays = {
        split: work.new_array(f"photos-{split}", (len(splits[split]), PIXELS, PIXELS, 3), np.uint8)
        for split in ("train", "dev")
    }
    for source in images:
        for picture in read_pictures(source):
            split = captions.get(picture.name, ("", []))[0]
            if split in arrays:
                index = sum(1 for s, _ in found.values() if s == split)
                arrays[split][index] = to_input(decode_picture(picture.data))
                found[picture.name] = (split, index)
    for split in arrays:
        names = [name for name, (s, _) in found.items() if s == split]
        missing = sorted(set(splits[split]) - set(names))
        if missing or not names:
            example = f", such as {missing[0]}" if missing else ": name a split `train` and a split `dev`"
            raise RecipeError(f"{len(missing)} {split} photos that {tsv} names are missing{example}")
        (work / f"names-{split}.txt").write_text("\n".join(names) + "\n")
        tokens = np.full((len(names), CAPTIONS, MAX_TOKENS + 1), PAD, np.int16)
        for i, name in enumerate(names):
            texts = captions[name][1]
            for j in range(CAPTIONS):
                row = [BOS, *(ids.get(w, UNKNOWN) for w in words_of(texts[j % len(texts)])[: MAX_TOKENS - 1]), EOS]
                tokens[i, j, : len(row)] = row
        np.save(work / f"captions-{split}.npy", tokens)

    pictures = [picture for source in classes for picture in read_pictures(source)]
    labels = sorted({picture.name.split("/")[0] for picture in pictures})
    (work / "classes.txt").write_text("".join(f"{label}\n" for label in labels))
    if pictures:
        photos = np.stack([to_input(decode_picture(picture.data)) for picture in pictures])
        numbers = [labels.index(picture.name.split("/")[0]) for picture in pictures]
    else:  # no classes: later stages train on a few photos of one class, which the bundle leaves out
        photos, numbers = arrays["train"][:CLASS_STAND_INS], [0] * min(CLASS_STAND_INS, len(arrays["train"]))
    np.save(work / "photos-classes.npy", photos)
    np.save(work / "labels-classes.npy", np.array(numbers, np.int64))
    work.finish(
        NAME,
        {
            "train": len(splits["train"]),
            "dev": len(splits["dev"]),
            "classes": len(labels),
            "class_photos": len(pictures),
            "vocabulary": len(words),
        },
    )
