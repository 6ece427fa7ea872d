"""What a bundle's confidences are worth, on the dev photos of all collections: when a text is called unsure, how good
drafts are against the cloud's texts, and the temperature of the labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from edge_runtime.inference import draft_calibration
from edge_runtime.inference.backends import load_model
from edge_runtime.inference.bundle import DRAFT_LABELS, EOS, PAD
from edge_runtime.inference.draft import STATE, Draft
from models.backbone import pretrained_lite0
from models.recipe import stage5_symbols, stage6_targets, stage7_critic, stage8_texts
from models.recipe.scores import ciders, strip
from models.recipe.stage1_photos import MAX_TOKENS
from models.recipe.stage3_bottleneck import GAINS, REFERENCE, complete_rates
from models.recipe.stage4_head import float_head, float_symbols
from models.recipe.workspace import Workspace

POOR = 0.5  # texts below the threshold have on average less than this share of the mean score of all
FLOAT_CHECK = 256  # dev photos on which the float head's symbols are compared


@dataclass(frozen=True, slots=True)
class Measured:
    """What the manifest says of a bundle."""

    quality: dict[str, float]
    draft_calibration: draft_calibration.Table
    unsure_below: dict[str, float]
    label_temperature: float


@dataclass(frozen=True, slots=True)
class Scored:
    """Texts about the dev photos, in their order."""

    confidences: np.ndarray
    scores: np.ndarray  # CIDEr-D

    def figures(self, work: Workspace) -> dict[str, float]:
        """The mean score on each collection."""
        collections, names = np.load(work / "collections-dev.npy"), (work / "collections.txt").read_text().split()
        return {f"cider_{names[n]}": float(self.scores[collections == n].mean()) for n in np.unique(collections)}


def measure(work: Workspace, bundle: Path) -> Measured:
    """The figures that the recipe can measure; `aiflow evaluate` measures the whole chain. bundle: with the draft."""
    quality: dict[str, float] = {}
    texts = {tier: texts_of_tier(work, tier) for tier in ("edge", "cloud")}
    for suffix in ("onnx", "tflite"):
        drafts, tokens = drafts_of(work, bundle, suffix)
        quality |= {f"draft_{suffix}_{name}": value for name, value in drafts.figures(work).items()}
    for tier, scored in texts.items():
        quality |= {f"{tier}_{name}": value for name, value in scored.figures(work).items()}
    wanted = [strip(row) for row in np.load(work / "texts-dev.npy").tolist()]
    quality["drafts_equal"] = float(np.mean([text == whole for text, whole in zip(tokens, wanted, strict=True)]))
    calibration = draft_calibration.fit(
        drafts.confidences.tolist(), drafts.scores.tolist(), texts["cloud"].scores.tolist()
    )
    measured = measure_head(work)
    return replace(
        measured,
        quality=measured.quality | {name: round(value, 4) for name, value in quality.items()},
        draft_calibration=tuple((round(at, 4), round(worth, 4)) for at, worth in calibration),
        unsure_below={
            who: round(unsure_below(s.confidences, s.scores), 4) for who, s in (texts | {"device": drafts}).items()
        },
    )


def measure_head(work: Workspace) -> Measured:
    """What can be measured without texts."""
    exact = float_symbols(float_head(work), work.array("photos-dev")[:FLOAT_CHECK], GAINS[REFERENCE])
    sent = stage5_symbols.symbols(work, work.array("codes-dev")[:FLOAT_CHECK], REFERENCE)
    temperature = work.figures(stage5_symbols.NAME)["label_temperature"]
    quality = label_accuracy(work)
    quality["head_int8_equal_symbols"] = float((exact == sent).mean())
    return Measured({name: round(value, 4) for name, value in quality.items()}, (), {}, temperature)


def scored(work: Workspace, confidences: Sequence[float], texts: list[list[int]]) -> Scored:
    collections, scores = np.load(work / "collections-dev.npy"), np.zeros(len(texts))
    for number in np.unique(collections):
        photos = np.flatnonzero(collections == number)
        scores[photos] = ciders(work, "dev", photos, [texts[i] for i in photos])
    return Scored(np.array(confidences), scores)


@torch.inference_mode()
def texts_of_tier(work: Workspace, tier: str) -> Scored:
    """A target's greedy texts, and their confidences as a server states them."""
    net = stage6_targets.new_target(work, tier)
    net.load_state_dict(stage7_critic.final_weights(work, tier))
    net.eval()
    rows = stage8_texts.written(work, net, "dev")
    maps, labels = work.array("maps-dev"), np.load(work / "labels-dev.npy")
    confidences: list[float] = []
    for at in range(0, len(rows), 100):
        tokens = torch.from_numpy(rows[at : at + 100].astype(np.int64))
        seen = torch.from_numpy(labels[at : at + 100].astype(np.int64))
        features = net.features(stage6_targets.maps_of(maps, slice(at, at + 100)).float())
        logits = net.decoder(tokens[:, :-1], net.decoder.encode_image(features, seen)) + net.decoder.never_emitted
        gains = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        there = tokens[:, 1:] != PAD
        confidences += (gains.where(there, 0.0).sum(1) / there.sum(1)).exp().tolist()
    return scored(work, confidences, [strip(row) for row in rows.tolist()])


def drafts_of(work: Workspace, bundle: Path, suffix: str) -> tuple[Scored, list[list[int]]]:
    """The drafts of one runtime, as a board writes them."""
    encoder, step = (load_model(bundle / f"draft_{part}.{suffix}") for part in ("look", "step"))
    labels = np.fromfile(bundle / DRAFT_LABELS, "<f2").reshape(-1, STATE)
    draft, seen = Draft(encoder, step, MAX_TOKENS, labels), np.load(work / "seen-dev.npy")
    symbols = stage5_symbols.symbols(work, work.array("codes-dev"), len(GAINS) - 1)
    drafts = [draft.write(each, stage5_symbols.labels_of(row).items()) for each, row in zip(symbols, seen, strict=True)]
    texts = [[token for token in drafted.tokens if token != EOS] for drafted in drafts]
    return scored(work, [drafted.confidence for drafted in drafts], texts), texts


def unsure_below(confidences: np.ndarray, scores: np.ndarray) -> float:
    """The largest confidence below which texts have less than POOR of the mean score; 0: none have."""
    order = np.argsort(confidences, kind="stable")
    means = np.cumsum(scores[order]) / np.arange(1, len(scores) + 1)
    poor = np.flatnonzero(means < POOR * scores.mean())
    return float(confidences[order][poor[-1]]) if len(poor) else 0.0


@torch.inference_mode()
def label_accuracy(work: Workspace) -> dict[str, float]:
    """Of the labels that the features alone tell, on labelled dev photos, among the classes of these."""
    labels = torch.from_numpy(np.load(work / "labels-labelled.npy"))
    if not len(labels):
        return {}
    net, classifier = stage6_targets.new_target(work, "edge"), pretrained_lite0().classifier
    codes, parts = work.array("codes-labelled"), []
    for at in range(0, len(labels), 100):
        rates = complete_rates(len(codes[at : at + 100]), REFERENCE)
        symbols = stage6_targets.rated_symbols(work, codes[at : at + 100], rates)
        parts.append(classifier(net.tail(symbols, rates.level, rates.arrived).mean(1)))
    logits, among = torch.cat(parts), torch.unique(labels)
    places = among[logits[:, among].topk(min(5, len(among))).indices] == labels[:, None]
    return {"label_top1": places[:, 0].float().mean().item(), "label_top5": places.any(1).float().mean().item()}
