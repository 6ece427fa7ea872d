"""Quality over bytes: our levels, prefixes and byte budgets against picture codecs, through one target.

Every photo is sent in every way. Bytes are those of the whole PUBLISH payload, without a draft, since a draft changes
no text. The server decodes the real bytes. A coded picture goes through the server's float head, tail and decoder as
with `offload`, and gets the finest level of the latent.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from benchmarks.codec import zstd_bytes
from benchmarks.quality import Chain, EvaluationError, best_classes, ciders, class_names, class_of
from benchmarks.rate_figures import Point, figures
from edge_runtime.capture.picture_files import Picture
from edge_runtime.inference.bundle import BundleError
from edge_runtime.inference.head import Latent
from edge_runtime.inference.preprocess import PIXELS, to_input
from edge_runtime.inference.rate import RatedSymbols, choose_rate
from edge_runtime.picture_checks import decode_picture
from edge_runtime.pipeline import build_request
from edge_runtime.wire import bitstream, decode_labels, encode_labels, encode_request
from edge_runtime.wire.tables import entropy_bytes
from models.coded_pictures import SIZES, PictureCodec, picture_codecs, without_container
from models.family import Tail
from server.engine import Engine, Job
from server.loading import filled, load_engine
from server.numerics import prove

PREFIXES = (0.25, 0.5, 0.75)  # shares of a message that arrive
HEADER_BYTES = 2  # of a bitstream
QUICK_SIZES, QUICK_QUALITIES = SIZES[1::3], slice(None, None, 2)

Progress = Callable[[Iterable[Picture]], Iterable[Picture]]  # shows progress while it passes the pictures on
Ask = Callable[[Engine, int, Sequence[Job]], Sequence[Any]]  # the answers to jobs about the photo of this number


class Sent(NamedTuple):
    """One photo as it was sent."""

    payload_bytes: int  # of the whole PUBLISH payload
    content_bytes: int  # of the features, or of the picture without its container
    job: Job


class Sender:
    """A board that can send a photo in many ways, and what the server receives."""

    def __init__(self, chain: Chain) -> None:
        self.bundle, self.tables, self.tier = chain.bundle, chain.bundle.tables, chain.tier
        self.finest = self.tables.levels - 1
        assert chain.engine is not None
        self.symbols_of_picture, self.labels_seen = chain.engine.symbols, chain.labels_seen
        nothing = np.zeros((PIXELS, PIXELS, 3), np.uint8)
        # Features and pictures have the same envelope.
        self._request = build_request(chain.bundle, bytes(8), chain.plan, nothing, None, ())

    def ways(self, budgets: Sequence[int], quick: bool) -> Iterator[tuple[Point, Callable[[Any, Latent], Sent]]]:
        """All ways of sending a photo, from its pixels and its latent. quick: fewer sizes and qualities of pictures."""
        default = self.bundle.manifest.latent.default_level
        for level in range(self.finest + 1):
            yield Point(f"level {level}", "level"), partial(self._features, level=level)
        for share in PREFIXES:
            yield (
                Point(f"level {default}, {100 * share:.0f} % of its bytes", "prefix"),
                partial(self._features, share=share),
            )
        for groups in range(1, self.tables.groups):
            yield Point(f"level {default}, groups: {groups}", "groups"), partial(self._features, groups=groups)
        for budget in budgets:
            yield Point(f"{budget} bytes", "budget"), partial(self._within, budget=budget)
        for name, codec in picture_codecs().items():
            for size in QUICK_SIZES if quick else SIZES:
                for quality in codec.qualities[QUICK_QUALITIES] if quick else codec.qualities:
                    point = Point(f"{name} {size}, quality {quality}", name)
                    yield point, partial(self._picture, codec=codec, size=size, quality=quality)

    def choose(self, latent: Latent, budget: int) -> RatedSymbols:
        """The features that a board with this budget sends. If nothing fits: one group of the coarsest level."""
        fitting = choose_rate(latent, self.tables, self.finest, max_bytes=budget)
        return fitting or RatedSymbols(latent.symbols(0), 0, 1)

    def _features(
        self, _: Any, latent: Latent, level: int | None = None, groups: int | None = None, share: float = 1.0
    ) -> Sent:
        level = self.bundle.manifest.latent.default_level if level is None else level
        return self._coded(latent, RatedSymbols(latent.symbols(level), level, groups or self.tables.groups), share)

    def _within(self, _: Any, latent: Latent, budget: int) -> Sent:
        return self._coded(latent, self.choose(latent, budget))

    def _coded(self, latent: Latent, features: RatedSymbols, share: float = 1.0) -> Sent:
        """Features, and the labels that a board sends with them."""
        content = bitstream.encode(features.symbols, self.tables, features.level, features.groups)
        content = content[: round(share * len(content))]
        received = bitstream.decode(content, self.tables)
        labels = encode_labels(self.labels_seen(latent))
        channels, seen = received.complete_channels, decode_labels(labels)
        job = Job(received.symbols, features.level, channels, tier=self.tier, labels=seen)
        return Sent(self._payload_bytes(content, labels or None), len(content), job)

    def _picture(self, pixels: NDArray[np.uint8], _: Latent, codec: PictureCodec, size: int, quality: int) -> Sent:
        data, received = codec.code(pixels, size, quality)
        job = Job(self.symbols_of_picture(received), self.finest, tier=self.tier)
        return Sent(self._payload_bytes(data), without_container(data), job)

    def _payload_bytes(self, content: bytes, labels: bytes | None = None) -> int:
        return len(encode_request(msgspec.structs.replace(self._request, content=content, labels=labels)))


def spread(pictures: Iterable[Picture], limit: int | None) -> list[Picture]:
    """At most so many of the pictures, evenly spread: the first ones alone would be of one class."""
    every = list(pictures)
    count = min(limit or len(every), len(every))
    return [every[number * len(every) // count] for number in range(count)]


def engine_for_pictures(chain: Chain, tail: Path) -> Engine:
    """The chain's engine with another tail, such as one that was trained on coded pictures. Raises EvaluationError."""
    engine = load_engine(chain.bundle, [chain.tier], threads=torch.get_num_threads())
    try:
        trained = filled(Tail(engine.tail.levels), load_file(tail), str(tail))
    except (SafetensorError, OSError, BundleError) as error:
        raise EvaluationError(f"{tail}: {error}: want what `python -m models.recipe.codec_tail` wrote") from error
    engine.tail = trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    engine.proof = prove(engine)
    return engine


