"""Quality and bytes on photos, through the real codec, envelopes and verifier in one process, without a network."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime import wire
from edge_runtime.capture.picture_files import Picture, read_pictures
from edge_runtime.config import PolicyConfig
from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.draft import Draft
from edge_runtime.inference.draft_calibration import Calibration
from edge_runtime.inference.head import Latent
from edge_runtime.inference.labels import Labels, labels_seen
from edge_runtime.inference.networks import load_draft, load_head, load_labels
from edge_runtime.inference.preprocess import to_input
from edge_runtime.inference.rate import RatedSymbols, features_of
from edge_runtime.picture_checks import decode_picture
from edge_runtime.pipeline import build_request
from edge_runtime.planning import Plan
from edge_runtime.wire.bitstream import decode
from models.captions import captioned_as, words_of
from testbed.sample_photos import is_readable

if TYPE_CHECKING:
    from models.questions import Question
    from server.engine import Engine, Job
    from server.targets import Answer

BATCH = 8
LATENT_CHANNELS = 64


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
        failed: list[str] = []
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
            elif not is_readable(picture, failed):
                self.unreadable += 1
            else:
                taken += 1
                if self._captions is not None:
                    paths[name] = picture.name
                yield Picture(name, picture.data)
        if uncaptioned:
            print(f"{uncaptioned} photos left out: the table, or its split, has no caption for them", file=sys.stderr)
        if not taken and failed:
            raise EvaluationError(f"no picture can be read, name others: {'; '.join(failed)}")
        if not taken:
            raise EvaluationError("none of the pictures has a caption: do the names in the TSV match the files?")


@dataclass(frozen=True, slots=True)
class Sent:
    """One photo as the server received it."""

    name: str
    payload_bytes: int  # of the whole PUBLISH payload; 0 if nothing was sent
    draft: tuple[int, ...]  # end token included
    symbols: np.ndarray  # int8 [64, 7, 7], decoded from the payload
    level: int = -1  # of the symbols; -1: the finest
    channels: int = LATENT_CHANNELS  # that were sent
    labels: Mapping[int, float] = field(default_factory=dict)  # that were sent: class to probability
    draft_accepted: bool = False  # by the board's policy: the draft is the answer, and nothing was sent


@dataclass(frozen=True, slots=True)
class RateLimit:
    """How much of the features is sent. None: as the bundle's default."""

    level: int | None = None
    groups: int | None = None
    max_bytes: int | None = None  # of the features


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
        rate: RateLimit = RateLimit(),
        sends_labels: bool = True,
    ) -> None:
        """min_confidence: accept a draft with at least this confidence without verification; None: verify all.
        sends_labels: with the features, and drafts are written from them, if the bundle has labels for a board.

        Raises EvaluationError for a rate that the bundle does not have.
        """
        latent = bundle.manifest.latent
        for name, value, least, most in (
            ("level", rate.level, 0, len(latent.gains) - 1),
            ("groups", rate.groups, 1, latent.groups),
        ):
            if value is not None and not least <= value <= most:
                raise EvaluationError(f"{name} {value}: bundle {bundle.manifest.name} has {least} to {most}")
        self.bundle, self.engine, self.tier, self.rate = bundle, engine, tier, rate
        self.plan = Plan(paradigm, "evaluation", 60_000, min_confidence=min_confidence)  # type: ignore[arg-type]
        self.head = load_head(bundle, backend, 1)
        self.backend, self.sends_labels = backend, sends_labels

    @cached_property
    def draft(self) -> Draft | None:
        has_draft = self.plan.paradigm in ("device", "speculative")
        return load_draft(self.bundle, self.backend, 1) if has_draft else None

    @cached_property
    def labels(self) -> Labels | None:
        """The board's."""
        return load_labels(self.bundle, self.head, self.backend, 1)

    def send(self, picture: Picture) -> Sent:
        """Picture -> head -> labels -> draft -> envelope -> bytes -> envelope -> symbols. Raises EvaluationError."""
        pixels = to_input(decode_picture(picture.data))
        latent = self.head.latent(pixels)
        labels = self.labels_seen(latent) if self.plan.paradigm != "offload" else []
        drafted = self.draft.write(latent.symbols(), labels) if self.draft else None
        draft = drafted.tokens if drafted else ()
        if self.plan.paradigm == "device" or (drafted and self.plan.accepts(drafted.confidence)):
            return Sent(picture.name, 0, draft, latent.symbols(), draft_accepted=True)
        features = None if self.plan.paradigm == "offload" else self._features(picture, latent)
        sent = labels if features else ()
        asked = build_request(self.bundle, bytes(8), self.plan, pixels, features, draft, labels=sent)
        payload = wire.encode_request(asked)
        request = wire.decode_request(payload)
        draft = tuple(request.draft_ids)
        if features is None:
            assert self.engine is not None
            received = self.engine.symbols(to_input(decode_picture(request.content)))
            return Sent(picture.name, len(payload), draft, received)
        decoded = decode(request.content, self.bundle.tables)
        assert decoded.checked  # nothing on the way can have cut it
        level, channels = decoded.header.level, decoded.complete_channels
        return Sent(picture.name, len(payload), draft, decoded.symbols, level, channels, request.seen_labels)

    def labels_seen(self, latent: Latent) -> list[tuple[int, float]]:
        """Class and probability of the labels that the board tells its draft decoder, and sends with features."""
        return labels_seen(self.labels, latent) if self.sends_labels else []

    def _features(self, picture: Picture, latent: Latent) -> RatedSymbols:
        rate = self.rate
        if features := features_of(latent, self.bundle, rate.level, rate.groups, rate.max_bytes):
            return features
        raise EvaluationError(
            f"{picture.name}: its coarsest features do not fit into {rate.max_bytes} bytes: allow more"
        )

    def label_probabilities(
        self, pictures: Sequence[Picture], question: "Question | None"
    ) -> tuple[np.ndarray, list[int]]:
        """Of each picture, the probability of every class and the bytes that were sent for it."""
        if self.engine is None:
            if question:
                raise EvaluationError("boards answer no taught questions: want --paradigm split")
            if (labels := self.labels) is None:
                name = self.bundle.manifest.name
                raise EvaluationError(f"bundle {name} has no labels for a board: want --paradigm split")
            rows = []
            for picture in pictures:
                backbone_map = self.head.latent(to_input(decode_picture(picture.data))).backbone_map
                assert backbone_map is not None  # a board with labels has a head that computes it
                rows.append(labels.probabilities(backbone_map))
            return np.stack(rows), [0] * len(rows)
        batch = [self.send(picture) for picture in pictures]
        jobs, sizes = [self.job(sent) for sent in batch], [sent.payload_bytes for sent in batch]
        if question:
            answers = [question.answer(known) for known in self.engine.evidence(jobs)]
            return np.array([[answer[name] for name in question.record.classes] for answer in answers]), sizes
        from models.labels import with_seen

        logits = self.engine.label_logits(self.engine.features(jobs))
        found = [with_seen(row.softmax(-1), sent.labels) for row, sent in zip(logits, batch, strict=True)]
        return np.stack([row.cpu().numpy() for row in found]), sizes

    def text(self, answer: "Answer") -> str:
        """The tokens of a language model are of a vocabulary of its own; its answers have the text."""
        return answer.text or self.bundle.text(list(answer.tokens))

    def job(self, sent: Sent, draft: tuple[int, ...] | None = None) -> "Job":
        from server.engine import Job

        return Job(sent.symbols, sent.level, sent.channels, draft, self.tier, labels=sent.labels)


