"""`aiflow evaluate`: quality and bytes on photos, through the real codec, envelopes and verifier in one process."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.capture.picture_files import Picture, read_pictures
from edge_runtime.config import PolicyConfig
from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import Bundle, open_bundle
from edge_runtime.inference.draft import Draft
from edge_runtime.inference.draft_calibration import Calibration
from edge_runtime.inference.head import Head
from edge_runtime.planning.policy import Policy
from testbed.sample_photos import is_readable
from testbed.terminal import new_file, number, print_figures, share, track

if TYPE_CHECKING:
    from server.engine import Answer, Engine, Job

BATCH = 8
SHIPPED_BUNDLE = Path(__file__).parent.parent / "models" / "zoo" / "flickr8k-lite0"
CAPTIONS_HELP = "columns image, caption, and split where one is chosen; images by their paths or files' names"


class EvaluationError(AiflowError, ValueError):
    """Photos and captions that cannot be scored."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`caption` and `classify`."""
    kinds = parser.add_subparsers(dest="kind", metavar="caption|classify", required=True)
    caption = kinds.add_parser("caption", help="CIDEr and BLEU against people's captions")
    caption.add_argument("--captions", type=Path, required=True, metavar="TSV", help=CAPTIONS_HELP)
    caption.add_argument("--split", help="only photos of this split")
    caption.add_argument(
        "--paradigm",
        choices=["device", "split", "speculative", "offload", "auto"],
        required=True,
        help="auto: speculative, but a draft that is sure enough stands",
    )
    floor = PolicyConfig().quality_floor
    caption.add_argument(
        "--quality-floor", type=share, default=floor, metavar="SHARE", help=f"of auto (default: {floor}, a board's)"
    )
    caption.add_argument("--tier", choices=["edge", "cloud"], default="cloud", help="who answers (default: cloud)")
    classify = kinds.add_parser("classify", help="accuracy on pictures named class/name.JPEG")
    for kind in (caption, classify):
        kind.add_argument("--images", type=Path, nargs="+", required=True, metavar="DIR_OR_TAR")
        kind.add_argument("--bundle", type=Path, default=SHIPPED_BUNDLE, help="default: the bundle that is shipped")
        kind.add_argument("--backend", choices=["onnx", "litert"], default="onnx")
        kind.add_argument("--limit", type=number, metavar="N", help="only the first N photos")
        kind.add_argument("--json", type=new_file, metavar="FILE", help="write the figures to FILE")


