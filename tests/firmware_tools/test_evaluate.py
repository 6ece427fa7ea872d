import json
import shutil

import cv2
import msgspec
import numpy as np
import pytest

from edge_runtime.inference.bundle import MANIFEST, open_bundle
from firmware_tools import cli
from server.numerics import prove

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
    monkeypatch.setattr("server.loading.prove", lambda engine, _: prove(engine, (1, 2)))
    rows = ["split\timage\tcaption"]
    for number in range(4):
        path = tmp_path / "photos" / ("cat" if number % 2 else "dog") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number + 4).integers(0, 256, (6, 8, 3), np.uint8)
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
    assert figures["images"] == 3
    assert (figures["bytes_mean"] > 0) == (paradigm != "device")
    if paradigm == "device":  # nobody was asked, so there is nothing to compare
        assert {figures[name] for name in ("identical_to_tier", "proposed_mean", "passes_mean")} == {None}
    else:
        assert figures["identical_to_tier"] == 1.0
        assert (figures["proposed_mean"] > 0) == (paradigm in ("speculative", "auto"))
    assert figures["tokens_mean"] > 0


@pytest.mark.parametrize(("floor", "accepted"), [("0.8", 1.0), ("1", 0.0)])
def test_a_draft_that_reaches_the_quality_floor_is_accepted_and_costs_no_byte(
    photos, board_bundle, tmp_path, floor, accepted
):
    shutil.copytree(board_bundle.path, tmp_path / "sure")
    manifest = msgspec.structs.replace(board_bundle.manifest, draft_calibration=((0.0, 0.85), (1.0, 0.95)))
    (tmp_path / "sure" / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    arguments = ["--captions", str(photos / "captions.tsv"), "--paradigm", "auto", "--quality-floor", floor]
    code, figures = evaluate(photos, open_bundle(tmp_path / "sure"), "caption", *arguments)
    assert (code, figures["images"], figures["drafts_accepted_by_board"]) == (0, 4, accepted)
    assert (figures["bytes_mean"] == 0) == (accepted == 1)
    assert (figures["passes_mean"] is None) == (accepted == 1)


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


def test_an_unreadable_photo_is_left_out_and_counted(photos, board_bundle):
    (photos / "photos" / "cat" / "1.jpg").write_bytes(b"no picture")
    code, figures = evaluate(photos, board_bundle, "classify")
    assert (code, figures["images"], figures["unreadable"]) == (0, 3, 1)


def test_a_class_that_the_bundle_does_not_know_is_refused(photos, board_bundle, capsys):
    (photos / "photos" / "cat").rename(photos / "photos" / "car")
    code, figures = evaluate(photos, board_bundle, "classify")
    assert (code, figures) == (1, None)
    assert "class 'car' is none of cat, dog, horse" in capsys.readouterr().err


def test_a_photo_without_a_folder_of_its_class_is_told_how_to_name_it(photos, board_bundle, capsys):
    (photos / "photos" / "cat" / "1.jpg").rename(photos / "photos" / "1.jpg")
    code, figures = evaluate(photos, board_bundle, "classify")
    assert (code, figures) == (1, None)
    assert "1.jpg is in no folder: want class/name.jpg" in capsys.readouterr().err


def test_photos_of_which_none_can_be_read_are_named(photos, board_bundle, capsys):
    for photo in (photos / "photos").rglob("*.jpg"):
        photo.write_bytes(b"no picture")
    code, figures = evaluate(photos, board_bundle, "classify")
    assert (code, figures) == (1, None)
    assert "no picture can be read, name others: cat/1.jpg (" in capsys.readouterr().err
