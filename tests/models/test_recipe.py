"""The recipe from photos to a bundle, with hardly any training: what it writes is what boards and servers take."""

import sys
from pathlib import Path

import cv2
import pytest
import torch

from edge_runtime.app import load_draft, load_head
from edge_runtime.capture.picture_checks import decode_picture
from edge_runtime.capture.picture_files import read_pictures
from edge_runtime.inference.bundle import open_bundle
from edge_runtime.inference.preprocess import to_input
from models.recipe import __main__ as recipe
from models.recipe import stage3_bottleneck, stage6_targets, stage7_critic, stage9_draft, stage10_lookahead
from models.recipe.workspace import shortened
from server.engine import Job
from server.loading import load_engine
from server.numerics import prove
from tests import exports

SMALL = (  # what is trained on in a step
    (stage3_bottleneck, {"PHOTOS": 4, "CLASS_PHOTOS": 2}),
    (stage6_targets, {"TEXTS": 20, "CLASS_PHOTOS": 2}),
    (stage7_critic, {"PHOTOS": 2}),
    (stage9_draft, {"BATCH": 8}),
    (stage10_lookahead, {"BATCH": 4}),
)
TEXTS = ("a red dog runs on green grass", "a dog runs on grass", "the red dog is on the grass")


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Ten photos with captions, two of them for development, and no class photos."""
    rows = ["split\timage\tcaption"]
    (tmp_path / "photos").mkdir()
    for number, pixels in enumerate(exports.pictures(10, seed=3).numpy()):
        name = f"{number}.jpg"
        cv2.imwrite(str(tmp_path / "photos" / name), pixels)
        rows += [f"{'dev' if number < 2 else 'train'}\t{name}\t{text}" for text in TEXTS]
    (tmp_path / "captions.tsv").write_text("\n".join(rows) + "\n")
    paths = {"images": "photos", "captions": "captions.tsv", "work": "work", "out": "bundle"}
    return [part for name, path in paths.items() for part in (f"--{name}", str(tmp_path / path))]


@pytest.mark.timeout(600)
def test_photos_and_captions_alone_become_a_bundle_that_answers(inputs: list[str], tmp_path: Path, monkeypatch) -> None:
    torch.set_num_threads(1)  # two wait for each other where other programs use the cores
    for module, sizes in SMALL:
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(recipe, "shortened", lambda settings, _: shortened(settings, 1e-4))
    monkeypatch.setattr(sys, "argv", ["recipe", *inputs])
    recipe.main()

    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.classes == ()
    picture = next(iter(read_pictures(tmp_path / "photos")))
    symbols = load_head(bundle, "auto", 1).symbols(to_input(decode_picture(picture.data)))
    draft = load_draft(bundle, "auto", 1).write(symbols).tokens
    engine = load_engine(bundle, ("edge", "cloud"))
    engine.proof = prove(engine)
    for tier in ("edge", "cloud"):
        alone, verified = engine.answer([Job(symbols, tier=tier), Job(symbols, draft=draft, tier=tier)])
        assert alone.tokens == verified.tokens
        assert not alone.error
    assert engine.lookaheads.keys() == {"edge", "cloud"}

    # The same command again trains nothing: every stage's figures are there.
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.pt")}
    recipe.main()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.pt")} == written
    assert open_bundle(tmp_path / "bundle").id == bundle.id
