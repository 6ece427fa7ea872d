"""How quality is counted: CIDEr and BLEU of texts, and which photos have which captions."""

import math
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks.quality import EvaluationError, Photos, score
from models.captions import words_of

REFERENCES = {
    "a.jpg": ["A brown dog runs over the wet grass .", "The dog is running"],
    "b.jpg": ["Two children play with a red ball .", "Kids with a ball on the beach"],
    "c.jpg": ["A man climbs up a steep rock wall", "A climber in blue hangs from a cliff"],
}
TEXTS = {
    "a.jpg": "a dog runs over the grass",
    "b.jpg": "two children play on the beach",
    "c.jpg": "a man in blue climbs a rock",
}


def bleu4(references: dict[str, list[list[str]]], texts: dict[str, list[str]]) -> float:
    """Corpus BLEU-4, Papineni et al. 2002, sections 2.1 to 2.3, written down once more."""
    logs, length = 0.0, sum(map(len, texts.values()))
    wanted = sum(min((abs(len(r) - len(texts[n])), len(r)) for r in rows)[1] for n, rows in references.items())
    for n in range(1, 5):
        matched = total = 0
        for name, text in texts.items():
            found = Counter(zip(*(text[i:] for i in range(n)), strict=False))
            most: Counter[tuple[str, ...]] = Counter()
            for row in references[name]:
                most |= Counter(zip(*(row[i:] for i in range(n)), strict=False))
            matched += (found & most).total()
            total += found.total()
        logs += math.log(matched / total) / 4
    return min(1.0, math.exp(1 - wanted / length)) * math.exp(logs)


def test_bleu_is_that_of_the_paper():
    references = {name: [words_of(text) for text in rows] for name, rows in REFERENCES.items()}
    expected = bleu4(references, {name: text.split() for name, text in TEXTS.items()})
    assert 0 < expected < 0.9
    assert score(REFERENCES, TEXTS)["bleu4"] == pytest.approx(expected, rel=1e-6)


def test_a_persons_own_words_score_the_most():
    alone = {name: rows[:1] for name, rows in REFERENCES.items()}
    perfect = score(alone, {name: rows[0] for name, rows in alone.items()})
    assert perfect["bleu4"] == pytest.approx(1)
    # CIDEr-D is ten times a cosine (Vedantam et al. 2015, section 4): words of all photos weigh nothing.
    assert perfect["cider"] == pytest.approx(10, abs=0.01)
    assert score(alone, TEXTS)["cider"] < 8


def test_capitals_and_punctuation_do_not_count():
    shouted = {name: f"{text.upper()} !" for name, text in TEXTS.items()}
    assert score(REFERENCES, shouted) == score(REFERENCES, TEXTS)


def test_the_order_of_photos_and_of_references_does_not_count():
    turned = {name: REFERENCES[name][::-1] for name in reversed(REFERENCES)}
    assert score(turned, TEXTS) == pytest.approx(score(REFERENCES, TEXTS))


def test_every_reference_counts():
    seconds = {name: rows[1] for name, rows in REFERENCES.items()}
    assert score(REFERENCES, seconds)["bleu4"] == pytest.approx(1)


def test_texts_of_other_photos_and_empty_texts_score_nothing():
    names = list(TEXTS)
    shifted = {name: REFERENCES[names[i - 1]][0] for i, name in enumerate(names)}
    assert score(REFERENCES, shifted)["cider"] < 0.2
    assert score(REFERENCES, dict.fromkeys(TEXTS, ""))["cider"] == 0


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four photos in two folders."""
    for number in range(4):
        path = tmp_path / ("cat" if number % 2 else "dog") / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cv2.imencode(".jpg", np.full((8, 8, 3), 40 * number, np.uint8))[1].tobytes())
    return tmp_path


def test_photos_are_matched_by_path_then_by_name_and_the_others_are_told_of(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = {"cat/1.jpg": [], "2.jpg": []}
    assert [photo.name for photo in Photos([photos], captions)] == ["cat/1.jpg", "2.jpg"]
    assert "2 photos left out: the table, or its split, has no caption" in capsys.readouterr().err
    assert [photo.name for photo in Photos([photos], captions, limit=1)] == ["cat/1.jpg"]


def test_a_photo_that_is_met_twice_is_refused(photos: Path) -> None:
    (photos / "dog" / "1.jpg").write_bytes((photos / "cat" / "1.jpg").read_bytes())
    with pytest.raises(EvaluationError, match=r"photo 1\.jpg is there twice, as cat/1\.jpg and dog/1\.jpg"):
        list(Photos([photos], {"1.jpg": []}))
    assert len(list(Photos([photos] * 2))) == 10
