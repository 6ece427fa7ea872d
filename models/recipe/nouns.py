"""Which words of a vocabulary name things, guessed from how captions use them.

A sentence without a photo teaches a decoder what the labels of a photo are for: the words that name something in the
sentence stand in for labels. No dictionary is needed for that: in captions a noun stands before the end, a preposition
or "is", and mostly somewhere after an article.
"""

import collections
from collections.abc import Iterable, Sequence

BEFORE = frozenset(("a", "an", "the", "his", "her", "their", "its", "two", "three", "some", "several", "many", "of"))
_VERBS = ("is", "are", "was", "were", "has", "wearing", "standing", "sitting", "holding", "playing")
_OTHERS = ("and", "while", "that", "as", "who", "which", "next")
_PLACES = (
    "in",
    "on",
    "at",
    "with",
    "of",
    "to",
    "near",
    "by",
    "for",
    "from",
    "over",
    "through",
    "behind",
    "under",
    "into",
)
AFTER = frozenset((*_VERBS, *_OTHERS, *_PLACES))
MIN_COUNT = 10
MIN_AFTER, MIN_BEFORE = 0.45, 0.05  # shares of a word's uses
MIN_BEFORE_PARTICIPLE = 0.3  # "a building" but "is standing"


def nouns(sentences: Iterable[Sequence[str]]) -> set[str]:
    """The words that are mostly used as nouns."""
    count, before, after = collections.Counter[str](), collections.Counter[str](), collections.Counter[str]()
    for words in sentences:
        for last, word, following in zip(["", *words], words, [*words[1:], ""], strict=False):
            count[word] += 1
            before[word] += last in BEFORE
            after[word] += following in AFTER or not following
    return {
        word
        for word, uses in count.items()
        if uses >= MIN_COUNT
        and word not in BEFORE | AFTER
        and after[word] >= MIN_AFTER * uses
        and before[word] >= (MIN_BEFORE_PARTICIPLE if word.endswith(("ing", "ed")) else MIN_BEFORE) * uses
    }
