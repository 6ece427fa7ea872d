"""The cloud's texts about several views of every photo, from which the edge and the draft learn.

Sequence-level distillation (Kim & Rush, arXiv 1606.07947): a small decoder learns the texts of one good decoder better
than those of five people.
"""

import numpy as np

from edge_runtime.inference.bundle import BOS, EOS, PAD
from models.recipe import stage6_targets as targets
from models.recipe import stage7_critic as critic
from models.recipe.workspace import Workspace, blocks

NAME = "8-texts"
BLOCK = 1000  # views
VIEWS = {"train": 4, "unlabelled": 3, "dev": 1}  # of each photo, the first ones


def run(work: Workspace) -> None:
    """Writes texts-{train,unlabelled,dev}: the cloud's greedy texts, see `written`."""
    net = targets.new_target(work, "cloud")
    net.load_state_dict(critic.final_weights(work, "cloud"))
    net.eval()
    for part in ("train", "unlabelled", "dev"):
        np.save(work / f"texts-{part}.npy", rows := written(work, net, part))
    work.finish(NAME, {"mean_tokens": float((rows != PAD).sum(1).mean()) - 1})


def written(work: Workspace, net: targets.Target, part: str) -> np.ndarray:
    """A target's greedy texts about the first views of a part, int16 [N, T + 1]: BOS first, PAD after EOS."""
    count = VIEWS[part] * len(work.array(f"photos-{part}"))
    maps, labels = work.array(f"maps-{part}")[:count], np.load(work / f"labels-{part}.npy")
    rows = np.full((len(maps), net.decoder.shape.max_tokens + 1), PAD, np.int16)
    for block in blocks(f"texts of {part}", len(maps), BLOCK):
        for row, text in zip(rows[block], targets.write(net, maps[block], labels[block]), strict=True):
            tokens = [BOS, *text, EOS][: len(row)]
            row[: len(tokens)] = tokens
    return rows