def proven_chain(
    bundle: Bundle,
    paradigm: str,
    tier: str,
    backend: str,
    quality_floor: float | None = None,
    rate: RateLimit = RateLimit(),
    threads: int = 2,
    sends_labels: bool = True,
) -> Chain:
    """A chain whose engine has proven its numerics. quality_floor: of the paradigm `auto`, default: a board's."""
    min_confidence = None
    if paradigm == "auto":
        floor = PolicyConfig().quality_floor if quality_floor is None else quality_floor
        paradigm = "speculative"
        min_confidence = Calibration(bundle.manifest.draft_calibration).min_confidence(floor)
    if paradigm == "device":
        return Chain(bundle, paradigm, backend, tier, None, rate=rate, sends_labels=sends_labels)
    from server.loading import ready_engine

    if tier == "lm":
        from benchmarks.language import LanguageEngine

        answers: Engine = LanguageEngine(bundle, threads)
    else:
        answers = ready_engine(bundle, [tier] if tier else [], threads=threads)
    return Chain(bundle, paradigm, backend, tier, answers, min_confidence, rate, sends_labels)


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
            texts |= {s.name: chain.text(answer) for s, answer in zip(asked, written, strict=True)}
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
    """Accuracy on pictures named class/name: of a taught question, or of the bundle's own classes, by id or by name.

    A set with fewer classes is a question of fewer answers: the most probable one of its classes is taken. How often a
    class of the bundle is right among all of them is in `accuracy_among_all`. Raises EvaluationError for a class that
    they do not know.
    """
    names = question.record.classes if question else class_names(chain.bundle)
    wanted, sizes, found = list[int](), list[int](), list[np.ndarray]()
    for pictures in _batches(progress(photos)):
        wanted += [class_of(names, picture.name) for picture in pictures]
        rows, bytes_sent = chain.label_probabilities(pictures, question)
        found.append(rows)
        sizes += bytes_sent
    probabilities, candidates = np.concatenate(found), np.unique(wanted)
    is_right = best_classes(probabilities, candidates) == np.array(wanted)[:, None]
    return {
        "images": len(wanted),
        "unreadable": photos.unreadable,
        "classes": len(candidates),
        "accuracy": float(is_right[:, 0].mean()),
        "top5": float(is_right.any(1).mean()),
        "accuracy_among_all": float((probabilities.argmax(1) == wanted).mean()),
        "confidence_mean": float(probabilities.max(1).mean()),  # of good probabilities: the accuracy among all
        "bytes_mean": mean(sizes),
    }