def measure_captions(
    chain: Chain, pictures: Sequence[Picture], captions: Mapping[str, Sequence[str]], **options: Any
) -> dict[str, Any]:
    """CIDEr of the tier's texts. options: see `measure`."""

    def ask(engine: Engine, _: int, jobs: Sequence[Job]) -> list[str]:
        return [chain.bundle.text(list(answer.tokens)) for answer in engine.answer(jobs)]

    def scores(texts: Sequence[Sequence[str]]) -> dict[str, NDArray[np.float64]]:
        references = {picture.name: captions[picture.name] for picture in pictures}
        columns = [
            ciders(references, dict(zip(references, texts_, strict=True))) for texts_ in zip(*texts, strict=True)
        ]
        return {"cider": np.stack(columns)}

    return measure(chain, pictures, ask, scores, **options)


def measure_labels(chain: Chain, pictures: Sequence[Picture], **options: Any) -> dict[str, Any]:
    """Accuracy of the labels that the features or pictures themselves tell, and what they tell, in bits; without the
    labels that a board sends besides. The pictures are named class/name. options: see `measure`.
    """
    names = class_names(chain.bundle)
    wanted = [class_of(names, picture.name) for picture in pictures]
    candidates = np.unique(wanted)
    shares = np.unique(wanted, return_counts=True)[1] / len(wanted)
    entropy_bits = float(-(shares * np.log2(shares)).sum())

    def ask(engine: Engine, photo: int, jobs: Sequence[Job]) -> list[tuple[bool, bool, float]]:
        answers = []
        for row in engine.label_logits(engine.features(jobs)):
            places = list(best_classes(row[None].cpu().numpy(), candidates)[0])
            log_shares = (row[torch.from_numpy(candidates)] / engine.label_temperature).log_softmax(-1).cpu().numpy()
            told = entropy_bits + float(log_shares[candidates == wanted[photo]][0]) / math.log(2)
            answers.append((places[0] == wanted[photo], wanted[photo] in places, told))
        return answers

    def scores(answers: Sequence[Sequence[tuple[bool, bool, float]]]) -> dict[str, NDArray[np.float64]]:
        return dict(zip(("top1", "top5", "label_bits"), np.array(answers, float).T, strict=True))

    facts = {"classes": len(candidates), "entropy_bits": round(entropy_bits, 4)}
    return facts | measure(chain, pictures, ask, scores, **options)