def run(args: argparse.Namespace) -> None:
    """Prints the figures and writes the JSON."""
    bundle = open_bundle(args.bundle)
    figures = _captions(args, bundle) if args.kind == "caption" else _classes(args, bundle)
    print_figures(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


class Photos:
    """The pictures of directories and tars, named as their captions are: those without a caption, and those that cannot
    be decoded, are left out, told and counted. captions: None takes all.
    """

    def __init__(
        self, sources: Sequence[Path], captions: Mapping[str, object] | None = None, limit: int | None = None
    ) -> None:
        self._sources, self._captions, self._limit = sources, captions, limit
        self.unreadable = 0

    def __iter__(self) -> Iterator[Picture]:
        """Raises EvaluationError where no picture is left, and for two that share captions."""
        from models.captions import captioned_as

        paths: dict[str, str] = {}  # by name, where there are captions
        taken = uncaptioned = 0
        for picture in (picture for source in self._sources for picture in read_pictures(source)):
            if taken == self._limit:
                break
            name = picture.name if self._captions is None else captioned_as(self._captions, picture.name)
            if name is None:
                uncaptioned += 1
            elif name in paths:
                raise EvaluationError(f"photo {name} is met twice, as {paths[name]} and {picture.name}: leave one out")
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
    """One photo as the server got it."""

    name: str
    payload_bytes: int  # the whole PUBLISH payload; 0 if nothing was sent
    draft: tuple[int, ...]  # end token included
    symbols: np.ndarray  # int8 [64, 7, 7], decoded from the payload
    stands: bool = False  # the draft is the answer


class Chain:
    """Board and server of one bundle without a network between them."""

    def __init__(
        self,
        bundle: Bundle,
        paradigm: str,
        backend: str,
        tier: str,
        engine: "Engine | None",
        policy: Policy | None = None,
    ) -> None:
        """policy: says which drafts stand; None: none does."""
        from edge_runtime.app import load_draft, load_head
        from edge_runtime.pipeline import Plan

        self.bundle, self.engine, self.tier, self.policy = bundle, engine, tier, policy
        self.plan = Plan(paradigm, "evaluation", budget_ms=60_000)  # type: ignore[arg-type]
        self.head: Head = load_head(bundle, backend, 1)
        self.draft: Draft | None = load_draft(bundle, backend, 1) if paradigm in ("device", "speculative") else None

    def send(self, picture: Picture) -> Sent:
        """Picture -> head -> draft -> envelope -> bytes -> envelope -> symbols."""
        from edge_runtime import wire
        from edge_runtime.capture.picture_checks import decode_picture
        from edge_runtime.inference.preprocess import to_input
        from edge_runtime.pipeline import NOTHING_DRAFTED, build_request

        pixels = to_input(decode_picture(picture.data))
        symbols = self.head.symbols(pixels)
        drafted = self.draft.write(symbols) if self.draft else NOTHING_DRAFTED
        draft = drafted.tokens
        if self.plan.paradigm == "device" or (self.policy and self.policy.stands(drafted.confidence)):
            return Sent(picture.name, 0, draft, symbols, stands=True)
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

    def job(self, sent: Sent, draft: tuple[int, ...] | None = None, wants_label: bool = False) -> "Job":
        """What the engine is asked."""
        from server.engine import Job

        return Job(sent.symbols, self.bundle.manifest.latent.gains[-1], draft, self.tier, wants_label=wants_label)


def _chain(args: argparse.Namespace, bundle: Bundle, paradigm: str, tier: str) -> Chain:
    policy = None
    if paradigm == "auto":
        floor = PolicyConfig(quality_floor=args.quality_floor)
        paradigm, policy = "speculative", Policy(floor, calibration=Calibration(bundle.manifest.draft_calibration))
    if paradigm == "device":
        return Chain(bundle, paradigm, args.backend, tier, None)
    from server.loading import load_engine
    from server.numerics import prove

    engine = load_engine(bundle, [tier], threads=2)
    engine.proof = prove(engine)
    return Chain(bundle, paradigm, args.backend, tier, engine, policy)


def _batches(photos: Photos, total: int | None, note: str) -> Iterator[list[Picture]]:
    """With progress on a terminal."""
    shown = track(photos, note, total)
    while batch := list(islice(shown, BATCH)):
        yield batch


def _captions(args: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    from models.captions import captions_of

    captions = captions_of(args.captions, args.split)
    photos = Photos(args.images, captions, args.limit)
    chain = _chain(args, bundle, args.paradigm, args.tier)
    texts: dict[str, str] = {}
    sent: list[Sent] = []
    answers: list[Answer] = []
    alone: list[Answer] = []
    seconds = 0.0
    for pictures in _batches(photos, args.limit or len(captions), f"{args.paradigm} {args.tier}"):
        started = time.perf_counter()
        batch = [chain.send(picture) for picture in pictures]
        texts |= {s.name: bundle.text(list(s.draft)) for s in batch if s.stands}
        asked = [s for s in batch if not s.stands]
        if chain.engine and asked:
            written = chain.engine.answer([chain.job(s, s.draft or None) for s in asked])
            texts |= {s.name: bundle.text(list(answer.tokens)) for s, answer in zip(asked, written, strict=True)}
            answers += written
        seconds += time.perf_counter() - started
        if chain.engine:
            # What the tier writes alone: the same symbols, no draft, one photo at a time.
            alone += [chain.engine.answer([chain.job(s)])[0] for s in asked]
        sent += batch
    sizes = np.array([s.payload_bytes for s in sent])
    same = [a.tokens == b.tokens for a, b in zip(answers, alone, strict=True)] or [True]
    return {
        "images": len(texts),
        "unreadable": photos.unreadable,
        **score({name: captions[name] for name in texts}, texts),
        "bytes_mean": float(sizes.mean()),
        "bytes_p95": float(np.percentile(sizes, 95)),
        "drafts_standing": float(np.mean([s.stands for s in sent])),
        "tokens_mean": float(np.mean([len(a.tokens) for a in answers] or [len(s.draft) for s in sent])),
        "proposed_mean": float(np.mean([a.proposed for a in answers] or [0])),
        "accepted_mean": float(np.mean([a.accepted for a in answers] or [0])),
        "redrafted_mean": float(np.mean([a.redrafted for a in answers] or [0])),
        "passes_mean": float(np.mean([a.passes for a in answers] or [0])),
        "passes_alone_mean": float(np.mean([a.passes for a in alone] or [0])),
        "identical_to_tier": float(np.mean(same)),
        "images_per_second": len(texts) / seconds,
    }


def _classes(args: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    if not bundle.manifest.classes:
        raise EvaluationError(f"bundle {bundle.manifest.name} has no classifier")
    tier = next(iter(bundle.manifest.targets))
    chain = _chain(args, bundle, "split", tier)
    assert chain.engine is not None
    photos = Photos(args.images, limit=args.limit)
    right, sizes = [], []
    for pictures in _batches(photos, args.limit, "classify"):
        batch = [chain.send(picture) for picture in pictures]
        scores = chain.engine.classify([s.symbols for s in batch])
        for picture, sent, row in zip(pictures, batch, scores, strict=True):
            label = PurePosixPath(picture.name).parent.name
            if label not in bundle.manifest.classes:
                raise EvaluationError(
                    f"{picture.name}: class {label!r} is none of {', '.join(bundle.manifest.classes)}"
                )
            right.append(max(row, key=lambda name: row[name]) == label)
            sizes.append(sent.payload_bytes)
    return {
        "images": len(right),
        "unreadable": photos.unreadable,
        "accuracy": float(np.mean(right)),
        "bytes_mean": float(np.mean(sizes)),
    }


def score(references: dict[str, Sequence[str]], texts: dict[str, str]) -> dict[str, float]:
    """CIDEr and BLEU-4 of pycocoevalcap on lower-cased words without punctuation, one text a photo."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    from models.captions import words_of

    plain = {name: [" ".join(words_of(text)) for text in rows] for name, rows in references.items()}
    ours = {name: [" ".join(words_of(text))] for name, text in texts.items()}
    cider, _ = Cider().compute_score(plain, ours)
    bleu, _ = Bleu(4).compute_score(plain, ours, verbose=0)
    return {"cider": float(cider), "bleu4": float(bleu[3])}
