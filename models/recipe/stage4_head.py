"""The board's head: backbone and bottleneck joined, quantised to 8 bits, written for both runtimes. Besides, the rest
of the pretrained backbone, for labels on the board.

From here on, the int8 head defines the symbols that are sent. Its output has one scale for all channels, so each
channel is first stretched to fill the 8 bits. The manifest has the factors, and a board undoes them.
"""

import numpy as np
import torch

from models.backbone import CUT, FROZEN, pretrained_lite0
from models.export.litert_graph import write_litert
from models.export.onnx_graph import write_onnx
from models.export.quantise import quantise_with_labels
from models.family import Head
from models.recipe.workspace import Workspace

NAME = "4-head"
BOARD_FILES = ("head.onnx", "head.tflite", "labels.onnx", "labels.tflite")
CALIBRATION = 64  # training photos
WIDE = 0.9999  # share of a channel's values that fit into its 8 bits


def float_head(work: Workspace) -> Head:
    """The unquantised head, whose output is in symbols of the finest level."""
    head = Head()
    head.load_state_dict(torch.load(work / "head.pt", weights_only=True))
    return head.eval()


def trained_head(work: Workspace) -> Head:
    """The same from the weights of stage 3."""
    backbone, head = pretrained_lite0(), Head()
    head.stem.load_state_dict(backbone.stem.state_dict())
    head.blocks.load_state_dict(backbone.blocks[:CUT].state_dict())
    for number, block in enumerate(list(head.blocks)[FROZEN:]):
        block.load_state_dict(work.averaged("3-bottleneck", f"encoder.{number}."))
    head.bottleneck.load_state_dict(work.averaged("3-bottleneck", "bottleneck."))
    return head.eval()


def run(work: Workspace) -> None:
    """Writes head and labels as .onnx and .tflite, scales.npy, and head.pt, the float head for a server's pictures."""
    head = trained_head(work)
    torch.save(head.state_dict(), work / "head.pt")
    photos = work.array("photos-train")
    calibration = torch.from_numpy(photos[:: max(1, len(photos) // CALIBRATION)][:CALIBRATION].copy())
    with torch.inference_mode():
        latent = head(calibration).abs().transpose(0, 1).flatten(1)
    widths = latent.kthvalue(round(WIDE * latent.shape[1]), 1).values.clamp_min(1.0)
    scales = widths / widths.max()
    assert head.bottleneck.bias is not None
    with torch.no_grad():
        head.bottleneck.weight /= scales[:, None, None, None]
        head.bottleneck.bias /= scales
    int8, labels = quantise_with_labels(head, pretrained_lite0(), calibration)
    for name, network in (("head", int8), ("labels", labels)):
        (work / f"{name}.onnx").write_bytes(write_onnx(network))
        (work / f"{name}.tflite").write_bytes(write_litert(network))
    np.save(work / "scales.npy", scales.numpy())
    codes = int8.codes_per_symbol / scales
    figures = {"codes_per_symbol_least": codes.min().item(), "codes_per_symbol_most": codes.max().item()}
    sizes = {f"{name}_bytes": (work / name).stat().st_size for name in BOARD_FILES}
    work.finish(NAME, {name: round(value, 2) for name, value in figures.items()} | sizes)


def float_symbols(head: Head, photos: np.ndarray, gain: float = 1.0) -> np.ndarray:
    """Symbols of the unquantised head, int8 [B, 64, 7, 7], to measure the effect of 8 bits."""
    with torch.inference_mode():
        latent = head(torch.from_numpy(np.array(photos))) * gain
    symbols: np.ndarray = latent.round().clamp(-127, 127).to(torch.int8).numpy()
    return symbols
