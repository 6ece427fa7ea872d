"""The latents that the deployed int8 head computes for many views, the labels that the board sees in them, and the
tables counted on their symbols.

All later stages train on these, so nothing has to be adapted to quantisation afterwards.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from edge_runtime.inference.backends import load_model
from edge_runtime.inference.bundle import INTER_TABLES
from edge_runtime.inference.head import Head, codes_to_symbols, symbol_factor
from edge_runtime.inference.labels import Labels, worth_sending
from edge_runtime.wire import bitstream, decode_labels, encode_labels
from edge_runtime.wire.labels import LABEL_BYTES, MAX_LABELS
from edge_runtime.wire.tables import Tables, count_tables, entropy_bytes
from models.family import GROUPS, LATENT
from models.imagenet import imagenet_classes
from models.recipe import inter_tables
from models.recipe.stage2_views import make_view, photo_views
from models.recipe.stage3_bottleneck import GAINS, REFERENCE
from models.recipe.workspace import Workspace, blocks

NAME = "5-symbols"
VIEWS = {"labelled": 1, "train": 8, "unlabelled": 3, "dev": 1}
BATCH = 64
COUNTED = 8000  # views that tables are counted on


def run(work: Workspace) -> None:
    """Writes codes-{train,unlabelled,dev,labelled}, uint8 [views * photos, 64, 7, 7], seen-*, the labels in a request,
    uint8 [views * photos, 15], zeros at the end, and both table files.
    """
    model = load_model(work / "head.onnx", threads=1)
    head = Head(model)
    network, names = load_model(work / "labels.onnx", threads=1), [known.name for known in imagenet_classes()]
    temperature, among_all = label_temperature(work, head, Labels(network, names))
    labels = Labels(network, names, temperature)
    for seed, (part, views) in enumerate(VIEWS.items()):
        photos = work.array(f"photos-{part}")
        pairs = photo_views(photos, views)
        codes = work.new_array(f"codes-{part}", (len(pairs), *LATENT), np.uint8)

        seen = np.zeros((len(pairs), LABEL_BYTES * MAX_LABELS), np.uint8)

        def encode(pair: tuple[int, int], photos: np.ndarray = photos, seed: int = seed) -> tuple[np.ndarray, bytes]:
            latent = head.latent(make_view(photos, *pair, seed))
            assert latent.backbone_map is not None
            return latent.codes, encode_labels(worth_sending(labels.likeliest(latent.backbone_map)))

        with ThreadPoolExecutor(2) as pool:  # the runtime releases the GIL while it computes
            for rows in blocks(f"latents of {part}", len(pairs), BATCH):
                for at, (its_codes, sent) in zip(range(len(pairs))[rows], pool.map(encode, pairs[rows]), strict=True):
                    codes[at], seen[at, : len(sent)] = its_codes, np.frombuffer(sent, np.uint8)
        np.save(work / f"seen-{part}.npy", seen)
    (work / "head_output.txt").write_text(f"{model.scale!r} {model.zero_point}\n")
    figures, tables = count(work)
    figures |= {"label_temperature": temperature, "board_label_top1": among_all}
    scales = np.load(work / "scales.npy").tolist()
    some = list(work.array("photos-train")[: inter_tables.PHOTOS])
    for_pairs = inter_tables.count(Head(model, GAINS, scales), tables, some)
    (work / INTER_TABLES).write_bytes(for_pairs.to_bytes())
    work.finish(NAME, figures)


def label_temperature(work: Workspace, head: Head, labels: Labels) -> tuple[float, float]:
    """What the labels' logits must be divided by, so that a probability is the share of photos that it is right for,
    and that share for the likeliest label.

    It is the one of a grid with the least cross-entropy on labelled dev photos (Guo et al., arXiv 1706.04599, section
    4.2).
    """
    classes = np.load(work / "labels-labelled.npy")
    if not len(classes):
        return 1.0, 0.0
    maps = [head.latent(photo).backbone_map for photo in work.array("photos-labelled")]
    found = np.stack([labels.probabilities(seen) for seen in maps if seen is not None]).astype(np.float64)
    logits, rows = np.log(found.clip(1e-30)), np.arange(len(classes))

    def cross_entropy(temperature: float) -> float:
        scaled = logits / temperature
        return float((np.logaddexp.reduce(scaled, 1) - scaled[rows, classes]).mean())

    best = min((0.5 * 1.05**step for step in range(40)), key=cross_entropy)
    return round(best, 4), round(float((found.argmax(1) == classes).mean()), 4)


def labels_of(row: np.ndarray) -> dict[int, float]:
    """A row of seen-*, as a server reads it: class to probability."""
    return decode_labels(row[: LABEL_BYTES * int((row[2::LABEL_BYTES] > 0).sum())].tobytes())


@cache
def _factors(work: Workspace) -> tuple[int, list[np.ndarray]]:
    """The zero point of the head's output, and by level the factor of each channel, as on a board."""
    scale, zero_point = (work / "head_output.txt").read_text().split()
    scales = [float(scale) * float(channel) for channel in np.load(work / "scales.npy")]
    factors = [np.array([symbol_factor(each, gain) for each in scales], np.int32)[:, None, None] for gain in GAINS]
    return int(zero_point), factors


def symbols(work: Workspace, codes: np.ndarray, level: int) -> np.ndarray:
    """Codes uint8 [..., 64, 7, 7] to symbols int8 of a level, as a board computes them."""
    zero_point, factors = _factors(work)
    return codes_to_symbols(np.asarray(codes), zero_point, factors[level])


def count(work: Workspace) -> tuple[dict[str, float], Tables]:
    """Writes tables.bin, counted on training views. Contexts and alphabet: the cheapest on dev photos."""
    train, dev = work.array("codes-train"), work.array("codes-dev")
    some = train[np.linspace(0, len(train) - 1, min(COUNTED, len(train)), dtype=int)]
    by_level = [symbols(work, some, level) for level in range(len(GAINS))]
    reference = symbols(work, dev, REFERENCE)
    figures: dict[str, float] = {}
    best = None
    for contexts in (1, 3):
        for largest in (7, 15):
            tables = count_tables(by_level, groups=GROUPS, contexts=contexts, largest=largest)
            size = round(entropy_bytes(reference, tables, REFERENCE), 1)
            figures[f"dev_entropy_{contexts}_contexts_to_{largest}"] = size
            if best is None or size < best[0]:
                best = (size, tables)
    assert best is not None
    if (path := work / "tables.bin").is_file():  # of the bundle whose head is used: boards have them
        tables = Tables.from_bytes(path.read_bytes())
    else:
        tables = best[1]
        path.write_bytes(tables.to_bytes())
    for level in range(len(GAINS)):
        coded = [len(bitstream.encode(each, tables, level)) for each in symbols(work, dev, level)]
        figures[f"dev_bytes_{level}"] = round(float(np.mean(coded)), 1)
    figures["largest_symbol"] = int(np.abs(by_level[-1]).max())
    figures["live_channels"] = int(((by_level[REFERENCE] != 0).mean((0, 2, 3)) > 0.01).sum())
    return figures, tables
