"""The symbols that the deployed int8 head sends for many views, and the tables counted on them.

All later stages train on these symbols, so nothing has to be adapted to quantisation afterwards.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edge_runtime.inference.backends import load_model
from edge_runtime.inference.head import Head
from edge_runtime.wire import bitstream
from edge_runtime.wire.tables import count_tables, entropy_bytes
from models.family import LATENT
from models.recipe.stage2_views import make_view, photo_views
from models.recipe.workspace import Workspace, blocks

NAME = "5-symbols"
VIEWS = {"train": 8, "classes": 6, "dev": 1}
BATCH = 64
GROUPS = 4


def run(work: Workspace) -> None:
    """Writes symbols-{train,classes,dev}, int8 [views * photos, 64, 7, 7], and tables.bin."""
    head = Head(load_model(work / "head.onnx", threads=1))
    for seed, (part, views) in enumerate(VIEWS.items()):
        photos = work.array(f"photos-{part}")
        pairs = photo_views(photos, views)
        symbols = work.new_array(f"symbols-{part}", (len(pairs), *LATENT), np.int8)

        def symbols_of(pair: tuple[int, int], photos: np.ndarray = photos, seed: int = seed) -> np.ndarray:
            return head.symbols(make_view(photos, *pair, seed))

        with ThreadPoolExecutor(2) as pool:  # the runtime releases the GIL while it computes
            for rows in blocks(f"symbols of {part}", len(pairs), BATCH):
                symbols[rows] = list(pool.map(symbols_of, pairs[rows]))
    work.finish(NAME, count(work))


def count(work: Workspace) -> dict[str, float]:
    """Writes tables.bin, counted on training views. Contexts and alphabet: the cheapest on dev photos."""
    train, dev = work.array("symbols-train"), work.array("symbols-dev")
    figures: dict[str, float] = {}
    best = None
    for contexts in (1, 3):
        for largest in (7, 15):
            tables = count_tables([train], groups=GROUPS, contexts=contexts, largest=largest)
            figures[f"dev_entropy_{contexts}_contexts_to_{largest}"] = size = round(entropy_bytes(dev, tables), 1)
            if best is None or size < best[0]:
                best = (size, tables)
    assert best is not None
    (work / "tables.bin").write_bytes(best[1].to_bytes())
    figures["dev_bytes"] = float(np.mean([len(bitstream.encode(s, best[1])) for s in dev]))
    figures["largest_symbol"] = int(np.abs(train).max())
    figures["live_channels"] = int(((train != 0).mean((0, 2, 3)) > 0.01).sum())
    return figures
