"""Quality and bytes on photos, through the real codec, envelopes and verifier in one process, without a network."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime import wire
from edge_runtime.app import load_draft, load_head
from edge_runtime.capture.picture_checks import decode_picture
from edge_runtime.capture.picture_files import Picture, read_pictures
from edge_runtime.config import PolicyConfig
from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.draft_calibration import Calibration
from edge_runtime.inference.preprocess import to_input
from edge_runtime.pipeline import build_request
from edge_runtime.planning import Plan
from models.captions import captioned_as, words_of
from testbed.sample_photos import is_readable

if TYPE_CHECKING:
    from models.questions import Question
    from server.engine import Answer, Engine, Job

BATCH = 8


class EvaluationError(AiflowError, ValueError):
    """Photos and captions that cannot be scored."""


class Photos:
    """The pictures of directories and tar files, under the names that their captions have.

    Pictures without a caption and pictures that cannot be decoded are left out, reported and counted.
    """

    def __init__(
        self, sources: Sequence[Path], captions: Mapping[str, object] | None = None, limit: int | None = None
    ) -> None:
        """captions: None takes all pictures."""
        self._sources, self._captions, self._limit = sources, captions, limit
        self.unreadable = 0

    def __iter__(self) -> Iterator[Picture]:
        """Raises EvaluationError if no picture is left, or if two pictures have the same captions."""
        paths: dict[str, str] = {}  # of the pictures taken, by name in the captions
        taken = uncaptioned = 0
        for picture in (picture for source in self._sources for picture in read_pictures(source)):
            if taken == self._limit:
                break
            name = picture.name if self._captions is None else captioned_as(self._captions, picture.name)
            if name is None:
                uncaptioned += 1
            elif name in paths:
                raise EvaluationError(
                    f"photo {name} is there twice, as {paths[name]} and {picture.name}: leave one out"
                )
            elif not is_readable(picture):
                self.unreadable += 1
            else:
                taken += 1
                if self._captions is not None:
                    paths[name] = picture.name
                yield Picture(name, picture.data)
        if uncaptioned:
            print(f"{uncaptioned} photos left out: the table, or its split, has no caption for them", file=sys.stderr)
        if not taken:
            raise EvaluationError(
                "none of the pictures has a caption, or none can be read: do the names in the TSV match the files?"
            )


@dataclass(frozen=True, slots=True)
class Sent:
    """One photo as the server received it."""

    name: str
    payload_bytes: int  # of the whole PUBLISH payload; 0 if nothing was sent
    draft: tuple[int, ...]  # end token included
    symbols: np.ndarray  # int8 [64, 7, 7], decoded from the payload
    draft_accepted: bool = False  # by the board's policy: the draft is the answer, and nothing was sent


class Chain:
    """Board and server of one bundle without a network between them."""

    def __init__(
        self,
        bundle: Bundle,
        paradigm: str,
        backend: str,
        tier: str,
        engine: "Engine | None",
        min_confidence: float | None = None,
    ) -> None:
        """min_confidence: accept a draft with at least this confidence without verification; None: verify all."""
        self.bundle, self.engine, self.tier = bundle, engine, tier
        self.plan = Plan(paradigm, "evaluation", 60_000, min_confidence=min_confidence)  # type: ignore[arg-type]
        self.head = load_head(bundle, backend, 1)
        self.draft = load_draft(bundle, backend, 1) if paradigm in ("device", "speculative") else None

    def send(self, picture: Picture) -> Sent:
        """Picture -> head -> draft -> envelope -> bytes -> envelope -> symbols."""
        pixels = to_input(decode_picture(picture.data))
        symbols = self.head.symbols(pixels)
        drafted = self.draft.write(symbols) if self.draft else None
        draft = drafted.tokens if drafted else ()
        if self.plan.paradigm == "device" or (drafted and self.plan.accepts(drafted.confidence)):
            return Sent(picture.name, 0, draft, symbols, draft_accepted=True)
        payload = wire.encode_request(build_request(self.bundle, bytes(8), self.plan, pixels, symbols, draft))
        request = wire.decode_request(payload)
        if request.content_kind is wire.ContentKind.LATENT:
            decoded = wire.decode(request.content, self.bundle.tables)
            assert decoded.checked  # nothing on the way can have cut it
            received = decoded.symbols
        else:
            assert self.engine is not None
            received = self.engine.symbols(to_input(decode_picture(request.content)))
        return Sent(picture.name, len(payload), tuple(request.draft_ids), received)

    def job(self, sent: Sent, draft: tuple[int, ...] | None = None) -> "Job":
        from server.engine import Job

        return Job(sent.symbols, self.bundle.manifest.latent.gains[-1], draft, self.tier)


def proven_chain(bundle: Bundle, paradigm: str, tier: str, backend: str, quality_floor: float | None = None) -> Chain:
    """A chain whose engine has proven its numerics. quality_floor: of the paradigm `auto`, default: a board's."""
    min_confidence = None
    if paradigm == "auto":
        floor = PolicyConfig().quality_floor if quality_floor is None else quality_floor
        paradigm = "speculative"
        min_confidence = Calibration(bundle.manifest.draft_calibration).min_confidence(floor)
    if paradigm == "device":
        return Chain(bundle, paradigm, backend, tier, None)
    from server.loading import load_engine
    from server.numerics import prove

    engine = load_engine(bundle, [tier], threads=2)
    engine.proof = prove(engine)
    return Chain(bundle, paradigm, backend, tier, engine, min_confidence)


