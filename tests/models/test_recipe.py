"""The recipe from photos to a bundle, with hardly any training: what it writes is what boards and servers take."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from safetensors.torch import load_file

from edge_runtime.capture.picture_files import read_pictures
from edge_runtime.inference.bundle import open_bundle
from edge_runtime.inference.networks import load_draft, load_head
from edge_runtime.inference.preprocess import to_input
from edge_runtime.picture_checks import decode_picture
from models.recipe import __main__ as recipe
from models.recipe import (
    stage3_bottleneck,
    stage6_targets,
    stage7_critic,
    stage9_draft,
    stage10_lookahead,
)
from models.recipe.workspace import Workspace, shortened
from server.engine import Job
from server.loading import load_engine, ready_engine
from tests import exports

SMALL = (  # what is trained on in a step
    (stage3_bottleneck, {"PHOTOS": 4, "OTHERS": 2}),
    (stage6_targets, {"PHOTOS": 4, "SENTENCES": 2}),
    (stage7_critic, {"PHOTOS": 2}),
    (stage9_draft, {"BATCH": 8, "PHOTOS": 2}),
    (stage10_lookahead, {"BATCH": 4}),
)
TEXTS = ("a red dog runs on green grass", "a dog runs on grass", "the red dog is on the grass")


TRAINED = (
    "3-bottleneck",
    "6-targets-cloud",
    "7-critic-cloud",
    "6-targets-edge",
    "7-critic-edge",
    "9-draft",
    "9-draft-critic",
    "10-lookahead-edge",
)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photos with captions, two of them for development, and nothing else."""
    folder = tmp_path_factory.mktemp("recipe")
    rows = ["split\timage\tcaption"]
    (folder / "photos").mkdir()
    for number, pixels in enumerate(exports.pictures(10, seed=3).numpy()):
        name = f"{number}.jpg"
        cv2.imwrite(str(folder / "photos" / name), pixels)
        rows += [f"{'dev' if number < 2 else 'train'}\t{name}\t{text}" for text in TEXTS]
    (folder / "captions.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def make_bundle(folder: Path) -> Iterator[Callable[..., None]]:
    """Runs the recipe's command, with further arguments, with hardly any training."""
    torch.set_num_threads(1)  # two threads wait for each other when other programs use the cores
    paths = {"images": "photos", "captions": "captions.tsv", "work": "work", "out": "bundle"}
    arguments = [part for name, path in paths.items() for part in (f"--{name}", str(folder / path))]
    with pytest.MonkeyPatch.context() as patch:
        for module, sizes in SMALL:
            for name, size in sizes.items():
                patch.setattr(module, name, size)
        patch.setattr(recipe, "shortened", lambda settings, _: shortened(settings, 1e-4))

        def make(*more: object) -> None:
            patch.setattr(sys, "argv", ["recipe", *arguments, *map(str, more)])
            recipe.main()

        yield make


@pytest.fixture(scope="module")
def interruptions(make_bundle: Callable[..., None]) -> list[str]:
    """The stages that were interrupted, each after its last evaluation; the same command was repeated until the end."""
    interrupted: list[str] = []
    finish = Workspace.finish

    def interrupt_once(work: Workspace, stage: str, figures: dict[str, Any]) -> None:
        if stage not in interrupted:
            interrupted.append(stage)
            raise KeyboardInterrupt
        finish(work, stage, figures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "finish", interrupt_once)
        for _ in range(20):
            with suppress(KeyboardInterrupt):
                make_bundle()
                return interrupted
    raise AssertionError("the recipe did not come to its end")


def test_an_interruption_before_its_figures_are_written_costs_a_stage_no_training(
    interruptions: list[str], folder: Path
) -> None:
    assert set(TRAINED) < set(interruptions)
    for stage in TRAINED:
        figures = json.loads((folder / "work" / f"{stage}.json").read_text())
        assert figures["steps"] == 1
        assert figures["loss"] > 0  # of the training before the interruption
    assert not list((folder / "work").glob("*.partial"))


def test_photos_and_captions_alone_become_a_bundle_that_answers(interruptions: list[str], folder: Path) -> None:
    bundle = open_bundle(folder / "bundle")
    assert len(bundle.manifest.classes) == len(bundle.manifest.class_ids) == 1000
    picture = next(iter(read_pictures(folder / "photos")))
    symbols = load_head(bundle, "onnx", 1).symbols(to_input(decode_picture(picture.data)))
    draft = load_draft(bundle, "onnx", 1).write(symbols).tokens
    engine = ready_engine(bundle, ("edge", "cloud"))
    for tier in ("edge", "cloud"):
        alone, verified = engine.answer([Job(symbols, tier=tier), Job(symbols, draft=draft, tier=tier)])
        assert alone.tokens == verified.tokens
        assert not alone.error
    assert engine.lookaheads.keys() == {"edge", "cloud"}


def test_a_directory_without_photos_is_named_in_one_line(folder: Path, tmp_path: Path) -> None:
    options = ["--images", tmp_path, "--captions", folder / "captions.tsv", "--work", tmp_path / "work"]
    command = [sys.executable, "-m", "models.recipe", *map(str, options), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("models.recipe: ")
    assert str(tmp_path) in result.stderr
    assert "Traceback" not in result.stderr


def test_the_same_command_again_trains_nothing(
    interruptions: list[str], make_bundle: Callable[..., None], folder: Path
) -> None:
    bundle_id = open_bundle(folder / "bundle").id
    written = {path: path.stat().st_mtime_ns for path in (folder / "work").glob("*.pt")}
    make_bundle()
    assert {path: path.stat().st_mtime_ns for path in (folder / "work").glob("*.pt")} == written
    assert open_bundle(folder / "bundle").id == bundle_id


def test_decoders_alone_are_trained_for_the_head_of_another_bundle(
    interruptions: list[str], make_bundle: Callable[..., None], folder: Path, tmp_path: Path
) -> None:
    make_bundle("--head-only", "--out", tmp_path / "head")
    head = open_bundle(tmp_path / "head")
    assert head.manifest.targets == {}
    assert load_engine(head, ()).label_logits(torch.rand(1, 49, 1280))[0].shape == (1000,)
    make_bundle("--head", tmp_path / "head", "--work", tmp_path / "work", "--out", tmp_path / "whole")
    whole = open_bundle(tmp_path / "whole")
    assert whole.manifest.targets.keys() == {"edge", "cloud"}
    for name in ("head.onnx", "head.tflite", "head.safetensors", "tables.bin", "tail.safetensors"):
        assert whole.manifest.files[name] == head.manifest.files[name]
    assert whole.manifest.latent == head.manifest.latent


def test_the_decoders_of_a_bundle_are_trained_further(
    interruptions: list[str], make_bundle: Callable[..., None], folder: Path, tmp_path: Path
) -> None:
    first = folder / "bundle"
    make_bundle("--fine-tune", first, "--work", tmp_path / "work", "--out", tmp_path / "further")
    further, weights = open_bundle(tmp_path / "further"), {}
    assert further.words == open_bundle(first).words
    for path in (first, tmp_path / "further"):
        weights[path] = load_file(path / "cloud.safetensors")["tokens.weight"].float()
    one, other = weights.values()
    assert 0 < (one - other).abs().max() < 0.01  # after one step with a rate that begins low
