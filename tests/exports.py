"""Exported networks for tests: the pretrained backbone and a draft with random weights, quantised once per process."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edge_runtime.inference.backends import Model, load_model
from edge_runtime.inference.bundle import EOS
from models.backbone import CUT, FROZEN, Lite0, pretrained_lite0
from models.export.draft_export import quantise_draft, write_draft_litert, write_draft_onnx
from models.export.litert_graph import write_litert
from models.export.onnx_graph import write_onnx
from models.export.quantise import Int8Network, quantise_with_labels
from models.family import DRAFT_STATE, LATENT, DraftDecoder, Head

VOCABULARY = 60
CLASSES = {"cat": 281, "dog": 207, "horse": 339}  # to the index of a class of ImageNet: tabby, golden retriever, sorrel


@cache
def backbone() -> Lite0:
    """The pretrained network, with a few of its classes."""
    lite0, rows = pretrained_lite0(), list(CLASSES.values())
    linear = torch.nn.Linear(lite0.classifier.in_features, len(rows))
    linear.load_state_dict({name: weight[rows] for name, weight in lite0.classifier.state_dict().items()})
    lite0.classifier = linear
    return lite0.eval()


def float_logits(pictures: Tensor) -> Tensor:
    """What the backbone makes of pictures, [B, 3], in floats."""
    return backbone().rest(backbone().blocks[FROZEN:CUT](backbone().frozen(pictures)))[1]


@cache
def head() -> Head:
    """The pretrained head with a random bottleneck, scaled to standard deviation 1 per channel like a trained one."""
    torch.manual_seed(3)  # drafts of different lengths
    head = Head().eval()
    head.stem, head.blocks = backbone().stem, backbone().blocks[:CUT]
    with torch.inference_mode():
        latent = head(pictures(4, seed=1))
        std, mean = latent.std((0, 2, 3)), latent.mean((0, 2, 3))
    with torch.no_grad():
        bias = head.bottleneck.bias
        assert bias is not None
        head.bottleneck.weight /= std[:, None, None, None]
        bias.copy_((bias - mean) / std)
    return head


def pictures(count: int, seed: int) -> Tensor:
    """uint8 [count, 224, 224, 3]: random colours at several scales."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (3, 9, 40, 224)
    layers = [torch.randn(count, 3, size, size, generator=generator) for size in sizes]
    image = sum(F.interpolate(x, (224, 224), mode="bilinear") * 40 / (1 + i) for i, x in enumerate(layers))
    assert isinstance(image, Tensor)
    return (image + 120).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@cache
def int8_networks() -> dict[str, Int8Network]:
    """The head, and the network of the labels."""
    int8_head, int8_labels = quantise_with_labels(head(), backbone(), pictures(4, seed=2))
    return {"head": int8_head, "labels": int8_labels}


@cache
def draft(vocabulary: int = VOCABULARY) -> DraftDecoder:
    """A draft decoder whose texts depend on the latent and on labels; a few of them end early."""
    torch.manual_seed(2)
    draft = DraftDecoder(vocabulary).eval()
    with torch.no_grad():
        draft.tokens.weight.normal_()  # logits with the spread of a trained decoder
        draft.image_positions.normal_()
        for layer in (draft.query, draft.input_gates, draft.state_gates, draft.out):
            layer.weight *= 3
        draft.bias[EOS] = 20.0
    generator = torch.Generator().manual_seed(10)
    draft.labels = torch.nn.Embedding.from_pretrained(torch.randn(len(CLASSES), DRAFT_STATE, generator=generator))
    return draft


def latents(count: int, seed: int) -> np.ndarray:
    """Symbols int8 [count, 64, 7, 7]; the channels of each photo have different means."""
    rng = np.random.default_rng(seed)
    values = rng.laplace(0, 1, (count, *LATENT)) + rng.normal(0, 1, (count, LATENT[0], 1, 1))
    return values.round().astype(np.int8)


@cache
def files() -> dict[str, bytes]:
    """The files head, labels, encoder and step for both runtimes."""
    int8_draft = quantise_draft(draft())
    drafts = {".onnx": write_draft_onnx(int8_draft), ".tflite": write_draft_litert(int8_draft)}
    writers = {".onnx": write_onnx, ".tflite": write_litert}
    images = {f"{name}{s}": write(network) for name, network in int8_networks().items() for s, write in writers.items()}
    encoders = {f"encoder{suffix}": encoder for suffix, (encoder, _) in drafts.items()}
    steps = {f"step{suffix}": step for suffix, (_, step) in drafts.items()}
    return images | encoders | steps


def loaded(directory: Path, name: str, data: bytes | None = None) -> Model:
    """One of `files`, or other data, written into a directory and loaded."""
    path = directory / name
    path.write_bytes(files()[name] if data is None else data)
    return load_model(path)
