"""Takes head, tail and tables from another bundle, in place of stages 3 and 4: only the decoders are trained then.

The bits stay the same, so boards with that bundle's head need nothing new except a draft decoder. To train its decoders
further, their weights are taken too.
"""

import shutil

import numpy as np
import torch
from safetensors.torch import load_file

from edge_runtime.inference.bundle import Bundle, BundleError
from models.family import decoder_shapes
from models.recipe import stage3_bottleneck, stage4_head
from models.recipe.stage3_bottleneck import GAINS
from models.recipe.workspace import Workspace
from models.stored_weights import unpack

COPIED = (*stage4_head.BOARD_FILES, "tables.bin")


def run(work: Workspace, bundle: Bundle, fine_tunes: bool = False) -> None:
    """Writes what stages 3 and 4 leave for later stages. Raises BundleError.

    fine_tunes: also the first weights of the decoders.
    """
    latent = bundle.manifest.latent
    if not np.allclose(latent.gains, GAINS, atol=1e-5):
        raise BundleError(f"bundle {bundle.manifest.name} has the gains {latent.gains}: this recipe trains {GAINS}")
    for name in COPIED:
        shutil.copy(bundle.file(name), work / name)
    np.save(work / "scales.npy", np.array(latent.scales, np.float32))
    torch.save(_weights(bundle, "head.safetensors"), work / "head.pt")
    tail = {k: v for k, v in _weights(bundle, bundle.manifest.tail).items() if k.startswith("tail.")}
    work.save(stage3_bottleneck.NAME, {"average": tail})
    if fine_tunes:
        shapes = decoder_shapes(bundle.manifest.vocabulary)
        for tier, target in bundle.manifest.targets.items():
            if (shape := shapes.get(tier)) is None or target.label_words != shape.label_words:
                raise BundleError(
                    f"bundle {bundle.manifest.name}: its decoder {tier} is not one that this recipe trains"
                )
            torch.save(_weights(bundle, target.file), work / f"first-{tier}.pt")
    for stage in (stage3_bottleneck.NAME, stage4_head.NAME):
        work.finish(stage, {"from_bundle": bundle.manifest.name, "id": bundle.id.hex()})


def _weights(bundle: Bundle, name: str) -> dict[str, torch.Tensor]:
    return unpack(load_file(bundle.file(name)))