def measure(
    chain: Chain,
    pictures: Sequence[Picture],
    ask: Ask,
    scores: Callable[[Sequence[Sequence[Any]]], dict[str, NDArray[np.float64]]],
    budgets: Sequence[int],
    quick: bool = False,
    for_pictures: Engine | None = None,
    progress: Progress = lambda pictures: pictures,
) -> dict[str, Any]:
    """Sends all pictures in all ways. See `figures` for what is returned.

    scores: from the answers [photos][points] to each measure's [points, photos]. budgets: bytes of the features.
    for_pictures: the engine that answers coded pictures, by default the chain's.
    """
    assert chain.engine is not None
    sender = Sender(chain)
    points, sends = zip(*sender.ways(budgets, quick), strict=True)
    ours = sum(point.kind not in picture_codecs() for point in points)
    sizes, answers, latents = np.zeros((2, len(points), len(pictures))), list[list[Any]](), list[Latent]()
    for photo, picture in enumerate(progress(pictures)):
        pixels = to_input(decode_picture(picture.data))
        latents.append(chain.head.latent(pixels))
        sent = [send(pixels, latents[-1]) for send in sends]
        sizes[:, :, photo] = np.array([(s.payload_bytes, s.content_bytes) for s in sent]).T
        jobs, asked = (
            [s.job for s in sent],
            [(chain.engine, slice(ours)), (for_pictures or chain.engine, slice(ours, None))],
        )
        answers.append([answer for engine, rows in asked for answer in ask_once(ask, engine, photo, jobs[rows])])
    default = chain.bundle.manifest.latent.default_level  # the levels are the first points
    found = figures(points, default, sizes[0], sizes[1], scores(answers))
    by_name = dict(zip((point.name for point in points), sizes[1], strict=True))
    return found | {
        "coder": [coder(sender, latents, level, by_name[f"level {level}"]) for level in range(sender.finest + 1)],
        "budgets": [met(sender, latents, budget, by_name[f"{budget} bytes"]) for budget in budgets],
    }


def ask_once(ask: Ask, engine: Engine, photo: int, jobs: Sequence[Job]) -> list[Any]:
    """The answers to jobs about one photo. Equal jobs, such as a budget's and its level's, are asked once."""
    keys = [(job.level, job.channels, job.symbols.tobytes()) for job in jobs]
    different = dict(zip(keys, jobs, strict=True))
    answers = dict(zip(different, ask(engine, photo, [*different.values()]) if jobs else (), strict=True))
    return [answers[key] for key in keys]


def coder(sender: Sender, latents: Sequence[Latent], level: int, sizes: NDArray[np.float64]) -> dict[str, float]:
    """Mean bytes of one level: coded, under the tables' entropy, with zstd -19, and as int8."""
    symbols = np.stack([latent.symbols(level) for latent in latents])
    ideal, coded = entropy_bytes(symbols, sender.tables, level), float(sizes.mean())
    return {
        "level": level,
        "bytes": round(coded, 1),
        "entropy_bytes": round(ideal, 1),
        "overhead_percent": round(100 * (coded / ideal - 1), 2),
        "overhead_without_header_percent": round(100 * ((coded - HEADER_BYTES) / ideal - 1), 2),
        "zstd19_bytes": round(statistics.fmean(map(zstd_bytes, symbols)), 1),
        "int8_bytes": symbols[0].size,
    }


def met(sender: Sender, latents: Sequence[Latent], budget: int, sizes: NDArray[np.float64]) -> dict[str, float]:
    """How a byte budget was met, and the time to choose what is sent."""
    choosing_us = []
    for latent in latents:
        begin = time.perf_counter()
        sender.choose(latent, budget)
        choosing_us.append(1e6 * (time.perf_counter() - begin))
    return {
        "budget": budget,
        "mean_to_budget": round(float(sizes.mean()) / budget, 4),
        "share_above": round(float((sizes > budget).mean()), 4),
        "choosing_us_p50": round(statistics.median(choosing_us), 1),
    }
