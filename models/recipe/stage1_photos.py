"""Photos, captions and plain text to arrays: pixels [N, 224, 224, 3], tokens, the vocabulary.

A captions TSV has a header line with the columns split, image, caption; photos are in directories or tar files. At
least one photo must be in the split `dev`, since decisions must not be made on training photos. Photos without captions
teach what a picture is, sentences without photos teach what a caption is. Photos named `wordnet id/name.jpg` are for
measuring labels, and are not trained on.
"""

import collections
import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_runtime.capture.picture_files import read_pictures
from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import BOS, EOS, PAD, UNKNOWN
from edge_runtime.inference.preprocess import PIXELS, to_input
from edge_runtime.picture_checks import decode_picture
from models.captions import read_captions, words_of
from models.imagenet import imagenet_classes
from models.recipe.nouns import nouns
from models.recipe.workspace import Workspace

NAME = "1-photos"
SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")
MIN_COUNT = 5  # words in fewer captions are not learnt
MAX_WORDS = 8000
MAX_TOKENS = 24  # per caption, with its end token: 99 % are shorter
CAPTIONS = 5  # kept per photo


@dataclass(frozen=True, slots=True)
class Sources:
    """What the recipe learns from. Only photos with captions are necessary."""

    images: list[Path]  # directories or tars of the photos that the captions name
    captions: list[Path]
    unlabelled: list[Path]  # directories or tars
    texts: list[Path]  # a sentence a line; .gz may be compressed
    labelled: list[Path]  # directories or tars: wordnet id/name.jpg
    vocabulary: Sequence[str] = ()  # of a bundle whose decoders are trained further; none: the most frequent words


def run(work: Workspace, sources: Sources) -> None:
    """Writes vocabulary.txt and, per part, photos, captions and names."""
    captions: dict[str, tuple[str, list[str]]] = {}
    collection: dict[str, int] = {}  # which TSV a photo is from
    for number, tsv in enumerate(sources.captions):
        of_this = read_captions(tsv)
        if both := of_this.keys() & captions.keys():
            raise AiflowError(f"{tsv} names {min(both)}, as another captions file does: rename one of them")
        captions |= of_this
        collection |= dict.fromkeys(of_this, number)
    sentences = [words_of(line) for path in sources.texts for line in lines_of(path)]
    captioned = [words_of(text) for split, texts in captions.values() if split == "train" for text in texts]
    ids = write_vocabulary(work, sources.vocabulary or frequent_words(captioned + sentences))
    named = nouns(captioned + sentences)
    np.save(work / "nouns.npy", np.array([word in named for word in ids]))
    figures = {"vocabulary": len(ids), "sentences": len(sentences)}
    for split in ("train", "dev"):
        names = write_photos(work, split, sources, {n for n, (its, _) in captions.items() if its == split})
        tokens = np.full((len(names), CAPTIONS, MAX_TOKENS + 1), PAD, np.int16)
        for i, name in enumerate(names):
            for j, text in enumerate(captions[name][1][:CAPTIONS]):
                tokens[i, j] = row_of(words_of(text), ids)
        np.save(work / f"captions-{split}.npy", tokens)
        np.save(work / f"collections-{split}.npy", np.array([collection[name] for name in names], np.int16))
        figures[split] = len(names)
    (work / "collections.txt").write_text("".join(f"{tsv.stem}\n" for tsv in sources.captions))
    np.save(work / "sentences.npy", np.array([row_of(s, ids) for s in sentences], np.int16).reshape(-1, MAX_TOKENS + 1))
    unlabelled = [to_input(decode_picture(p.data)) for source in sources.unlabelled for p in read_pictures(source)]
    np.save(work / "photos-unlabelled.npy", np.array(unlabelled, np.uint8).reshape(-1, PIXELS, PIXELS, 3))
    figures |= {"unlabelled": len(unlabelled), "labelled": write_labelled(work, sources.labelled)}
    work.finish(NAME, figures)


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text file, compressed by gzip or not. Raises AiflowError."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            yield from file
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise AiflowError(f"{path}: {error}: name a text file in UTF-8, a sentence a line") from error


def frequent_words(texts: list[list[str]]) -> list[str]:
    """The words of enough texts, the most frequent first, so that the first N are the best N."""
    counts = collections.Counter(word for text in texts for word in set(text))
    by_count = sorted((word for word, count in counts.items() if count >= MIN_COUNT), key=lambda w: (-counts[w], w))
    return [*SPECIAL, *by_count[: MAX_WORDS - len(SPECIAL)]]


def write_vocabulary(work: Workspace, words: Sequence[str]) -> dict[str, int]:
    """Writes vocabulary.txt. Returns the number of each word."""
    (work / "vocabulary.txt").write_text("\n".join(words) + "\n")
    return {word: i for i, word in enumerate(words)}


def row_of(words: list[str], ids: dict[str, int]) -> list[int]:
    """Words to token ids [MAX_TOKENS + 1]: BOS first, EOS last, then PAD."""
    row = [BOS, *(ids.get(word, UNKNOWN) for word in words[: MAX_TOKENS - 1]), EOS]
    return row + [PAD] * (MAX_TOKENS + 1 - len(row))


def write_photos(work: Workspace, split: str, sources: Sources, wanted: set[str]) -> list[str]:
    """Writes photos-<split>; returns their names, in order. Raises AiflowError if photos are missing."""
    photos, names = work.new_array(f"photos-{split}", (len(wanted), PIXELS, PIXELS, 3), np.uint8), list[str]()
    for source in sources.images:
        for picture in read_pictures(source):
            if picture.name in wanted and picture.name not in names:
                photos[len(names)] = to_input(decode_picture(picture.data))
                names.append(picture.name)
    missing = sorted(wanted.difference(names))
    if missing or not names:
        example = f", such as {missing[0]}" if missing else ": name a split `train` and a split `dev`"
        raise AiflowError(f"{len(missing)} {split} photos that the captions name are missing{example}")
    return names


def write_labelled(work: Workspace, sources: list[Path]) -> int:
    """Writes photos-labelled and labels-labelled, the classes' numbers. Raises AiflowError for an unknown class."""
    numbers = {known.wordnet: number for number, known in enumerate(imagenet_classes())}
    photos, labels = list[np.ndarray](), list[int]()
    for source in sources:
        for picture in read_pictures(source):
            wordnet = picture.name.split("/")[0]
            if wordnet not in numbers:
                raise AiflowError(f"{source}: {picture.name} is in no folder named by a WordNet id, such as n02123045/")
            photos.append(to_input(decode_picture(picture.data)))
            labels.append(numbers[wordnet])
    np.save(work / "photos-labelled.npy", np.array(photos, np.uint8).reshape(-1, PIXELS, PIXELS, 3))
    np.save(work / "labels-labelled.npy", np.array(labels, np.int64))
    return len(labels)
