"""Writes the bundle: all files that ship, the manifest with their hashes, and the model card."""

import shutil
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file

from edge_runtime.inference import draft_calibration as confidence
from edge_runtime.inference.backends import load_model
from edge_runtime.inference.bundle import (
    BOS,
    EOS,
    MANIFEST,
    PAD,
    SCHEMA,
    FileRecord,
    LatentRecord,
    Manifest,
    TargetRecord,
    file_hash,
)
from edge_runtime.inference.draft import Draft
from edge_runtime.inference.preprocess import PIXELS
from models.backbone import pretrained_lite0
from models.export.draft_export import quantise_draft, write_draft_litert, write_draft_onnx
from models.family import LATENT, DraftDecoder, decoder_shapes
from models.lookahead import lookahead_file
from models.recipe import stage5_symbols, stage6_targets, stage7_critic, stage9_draft
from models.recipe.scores import ciders
from models.recipe.stage4_head import float_symbols, trained_head
from models.recipe.workspace import Workspace

NAME = "11-bundle"
KNOWN = 0.95  # share of the class photos that the backbone must recognise for its own rows to be used
FLOAT_CHECK = 256  # dev photos on which the float head's symbols are compared


def run(work: Workspace, out: Path, licences: dict[str, str]) -> None:
    """Writes the bundle to `out`, replacing what is there."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in ("head.onnx", "head.tflite", "tables.bin", "vocabulary.txt"):
        shutil.copy(work / name, out / name)
    for tier in ("edge", "cloud"):
        shutil.copy(work / lookahead_file(tier), out)
    _save(torch.load(work / "head.pt", weights_only=True), out / "head.safetensors")
    targets = {tier: stage7_critic.final_weights(work, tier) for tier in ("edge", "cloud")}
    shared = {k: v for k, v in targets["cloud"].items() if not k.startswith("decoder.")}
    if own := backbone_rows(work):
        shared |= own
    _save(shared, out / "tail.safetensors")
    for tier, weights in targets.items():
        _save(
            {k.removeprefix("decoder."): v for k, v in weights.items() if k.startswith("decoder.")},
            out / f"{tier}.safetensors",
        )
    draft = DraftDecoder(work.vocabulary)
    draft.load_state_dict(work.averaged(stage9_draft.NAME))
    int8 = quantise_draft(draft)
    for suffix, files in (("onnx", write_draft_onnx(int8)), ("tflite", write_draft_litert(int8))):
        for part, data in zip(("look", "step"), files, strict=True):
            (out / f"draft_{part}.{suffix}").write_bytes(data)

    quality, calibration = measure(work, out)
    manifest = manifest_of(work, out, licences, quality, calibration)
    (out / "MODEL_CARD.md").write_text(card(manifest))
    manifest = manifest_of(work, out, licences, quality, calibration)
    (out / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
    work.finish(NAME, quality | {"megabytes": sum(p.stat().st_size for p in out.iterdir()) / 1e6})


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Saves as float16: half the size, and still much finer than the noise of training."""
    save_file({k: v.to(torch.float16).contiguous() for k, v in weights.items()}, path)