def class_of(names: Sequence[str], picture: str) -> int:
    """The number of the class of a picture named class/name. Raises EvaluationError if it is none of these."""
    label = PurePosixPath(picture).parent.name
    if not label:
        raise EvaluationError(f"{picture} is in no folder: want class/name.jpg, classes: {', '.join(names)}"[:400])
    if label not in names:
        raise EvaluationError(f"{picture}: class {label!r} is none of {', '.join(names)}"[:400])
    return names.index(label)


def best_classes(scores: np.ndarray, candidates: NDArray[np.intp]) -> NDArray[np.intp]:
    """Scores [N, classes] to the five best candidates, the best first, [N, 5], or fewer if there are fewer."""
    return candidates[np.argsort(-scores[:, candidates], axis=1)[:, :5]]


def class_names(bundle: Bundle) -> tuple[str, ...]:
    """The ids of the bundle's classes, or their names. Raises EvaluationError if it has no classifier."""
    manifest = bundle.manifest
    if not manifest.classes:
        raise EvaluationError(f"bundle {manifest.name} has no classifier")
    return manifest.class_ids or manifest.classes


def score(references: Mapping[str, Sequence[str]], texts: Mapping[str, str]) -> dict[str, float]:
    """CIDEr and BLEU-4 of pycocoevalcap on lower-cased words without punctuation, one text per photo."""
    from pycocoevalcap.bleu.bleu import Bleu

    bleu, _ = Bleu(4).compute_score(_plain(references), _plain({n: [text] for n, text in texts.items()}), verbose=0)
    return {"cider": float(ciders(references, texts).mean()), "bleu4": float(bleu[3])}


def ciders(references: Mapping[str, Sequence[str]], texts: Mapping[str, str]) -> NDArray[np.float64]:
    """CIDEr-D of each text, in the order of the references. The words' document frequencies are those of all photos."""
    from pycocoevalcap.cider.cider import Cider

    each = Cider().compute_score(_plain(references), _plain({name: [text] for name, text in texts.items()}))[1]
    return np.asarray(each, np.float64)


def _plain(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {name: [" ".join(words_of(text)) for text in rows] for name, rows in texts.items()}


def _batches(pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
    remaining = iter(pictures)
    while batch := list(islice(remaining, BATCH)):
        yield batch


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
