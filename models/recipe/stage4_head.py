"""The board's head: backbone and bottleneck joined, quantised to 8 bits, written for both runtimes.

From here on, the int8 head defines the symbols that are sent.
"""

import numpy as np
import torch

from models.backbone import CUT, pretrained_lite0
from models.export.litert_graph import write_litert
from models.export.onnx_graph import write_onnx
from models.export.quantise import quantise
from models.family import Head
from models.recipe.workspace import Workspace

NAME = "4-head"
CALIBRATION = 64  # training photos


def trained_head(work: Workspace) -> Head:
    """The float head with the bottleneck of stage 3."""
    backbone, head = pretrained_lite0(), Head()
    head.stem.load_state_dict(backbone.stem.state_dict())
    head.blocks.load_state_dict(backbone.blocks[:CUT].state_dict())
    head.bottleneck.load_state_dict(work.averaged("3-bottleneck", "bottleneck."))
    return head.eval()


def run(work: Workspace) -> None:
    """Writes head.onnx, head.tflite and head.pt, the float head for pictures that arrive at a server."""
    head = trained_head(work)
    photos = work.array("photos-train")
    calibration = torch.from_numpy(photos[:: max(1, len(photos) // CALIBRATION)][:CALIBRATION].copy())
    int8 = quantise(head, calibration)
    (work / "head.onnx").write_bytes(write_onnx(int8))
    (work / "head.tflite").write_bytes(write_litert(int8))
    torch.save(head.state_dict(), work / "head.pt")
    sizes = {f"{name}_bytes": (work / name).stat().st_size for name in ("head.onnx", "head.tflite")}
    work.finish(NAME, {"codes_per_symbol": round(int8.codes_per_symbol, 2), **sizes})


def float_symbols(head: Head, photos: np.ndarray) -> np.ndarray:
    """Symbols of the unquantised head, int8 [B, 64, 7, 7], to measure the effect of 8 bits."""
    with torch.inference_mode():
        latent = head(torch.from_numpy(np.array(photos)))
    symbols: np.ndarray = latent.round().clamp(-127, 127).to(torch.int8).numpy()
    return symbols