def backbone_rows(work: Workspace) -> dict[str, torch.Tensor] | None:
    """Rows of the backbone's own classifier, if it recognises every class in uncompressed photos; else None.

    With few photos per class, a new classifier overfits to the tail's training photos; the backbone's rows were learned
    on others. A class gets the row with the highest mean probability on its photos.
    """
    labels = torch.from_numpy(np.load(work / "labels-classes.npy")).long()
    if not len(labels):
        return None
    backbone, views = pretrained_lite0(), work.array("cut-classes")
    with torch.inference_mode():
        maps = torch.from_numpy(np.array(views[: len(labels)])).permute(0, 3, 1, 2).float()
        logits = torch.cat([backbone.rest(some)[1] for some in torch.tensor_split(maps, 1 + len(maps) // 100)])
    means = torch.stack([logits.softmax(-1)[labels == label].mean(0) for label in range(work.classes)])
    rows = means.argmax(1)
    is_known = (logits[:, rows].argmax(1) == labels).float().mean() >= KNOWN
    if len(set(rows.tolist())) < work.classes or not is_known:
        return None
    linear = backbone.classifier
    return {
        "classifier.linear.weight": linear.weight.detach()[rows],
        "classifier.linear.bias": linear.bias.detach()[rows],
    }


def measure(work: Workspace, out: Path) -> tuple[dict[str, float], confidence.Table]:
    """The figures that the recipe can measure on the dev split, and the calibration of the draft's confidence.

    `aiflow evaluate` measures the whole chain.
    """
    symbols = work.array("symbols-dev")
    quality = {"dev_latent_bytes": work.figures(stage5_symbols.NAME)["dev_bytes"]}
    for tier in ("edge", "cloud"):
        figures = stage6_targets.evaluate(work, tier, stage7_critic.final_weights(work, tier))
        quality[f"dev_cider_{tier}"] = figures["cider"]
    for suffix in ("onnx", "tflite"):
        look, step = (load_model(out / f"draft_{part}.{suffix}") for part in ("look", "step"))
        draft = Draft(look, step, max_tokens=24)
        drafts = [draft.write(s) for s in symbols]
        texts = [[token for token in drafted.tokens if token != EOS] for drafted in drafts]
        scores = ciders(work, "dev", texts)
        quality[f"dev_cider_draft_{suffix}"] = float(np.mean(scores))
    wanted = [[int(token) for token in row if token not in (BOS, EOS, PAD)] for row in np.load(work / "texts-dev.npy")]
    calibration = confidence.fit([drafted.confidence for drafted in drafts], scores, ciders(work, "dev", wanted))
    quality["dev_drafts_equal"] = float(np.mean([text == whole for text, whole in zip(texts, wanted, strict=True)]))
    unquantised = float_symbols(trained_head(work), work.array("photos-dev")[:FLOAT_CHECK])
    quality["head_int8_equal_symbols"] = float((unquantised == symbols[:FLOAT_CHECK]).mean())
    rounded = tuple((round(at, 4), round(worth, 4)) for at, worth in calibration)
    return {name: round(value, 4) for name, value in quality.items()}, rounded


def manifest_of(
    work: Workspace, out: Path, licences: dict[str, str], quality: dict[str, float], calibration: confidence.Table
) -> Manifest:
    """The manifest of the files in `out`. Nothing in it depends on when or where it is written."""
    shapes = decoder_shapes(work.vocabulary)
    return Manifest(
        schema=SCHEMA,
        name=out.name,
        files={p.name: FileRecord(file_hash(p), p.stat().st_size) for p in sorted(out.iterdir()) if p.name != MANIFEST},
        pixels=PIXELS,
        latent=LatentRecord(*LATENT, groups=stage5_symbols.GROUPS, gains=(1.0,)),
        vocabulary=work.vocabulary,
        max_tokens=shapes["cloud"].max_tokens,
        targets={
            tier: TargetRecord(f"{tier}.safetensors", s.width, s.heads, s.encoder_layers, s.decoder_layers)
            for tier, s in shapes.items()
        },
        tail="tail.safetensors",
        classes=tuple((work / "classes.txt").read_text().split()),
        licences=licences,
        training_commit=_commit(),
        quality=quality,
        draft_calibration=calibration,
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

Captions and ten object classes from {manifest.pixels} x {manifest.pixels} photos: an int8 head and draft decoder for a
board, and the tail, edge and cloud text decoders for servers. English, {manifest.vocabulary} words, everyday scenes.

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
seen some six thousand amateur photos, mostly of people, dogs and sports outdoors: what it has not seen it describes as
the nearest thing that it has, with confidence. It repeats the views of those who wrote the captions.
"""
