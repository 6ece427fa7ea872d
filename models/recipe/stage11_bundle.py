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
    INTER_TABLES,
    MANIFEST,
    PAD,
    SCHEMA,
    TABLES,
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
from models.family import GROUPS, LATENT, DraftDecoder, decoder_shapes
from models.imagenet import imagenet_classes
from models.lookahead import lookahead_file
from models.recipe import stage5_symbols, stage6_targets, stage7_critic, stage9_draft
from models.recipe.scores import ciders
from models.recipe.stage3_bottleneck import GAINS, REFERENCE
from models.recipe.stage4_head import float_symbols, trained_head
from models.recipe.workspace import Workspace

NAME = "11-bundle"
FLOAT_CHECK = 256  # dev photos on which the float head's symbols are compared


def run(work: Workspace, out: Path, licences: dict[str, str]) -> None:
    """Writes the bundle to `out`, replacing what is there."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in ("head.onnx", "head.tflite", TABLES, INTER_TABLES, "vocabulary.txt"):
        shutil.copy(work / name, out / name)
    for tier in ("edge", "cloud"):
        shutil.copy(work / lookahead_file(tier), out)
    _save(torch.load(work / "head.pt", weights_only=True), out / "head.safetensors")
    targets = {tier: stage7_critic.final_weights(work, tier) for tier in ("edge", "cloud")}
    classifier = {f"classifier.linear.{k}": v for k, v in pretrained_lite0().classifier.state_dict().items()}
    _save({k: v for k, v in targets["cloud"].items() if k.startswith("tail.")} | classifier, out / "tail.safetensors")
    for tier, weights in targets.items():
        _save(
            {k.removeprefix("decoder."): v for k, v in weights.items() if k.startswith("decoder.")},
            out / f"{tier}.safetensors",
        )
    draft = DraftDecoder(min(work.vocabulary, stage9_draft.DRAFT_WORDS))
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


def measure(work: Workspace, out: Path) -> tuple[dict[str, float], confidence.Table]:
    """The figures that the recipe can measure on the dev split, and the calibration of the draft's confidence.

    `aiflow evaluate` measures the whole chain.
    """
    codes = work.array("codes-dev")
    quality: dict[str, float] = {}
    for tier in ("edge", "cloud"):
        figures = stage6_targets.evaluate(work, tier, stage7_critic.final_weights(work, tier))
        quality |= {f"{tier}_{name}": value for name, value in figures.items()}
    texts_of_cloud = np.load(work / "texts-dev.npy")
    wanted = [[int(token) for token in row if token not in (BOS, EOS, PAD)] for row in texts_of_cloud]
    samples: list[tuple[float, float, float]] = []  # confidence, score, score of the cloud's text
    for suffix in ("onnx", "tflite"):
        look, step = (load_model(out / f"draft_{part}.{suffix}") for part in ("look", "step"))
        draft = Draft(look, step, max_tokens=24)
        drafts = [draft.write(each) for each in stage5_symbols.symbols(work, codes, len(GAINS) - 1)]
        texts = [[token for token in drafted.tokens if token != EOS] for drafted in drafts]
        samples = []
        collections, names = np.load(work / "collections-dev.npy"), (work / "collections.txt").read_text().split()
        for number in np.unique(collections):
            photos = np.flatnonzero(collections == number)
            scores = ciders(work, "dev", photos, [texts[i] for i in photos])
            best = ciders(work, "dev", photos, [wanted[i] for i in photos])
            quality[f"draft_{suffix}_cider_{names[number]}"] = float(np.mean(scores))
            samples += zip([drafts[i].confidence for i in photos], scores, best, strict=True)
    quality["drafts_equal"] = float(np.mean([text == whole for text, whole in zip(texts, wanted, strict=True)]))
    confidences, scores, best = (list(column) for column in zip(*samples, strict=True))
    calibration = confidence.fit(confidences, scores, best)
    some = work.array("photos-dev")[:FLOAT_CHECK]
    unquantised = float_symbols(trained_head(work), some, GAINS[REFERENCE])
    sent = stage5_symbols.symbols(work, codes[:FLOAT_CHECK], REFERENCE)
    quality["head_int8_equal_symbols"] = float((unquantised == sent).mean())
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
        latent=LatentRecord(
            *LATENT,
            groups=GROUPS,
            gains=tuple(round(gain, 6) for gain in GAINS),
            scales=tuple(np.load(work / "scales.npy").tolist()),
            level_bytes=tuple(work.figures(stage5_symbols.NAME)[f"dev_bytes_{level}"] for level in range(len(GAINS))),
            default_level=REFERENCE,
        ),
        vocabulary=work.vocabulary,
        max_tokens=shapes["cloud"].max_tokens,
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
