"""The thousand classes of ImageNet (ILSVRC 2012), in the order of a pretrained network's logits, named for people.

Several of the published names are one word for two things ("crane"), or say little ("Cardigan"): these were changed
here. The WordNet ids are the published ones.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class ImageNetClass:
    """One class."""

    wordnet: str  # its synset in WordNet 3.0, such as n02123045
    name: str  # different from all others


@cache
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """The classes in the order of the logits."""
    table = files("models").joinpath("imagenet.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in table.splitlines()[1:])
    return tuple(ImageNetClass(wordnet, name) for wordnet, name in rows)