Progress = Callable[[Iterable[Picture]], Iterable[Picture]]  # shows progress while it passes the pictures on


def measure_captions(
    chain: Chain, photos: Photos, captions: Mapping[str, Sequence[str]], progress: Progress = lambda photos: photos
) -> dict[str, Any]:
    """CIDEr, BLEU-4, bytes and tokens. Figures of something that did not happen are None."""
    texts: dict[str, str] = {}
    sent: list[Sent] = []
    answers: list[Answer] = []
    alone: list[Answer] = []
    seconds = 0.0
    for pictures in _batches(progress(photos)):
        started = time.perf_counter()
        batch = [chain.send(picture) for picture in pictures]
        texts |= {s.name: chain.bundle.text(list(s.draft)) for s in batch if s.draft_accepted}
        asked = [s for s in batch if not s.draft_accepted]
        if chain.engine and asked:
            written = chain.engine.answer([chain.job(s, s.draft or None) for s in asked])
            texts |= {s.name: chain.bundle.text(list(answer.tokens)) for s, answer in zip(asked, written, strict=True)}
            answers += written
        seconds += time.perf_counter() - started
        if chain.engine:
            # What the tier writes alone: the same symbols, no draft, one photo at a time.
            alone += [chain.engine.answer([chain.job(s)])[0] for s in asked]
        sent += batch
    sizes = [s.payload_bytes for s in sent]
    return {
        "images": len(texts),
        "unreadable": photos.unreadable,
        **score({name: captions[name] for name in texts}, texts),
        "bytes_mean": float(np.mean(sizes)),
        "bytes_p95": float(np.percentile(sizes, 95)),
        "drafts_accepted_by_board": float(np.mean([s.draft_accepted for s in sent])),
        "tokens_mean": mean([len(a.tokens) for a in answers] or [len(s.draft) for s in sent]),
        "proposed_mean": mean([a.proposed for a in answers]),
        "accepted_mean": mean([a.accepted for a in answers]),
        "accepted_again_mean": mean([a.accepted_again for a in answers]),
        "passes_mean": mean([a.passes for a in answers]),
        "passes_alone_mean": mean([a.passes for a in alone]),
        "identical_to_tier": mean([a.tokens == b.tokens for a, b in zip(answers, alone, strict=True)]),
        "images_per_second": len(texts) / seconds,
    }


def measure_labels(
    chain: Chain, photos: Photos, progress: Progress = lambda photos: photos, question: "Question | None" = None
) -> dict[str, Any]:
    """Accuracy on pictures named class/name: of a taught question, or of the bundle's own classes.

    Raises EvaluationError for a class that they do not know.
    """
    engine = chain.engine
    assert engine is not None
    classes = question.record.classes if question else classes_of(chain.bundle)
    right, sure, sizes = [], [], []
    for pictures in _batches(progress(photos)):
        batch = [chain.send(picture) for picture in pictures]
        symbols = [s.symbols for s in batch]
        scores = [question.answer(row) for row in engine.pooled(symbols)] if question else engine.classify(symbols)
        for picture, sent, row in zip(pictures, batch, scores, strict=True):
            label = PurePosixPath(picture.name).parent.name
            if label not in classes:
                raise EvaluationError(f"{picture.name}: class {label!r} is none of {', '.join(classes)}")
            best = max(row, key=row.__getitem__)
            right.append(best == label)
            sure.append(row[best])
            sizes.append(sent.payload_bytes)
    return {
        "images": len(right),
        "unreadable": photos.unreadable,
        "accuracy": mean(right),
        "confidence_mean": mean(sure),  # of good probabilities: the accuracy
        "bytes_mean": mean(sizes),
    }


def classes_of(bundle: Bundle) -> tuple[str, ...]:
    """Raises EvaluationError if the bundle has no classifier."""
    if not bundle.manifest.classes:
        raise EvaluationError(f"bundle {bundle.manifest.name} has no classifier")
    return bundle.manifest.classes


def score(references: Mapping[str, Sequence[str]], texts: Mapping[str, str]) -> dict[str, float]:
    """CIDEr and BLEU-4 of pycocoevalcap on lower-cased words without punctuation, one text per photo."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    plain = {name: [" ".join(words_of(text)) for text in rows] for name, rows in references.items()}
    ours = {name: [" ".join(words_of(text))] for name, text in texts.items()}
    cider, _ = Cider().compute_score(plain, ours)
    bleu, _ = Bleu(4).compute_score(plain, ours, verbose=0)
    return {"cider": float(cider), "bleu4": float(bleu[3])}


def _batches(pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
    remaining = iter(pictures)
    while batch := list(islice(remaining, BATCH)):
        yield batch


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
