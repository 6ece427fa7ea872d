"""Writes the bundle: all files that ship, the manifest with their hashes, and the model card."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file

from edge_runtime.inference.bundle import (
    DRAFT_LABELS,
    INTER_TABLES,
    MANIFEST,
    SCHEMA,
    TABLES,
    FileRecord,
    LatentRecord,
    Manifest,
    TargetRecord,
    file_hash,
)
from edge_runtime.inference.preprocess import PIXELS
from models.backbone import pretrained_lite0
from models.export.draft_export import draft_labels, quantise_draft, write_draft_litert, write_draft_onnx
from models.family import GROUPS, LATENT, decoder_shapes
from models.imagenet import imagenet_classes
from models.lookahead import lookahead_file
from models.recipe import stage3_bottleneck, stage4_head, stage5_symbols, stage7_critic, stage9_draft
from models.recipe.calibration import Measured, measure, measure_head
from models.recipe.stage1_photos import MAX_TOKENS
from models.recipe.stage3_bottleneck import GAINS, REFERENCE
from models.recipe.workspace import Workspace
from models.stored_weights import pack

NAME = "11-bundle"
TIERS = ("edge", "cloud")


def run(work: Workspace, out: Path, licences: dict[str, str]) -> None:
    """Writes the bundle to `out`, replacing what is there."""
    _write_head(work, out)
    for tier in TIERS:
        shutil.copy(work / lookahead_file(tier), out)
        weights = stage7_critic.final_weights(work, tier)
        decoder = {k.removeprefix("decoder."): v for k, v in weights.items() if k.startswith("decoder.")}
        _save(decoder, out / f"{tier}.safetensors")
    draft = stage9_draft.new_draft(work)
    draft.load_state_dict(work.averaged(stage9_draft.CRITIC))
    (out / DRAFT_LABELS).write_bytes(draft_labels(draft))
    int8 = quantise_draft(draft)
    for suffix, files in (("onnx", write_draft_onnx(int8)), ("tflite", write_draft_litert(int8))):
        for part, data in zip(("look", "step"), files, strict=True):
            (out / f"draft_{part}.{suffix}").write_bytes(data)
    measured = measure(work, out)
    _write_manifest(work, out, licences, measured, TIERS)
    work.finish(NAME, measured.quality | {"megabytes": sum(p.stat().st_size for p in out.iterdir()) / 1e6})


def run_head(work: Workspace, out: Path, licences: dict[str, str]) -> None:
    """Writes what there is after stage 5: a bundle that sends features and tells labels, but writes no texts."""
    _write_head(work, out)
    _write_manifest(work, out, licences, measure_head(work), ())


def _write_head(work: Workspace, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in (*stage4_head.BOARD_FILES, TABLES, INTER_TABLES, "vocabulary.txt"):
        shutil.copy(work / name, out / name)
    _save(torch.load(work / "head.pt", weights_only=True), out / "head.safetensors")
    tail = {f"tail.{k}": v for k, v in work.averaged(stage3_bottleneck.NAME, "tail.").items()}
    classifier = {f"classifier.linear.{k}": v for k, v in pretrained_lite0().classifier.state_dict().items()}
    _save(tail | classifier, out / "tail.safetensors")


def _write_manifest(
    work: Workspace, out: Path, licences: dict[str, str], measured: Measured, tiers: Sequence[str]
) -> None:
    """The model card first: the manifest has its hash."""
    (out / "MODEL_CARD.md").write_text(card(manifest_of(work, out, licences, measured, tiers)))
    manifest = manifest_of(work, out, licences, measured, tiers)
    (out / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    save_file(pack(weights), path)


def manifest_of(
    work: Workspace, out: Path, licences: dict[str, str], measured: Measured, tiers: Sequence[str]
) -> Manifest:
    """The manifest of the files in `out`. Nothing in it depends on when or where it is written."""
    shapes = {tier: shape for tier, shape in decoder_shapes(work.vocabulary).items() if tier in tiers}
    return Manifest(
        schema=SCHEMA,
        name=out.name,
        files={p.name: FileRecord(file_hash(p), p.stat().st_size) for p in sorted(out.iterdir()) if p.name != MANIFEST},
        pixels=PIXELS,
        latent=LatentRecord(
            *LATENT,
            groups=GROUPS,
            gains=tuple(round(gain, 6) for gain in GAINS),
            scales=tuple(np.load(work / "scales.npy").tolist()),
            level_bytes=tuple(work.figures(stage5_symbols.NAME)[f"dev_bytes_{level}"] for level in range(len(GAINS))),
            default_level=REFERENCE,
        ),
        vocabulary=work.vocabulary,
        max_tokens=MAX_TOKENS,
        targets={
            tier: TargetRecord(
                f"{tier}.safetensors", s.width, s.heads, s.encoder_layers, s.decoder_layers, s.label_words
            )
            for tier, s in shapes.items()
        },
        tail="tail.safetensors",
        classes=tuple(known.name for known in imagenet_classes()),
        class_ids=tuple(known.wordnet for known in imagenet_classes()),
        licences=licences,
        training_commit=_commit(),
        quality=measured.quality,
        draft_calibration=measured.draft_calibration,
        unsure_below=measured.unsure_below,
        label_temperature=measured.label_temperature,
    )


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def card(manifest: Manifest) -> str:
    """The model card: training data and its terms, what the bundle is for and what it is not for."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in manifest.quality.items())
    terms = "\n".join(f"- {name}: {text}" for name, text in manifest.licences.items())
    return f"""# {manifest.name}

Captions and the thousand classes of ImageNet from {manifest.pixels} x {manifest.pixels} photos: an int8 head and draft
decoder for a board, and the tail, edge and cloud text decoders for servers. English, {manifest.vocabulary} words.


Made by `python -m models.recipe` at commit {manifest.training_commit}.

## Measured by the recipe on its development split

| figure | value |
| --- | --- |
{rows}

`aiflow evaluate` measures the whole chain, bytes included.

## Trained on, and under which terms

{terms}

## For

Showing and measuring split and speculative captioning; a start for training on a camera's own photos.

## Not for

Decisions about people, safety, surveillance of individuals, or commercial use where the terms above forbid it. It has
seen some ten thousand photos: what it has not seen it describes as the nearest thing that it has. It repeats the views
of those who wrote the captions.
"""
