import json
import math
import shutil
from collections import Counter
from functools import partial

import cv2
import msgspec
import numpy as np
import pytest

from edge_runtime.inference.bundle import MANIFEST, open_bundle
from firmware_tools import cli
from firmware_tools.evaluate import EvaluationError, Photos, score
from models.captions import words_of
from server.numerics import prove

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


# ---- through the command, on a small bundle with random weights ----

KEYS = {
    "images",
    "cider",
    "bleu4",
    "bytes_mean",
    "bytes_p95",
    "tokens_mean",
    "proposed_mean",
    "accepted_mean",
    "passes_mean",
    "identical_to_tier",
    "images_per_second",
}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Four photos in two folders, with captions; and an engine that proves few shapes, since all take a while."""
    monkeypatch.setattr("server.numerics.prove", partial(prove, sizes=(1, 2)))
    rows = ["split\timage\tcaption"]
    for number in range(4):
        path = tmp_path / "photos" / ("cat" if number % 2 else "dog") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
        path.write_bytes(cv2.imencode(".jpg", coarse.repeat(40, 0).repeat(40, 1))[1].tobytes())
        rows += [f"{'dev' if number else 'train'}\t{number}.jpg\tword{number} word5 {words}" for words in ("a b", "c")]
    (tmp_path / "captions.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def evaluate(folder, bundle, kind, *arguments):
    figures = folder / "figures.json"
    images, where = ["--images", str(folder / "photos")], ["--bundle", str(bundle.path), "--json", str(figures)]
    code = cli.main(["evaluate", kind, *images, *where, *arguments])
    return code, json.loads(figures.read_text()) if figures.exists() else None


@pytest.mark.parametrize("paradigm", ["device", "split", "speculative", "offload", "auto"])
def test_captions_are_scored_through_every_paradigm(photos, board_bundle, paradigm):
    tsv = str(photos / "captions.tsv")
    code, figures = evaluate(
        photos, board_bundle, "caption", "--captions", tsv, "--split", "dev", "--paradigm", paradigm
    )
    assert code == 0
    assert figures.keys() >= KEYS
    assert (figures["images"], figures["identical_to_tier"]) == (3, 1.0)
    assert (figures["bytes_mean"] > 0) == (paradigm != "device")
    assert (figures["proposed_mean"] > 0) == (paradigm in ("speculative", "auto"))
    assert figures["tokens_mean"] > 0


@pytest.mark.parametrize(("floor", "standing"), [("0.8", 1.0), ("1", 0.0)])
def test_drafts_that_are_worth_the_floor_stand_and_cost_no_byte(photos, board_bundle, tmp_path, floor, standing):
    shutil.copytree(board_bundle.path, tmp_path / "sure")
    manifest = msgspec.structs.replace(board_bundle.manifest, draft_calibration=((0.0, 0.85), (1.0, 0.95)))
    (tmp_path / "sure" / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    arguments = ["--captions", str(photos / "captions.tsv"), "--paradigm", "auto", "--quality-floor", floor]
    code, figures = evaluate(photos, open_bundle(tmp_path / "sure"), "caption", *arguments)
    assert (code, figures["images"], figures["drafts_standing"]) == (0, 4, standing)
    assert (figures["bytes_mean"] == 0) == (standing == 1)
    assert (figures["passes_mean"] == 0) == (standing == 1)


def test_a_quality_floor_that_is_none_is_refused(photos, board_bundle, capsys):
    arguments = ["--captions", str(photos / "captions.tsv"), "--paradigm", "auto", "--quality-floor", "1.5"]
    with pytest.raises(SystemExit):
        evaluate(photos, board_bundle, "caption", *arguments)
    assert "'1.5', want a number from 0 to 1" in capsys.readouterr().err


def test_a_classifier_is_scored_by_the_names_of_folders(photos, board_bundle):
    code, figures = evaluate(photos, board_bundle, "classify", "--limit", "3")
    assert code == 0
    assert figures["images"] == 3
    assert figures["accuracy"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    assert figures["bytes_mean"] > 0


def test_photos_without_captions_are_refused(photos, board_bundle, capsys):
    (photos / "captions.tsv").write_text("split\timage\tcaption\ndev\tother.jpg\ta\n")
    code, figures = evaluate(
        photos, board_bundle, "caption", "--captions", str(photos / "captions.tsv"), "--paradigm", "device"
    )
    assert (code, figures) == (1, None)
    assert "do the names in the TSV match the files?" in capsys.readouterr().err


def test_photos_are_matched_by_path_then_by_name_and_the_others_are_told_of(photos, capsys):
    captions = {"cat/1.jpg": [], "2.jpg": []}
    assert [photo.name for photo in Photos([photos / "photos"], captions)] == ["cat/1.jpg", "2.jpg"]
    assert "2 photos left out: the table, or its split, has no caption" in capsys.readouterr().err
    assert [photo.name for photo in Photos([photos / "photos"], captions, limit=1)] == ["cat/1.jpg"]


def test_a_photo_that_is_met_twice_is_refused(photos):
    (photos / "photos" / "dog" / "1.jpg").write_bytes((photos / "photos" / "cat" / "1.jpg").read_bytes())
    with pytest.raises(EvaluationError, match=r"photo 1\.jpg is met twice, as cat/1\.jpg and dog/1\.jpg"):
        list(Photos([photos / "photos"], {"1.jpg": []}))
    assert len(list(Photos([photos / "photos"] * 2))) == 10  # of classes nobody asks which photo it is


def test_an_unreadable_photo_is_left_out_and_counted(photos, board_bundle):
    (photos / "photos" / "cat" / "1.jpg").write_bytes(b"no picture")
    code, figures = evaluate(photos, board_bundle, "classify")
    assert (code, figures["images"], figures["unreadable"]) == (0, 3, 1)


def test_a_class_that_the_bundle_does_not_know_is_refused(photos, board_bundle, capsys):
    (photos / "photos" / "cat").rename(photos / "photos" / "car")
    code, figures = evaluate(photos, board_bundle, "classify")
    assert (code, figures) == (1, None)
    assert "class 'car' is none of cat, dog, horse" in capsys.readouterr().err
