"""Small bundles for tests: the real networks with random weights, real tables and a real manifest."""

import math
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from edge_runtime.inference.bundle import (
    BOS,
    DRAFT_LABELS,
    INTER_TABLES,
    MANIFEST,
    SCHEMA,
    TABLES,
    Bundle,
    FileRecord,
    LatentRecord,
    Manifest,
    TargetRecord,
    file_hash,
    open_bundle,
)
from edge_runtime.wire.tables import count_inter_tables, count_tables
from models.export.draft_export import draft_labels, quantise_draft, write_draft_litert, write_draft_onnx
from models.family import LATENT, Classifier, DecoderShape, Head, Tail, TextDecoder
from models.lookahead import LookaheadNet, lookahead_file, tensors_of
from tests import exports

VOCABULARY = 40  # small, so that random texts end: one token in 37 is the end token
MAX_TOKENS = 24
SHAPES = {"edge": (32, 2, 1, 1), "cloud": (64, 2, 1, 2)}  # width, heads, encoder and decoder layers
CLASSES = tuple(exports.CLASSES)
GAINS = (0.5, 1.0)


def tiny_bundle(path: Path, classes: tuple[str, ...] = CLASSES, seed: int = 34, board: bool = False) -> Bundle:
    """Writes a bundle for a server. The same seed gives the same files. With 34, edge texts have all lengths.

    board: adds head, labels and draft for both backends. Head and labels are then pretrained, so that photos give
    different symbols.
    """
    torch.manual_seed(seed)
    path.mkdir(parents=True)
    tail = {f"tail.{name}": weight for name, weight in lively(Tail(len(GAINS))).state_dict().items()}
    tail["tail.steps"] = 1.0 / torch.tensor(GAINS)[:, None].repeat(1, LATENT[0])
    tail["tail.of_level"] += Tail(len(GAINS)).of_level.detach()
    if classes:
        classifier = lively(Classifier(len(classes))).state_dict()
        tail |= {f"classifier.{name}": weight for name, weight in classifier.items()}
    networks = {"tail": tail, "head": (exports.head() if board else lively(Head())).state_dict()}
    for tier, sizes in SHAPES.items():
        networks[tier] = lively(TextDecoder(DecoderShape(VOCABULARY, *sizes, MAX_TOKENS))).state_dict()
    for name, weights in networks.items():
        halved = {key: weight.to(torch.float16).contiguous() for key, weight in weights.items()}
        save_file(halved, path / f"{name}.safetensors")
    if board:
        files = {name: data for name, data in exports.files().items() if name.startswith(("head", "labels"))}
        int8_draft = quantise_draft(exports.draft(VOCABULARY))
        for suffix, write in ((".onnx", write_draft_onnx), (".tflite", write_draft_litert)):
            encoder, step = write(int8_draft)
            files |= {f"draft_look{suffix}": encoder, f"draft_step{suffix}": step}
        if classes == CLASSES:
            files[DRAFT_LABELS] = draft_labels(exports.draft(VOCABULARY))
        for name, data in files.items():
            (path / name).write_bytes(data)
    for tier, sizes in SHAPES.items():
        lookahead = lively(LookaheadNet(sizes[0], VOCABULARY - BOS))
        save_file(tensors_of(range(BOS, VOCABULARY), lookahead), path / lookahead_file(tier))
    symbols = random_symbols(64, seed)
    coarse = (symbols * GAINS[0]).round().astype(np.int8)
    tables, changes = count_tables([coarse, symbols], set_id=seed), random_symbols(64, seed + 1).clip(-1, 1)
    changes[np.random.default_rng(seed).random(changes.shape) < 0.9] = 0  # as from sensor noise
    pairs = [(coarse, coarse + changes), (symbols, symbols + changes)]
    (path / TABLES).write_bytes(tables.to_bytes())
    (path / INTER_TABLES).write_bytes(count_inter_tables(pairs, tables).to_bytes())
    words = ["<pad>", "<start>", "<end>", "<unknown>", *(f"word{i}" for i in range(4, VOCABULARY))]
    (path / "vocabulary.txt").write_text("".join(f"{word}\n" for word in words))
    manifest = Manifest(
        schema=SCHEMA,
        name=f"tiny-{seed}",
        files={p.name: FileRecord(file_hash(p), p.stat().st_size) for p in sorted(path.iterdir())},
        pixels=224,
        latent=LatentRecord(*LATENT, groups=4, gains=GAINS, default_level=1),
        vocabulary=VOCABULARY,
        max_tokens=MAX_TOKENS,
        targets={tier: TargetRecord(f"{tier}.safetensors", *sizes) for tier, sizes in SHAPES.items()},
        tail="tail.safetensors",
        classes=classes,
        licences={"weights": "random"},
        training_commit="none",
        quality={},
    )
    (path / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return open_bundle(path)


def random_symbols(count: int, seed: int = 0) -> np.ndarray:
    """Latents int8 [count, 64, 7, 7], most symbols small."""
    return np.random.default_rng(seed).laplace(0, 1.5, (count, *LATENT)).round().clip(-9, 9).astype(np.int8)


def lively(network: nn.Module) -> nn.Module:
    """Random weights with which every layer depends on its input, so that different latents give different texts."""
    for name, weight in network.named_parameters():
        if "norm" in name and name.endswith("weight"):
            # With mixed signs, a decoder with tied embeddings does not repeat its last token without end.
            nn.init.normal_(weight) if name == "norm.weight" else nn.init.ones_(weight)
        elif weight.ndim > 1:
            embeds = name.endswith(("tokens.weight", "positions"))
            nn.init.normal_(weight, std=0.7 if embeds else math.sqrt((8 if "image" in name else 2) / weight[0].numel()))
    return network
