"""The path of a frame, top to bottom: read this file first.

plan -> input -> head -> symbols -> labels -> draft -> bits -> request -> event "new": one function per paradigm says in
which order. Nothing here waits for the network. requests/ ends every request in one more event, whether a reply comes
or not, and stores those that cannot be sent now, if there is an outbox. planning/ decides which paradigm a frame takes,
and why (`Plan`); a plan with `keep` goes to the outbox at once.
"""

import logging
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from math import isfinite
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.capture import Frame
from edge_runtime.inference.backends import BackendError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.draft import Drafted
from edge_runtime.inference.head import Latent
from edge_runtime.inference.labels import worth_sending
from edge_runtime.inference.networks import Networks
from edge_runtime.inference.preprocess import shrunk, to_input, to_jpeg
from edge_runtime.inference.rate import RatedSymbols, features_of
from edge_runtime.inference.references import ReferenceFrames, SentFrame
from edge_runtime.inference.reuse import ReusableAnswers
from edge_runtime.inference.sampling import sampler_of
from edge_runtime.planning import Plan, Planner
from edge_runtime.reporting.events import Events
from edge_runtime.requests import NewRequest, RequestTracker
from edge_runtime.wire import (
    MAX_ENVELOPE,
    ContentKind,
    Options,
    Paradigm,
    Request,
    RequestIds,
    WireError,
    bitstream,
    encode_labels,
    encode_request,
)
from edge_runtime.wire.envelope import encode_tokens, seed_of
from edge_runtime.wire.event import PARADIGMS, AnsweredBy, Event, Rate, Reuse

logger = logging.getLogger(__name__)

REUSED = (  # fields of an earlier event that hold for the new one too
    *("text", "tokens", "answered_by", "label", "scores", "confidence", "unsure", "cut", "answers"),
    *("object", "schema", "valid", "seed"),
)
MAX_SENT_PICTURE = MAX_ENVELOPE - 1024  # bytes, beside the other fields of a request; a larger picture is made smaller
JPEG_EVERY = 8  # frames of a camera: encoding one takes a tenth of a frame's time
NO_PIXELS = np.empty((0, 0, 3), np.uint8)  # for a request that contains features


class Stopwatch:
    """Milliseconds per named stage. With a slowdown it sleeps, to take as long as a slower board."""

    def __init__(self, slowdown: float = 1.0) -> None:
        self.ms: dict[str, float] = {}
        self._slowdown = slowdown
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage, which began at the end of the previous one."""
        if self._slowdown > 1.0:
            time.sleep((self._slowdown - 1.0) * (time.perf_counter() - self._last))
        now = time.perf_counter()
        self.ms[stage], self._last = round(1e3 * (now - self._last), 3), now


@dataclass(slots=True)
class FrameInProgress:
    """A frame and what has been computed from it so far."""

    frame: Frame
    plan: Plan
    watch: Stopwatch
    request_id: bytes
    pixels: npt.NDArray[np.uint8]  # [H, W, 3], RGB, the input of the head
    latent: Latent | None = None  # the output of the head
    draft: Drafted | None = None
    labels: list[tuple[int, float]] | None = None  # class and probability, the likeliest first
    rate: Rate | None = None  # of the features that were sent
    bytes_up: int = 0  # of the request that was sent
    jpeg_bytes: int = 0  # of the frame as a picture, sent or not


class Pipeline:
    """The networks of one board, and where their results go: to servers, to the board's users."""

    def __init__(
        self,
        bundle: Bundle,
        networks: Networks,
        planner: Planner,
        tracker: RequestTracker,
        events: Events,
        slowdown: float = 1.0,
        sends_labels: bool = True,
        reusable: ReusableAnswers | None = None,
        references: ReferenceFrames | None = None,
    ) -> None:
        """Without a head, every plan must be to offload or to send nothing. reusable, references: what servers reply
        goes into both. sends_labels: with the features, and drafts are written from them; if False, labels are found
        only for frames that the board answers alone.
        """
        self.head, self.draft, self.labels = networks
        self.bundle, self.planner = bundle, planner
        self.sends_labels = sends_labels
        self.tracker, self.events, self.slowdown = tracker, events, slowdown
        self.ids = RequestIds()
        self.reusable, self.references = reusable or ReusableAnswers(), references or ReferenceFrames()
        self.failed = 0  # frames that the head or the coder could not handle
        self.reused = 0  # frames for which an earlier answer was used again
        self.with_reference = 0  # frames that were coded against an earlier one
        self.jpeg_bytes = 0  # of all handled frames as pictures
        self._jpeg_sizes: dict[str, tuple[int, int]] = {}  # by camera: bytes, and how many frames more count them
        self.handled = dict.fromkeys(PARADIGMS, 0)  # frames, by the paradigm of their event

    def run(self, frames: Iterable[Frame]) -> None:
        """Handles frames until there are no more."""
        for frame in frames:
            self.handle(frame)
            del frame  # see Frame

    def handle(self, frame: Frame) -> Event | None:
        """Like `answer`, but a frame that fails is counted, and the next one can be handled."""
        try:
            return self.answer(frame)
        except (BackendError, WireError) as error:
            self.failed += 1
            logger.error("frame failed camera=%s error=%s", frame.camera, error)
            return None

    def answer(self, frame: Frame) -> Event:
        """Sends the request of one frame, if its plan has one. Returns the event "new" with what is known of the frame.

        It is published if it has a draft, or if it is the only one.
        """
        plan, watch = self.planner.plan(frame.camera), Stopwatch(self.slowdown)
        request_id = self.ids.next(int(frame.captured_unix * 1e3), secrets.randbits(16))
        work = FrameInProgress(frame, plan, watch, request_id, to_input(frame.pixels))
        watch.lap("resize")
        paths = {
            "device": self._device,
            "split": self._split,
            "speculative": self._speculative,
            "offload": self._offload,
        }
        event = self._reuse(work) or paths[plan.paradigm](work)
        self.handled[event.paradigm or plan.paradigm] += 1
        self.jpeg_bytes += work.jpeg_bytes
        watch.lap("publish")
        self.planner.learn(plan, watch.ms, work.draft.confidence if work.draft else None)
        return event

    # ---- one function per paradigm ----

    def _device(self, work: FrameInProgress) -> Event:
        """The draft is the answer."""
        self._run_head(work)
        self._write_draft(work, alone=True)
        return self._answer_on_device(work, work.plan.why)

    def _split(self, work: FrameInProgress) -> Event:
        """The request contains the features. The draft is decoded after sending, to show something until the reply."""
        self._run_head(work)
        why_unsent = self._send_features(work)
        if why_unsent or work.plan.writes_draft:
            self._write_draft(work, alone=bool(why_unsent))
        return self._answer_on_device(work, why_unsent) if why_unsent else self._announce(work)

    def _speculative(self, work: FrameInProgress) -> Event:
        """The request contains features and draft. A draft that is good enough is the answer without a request."""
        self._run_head(work)
        self._write_draft(work)
        if work.draft and work.plan.accepts(work.draft.confidence) and not work.plan.keep:
            why = f"draft accepted: confidence {work.draft.confidence:.2f}"
            event = self._answer_on_device(work, why)
            if work.plan.reuse_distance and work.latent:
                self.reusable.accepted(event, work.latent, work.frame.captured, wanted(work.plan))
            return event
        why_unsent = self._send_features(work)
        return self._answer_on_device(work, why_unsent) if why_unsent else self._announce(work)

    def _offload(self, work: FrameInProgress) -> Event:
        """The request contains the picture, and the draft if a server can use it.

        The outbox keeps features instead: they are small and show nobody. They are computed after sending, or before
        if the outbox stores each request before it is sent.
        """
        if work.plan.sends_draft or self.tracker.stores_first:
            self._run_head(work)
        if work.plan.sends_draft:
            self._write_draft(work)
        why_unsent = self._send_picture(work, self._compact(work) if self.tracker.stores_first else b"")
        if why_unsent or work.plan.writes_draft or self.tracker.has_outbox:
            self._run_head(work)
        if not work.draft and (why_unsent or work.plan.writes_draft):
            self._write_draft(work, alone=bool(why_unsent))
        return self._answer_on_device(work, why_unsent) if why_unsent else self._announce(work, self._compact(work))

    # ---- their steps ----

    def _reuse(self, work: FrameInProgress) -> Event | None:
        """Publishes an earlier answer if it holds for this frame too. Then nothing is sent and no draft is written."""
        plan, frame = work.plan, work.frame
        if not plan.reuse_distance:
            return None
        self._run_head(work)
        found = work.latent and self.reusable.find(
            frame.camera, work.latent, wanted(plan), frame.captured, plan.reuse_distance, plan.reuse_s
        )
        if not found or not is_accepted(found[0], plan):
            return None
        earlier, distance = found
        self._count_jpeg_bytes(work)
        self.reused += 1
        event = self._event(
            work,
            final=True,
            paradigm="device",
            why=f"the answer to frame {earlier.frame} is used again: the distance is {distance:.3f}",
            reuse=Reuse(earlier.frame, distance),
            **{name: getattr(earlier, name) for name in REUSED},
        )
        self.events.publish(event)
        return event

    def _run_head(self, work: FrameInProgress) -> None:
        if self.head and work.latent is None:
            work.latent = self.head.latent(work.pixels)
            work.watch.lap("head")

    def _write_draft(self, work: FrameInProgress, alone: bool = False) -> None:
        """alone: the draft will be the answer, so labels are wanted in any case."""
        if self.draft and work.latent:
            if (alone or self.sends_labels) and self.draft.reads_labels:
                self._find_labels(work)
            sampling, labels = work.plan.sampling, worth_sending(work.labels or ())
            sampler = sampler_of(sampling, seed_of(sampling, work.request_id))
            work.draft = self.draft.write(work.latent.symbols(), labels, sampler)
            work.watch.lap("draft")

    def _find_labels(self, work: FrameInProgress) -> None:
        if self.labels and work.labels is None and work.latent and work.latent.backbone_map is not None:
            work.labels = self.labels.likeliest(work.latent.backbone_map)
            work.watch.lap("labels")

    def _features(self, work: FrameInProgress) -> RatedSymbols | None:
        """The symbols that are sent, at the rate of the plan. None: even the coarsest ones take more than its bytes."""
        plan = work.plan
        return features_of(work.latent, self.bundle, plan.level, plan.groups, plan.max_bytes) if work.latent else None

    def _compact(self, work: FrameInProgress) -> bytes:
        """An offloaded request with features instead of the picture, for the outbox. Empty: it keeps none."""
        if not self.tracker.has_outbox:
            return b""
        if self.sends_labels:
            self._find_labels(work)
        features = self._features(work)
        plan = replace(work.plan, paradigm="speculative")
        return encode_request(self._request(work, plan, features)) if features else b""

    def _send_features(self, work: FrameInProgress) -> str | None:
        """Sends the request with features and labels. None, or why it was not sent: something does not fit."""
        plan, frame = work.plan, work.frame
        if self.sends_labels:
            self._find_labels(work)
        features = self._features(work)
        if features is None:
            return f"{plan.paradigm}: the coarsest features do not fit into {plan.max_bytes} bytes"
        request = self._request(work, plan, features)
        first_copy = request if plan.keep else self._against_reference(work, request, features)
        payload = encode_request(first_copy)
        work.watch.lap("encode")
        work.rate = Rate(features.level, features.groups, len(first_copy.content))
        if plan.keep:  # the outbox stores this event. In all other cases the encoding would only delay the request.
            self._count_jpeg_bytes(work)
        if why := self._submit(work, request, payload):
            work.rate = None
            return why
        if not plan.keep:
            has_reference = first_copy is not request
            self.with_reference += has_reference
            rated = features.symbols, features.level, features.groups
            self.references.sent(SentFrame(request.id, frame.camera, *rated, frame.captured, has_reference))
        return None

    def _send_picture(self, work: FrameInProgress, compact: bytes = b"") -> str | None:
        """Sends the request with the picture. None, or why it was not sent.

        compact: the same request with features, for the outbox.
        """
        request = self._request(work, work.plan, None)
        payload = encode_request(request)
        work.watch.lap("encode")
        work.jpeg_bytes = len(request.content)
        return self._submit(work, request, payload, compact)

    def _submit(self, work: FrameInProgress, request: Request, payload: bytes, compact: bytes = b"") -> str | None:
        """Hands the request over to requests/. None, or why it was not taken: the byte budget is spent."""
        plan, captured = work.plan, work.frame.captured
        event, deadline = self._event(work, bytes_up=len(payload)), captured + plan.budget_ms / 1e3
        if not self.tracker.submit(NewRequest(request, payload, event, captured, deadline, plan.keep, compact)):
            return f"{plan.paradigm}: {len(payload)} bytes more do not fit into this minute's budget"
        work.bytes_up = 0 if plan.keep else len(payload)
        if plan.reuse_distance and work.latent:
            self.reusable.asked(work.request_id.hex(), work.latent, captured, wanted(plan))
        return None

    def _against_reference(self, work: FrameInProgress, request: Request, features: RatedSymbols) -> Request:
        """The same request with fewer bytes, if the server has an earlier frame that is much like this one."""
        tables, frame, (level, groups) = self.bundle.inter_tables, work.frame, (features.level, features.groups)
        reference = self.references.find(frame.camera, level, groups, frame.captured) if tables else None
        if tables is None or reference is None:
            return request
        content = bitstream.encode(features.symbols, tables, level, groups, reference)
        shorter = len(content) < len(request.content)
        return msgspec.structs.replace(request, content=content) if shorter else request

    def _request(self, work: FrameInProgress, plan: Plan, features: RatedSymbols | None) -> Request:
        age_ms, tokens = int(1e3 * (time.monotonic() - work.frame.captured)), work.draft.tokens if work.draft else ()
        labels = work.labels or () if self.sends_labels else ()
        pixels = work.pixels
        if features is None and plan.picture_pixels:
            pixels = shrunk(work.frame.pixels, plan.picture_pixels)
        return build_request(self.bundle, work.request_id, plan, pixels, features, tokens, age_ms, labels)

    def _answer_on_device(self, work: FrameInProgress, why: str) -> Event:
        """Publishes the draft, with labels, as the only answer."""
        self._find_labels(work)
        self._count_jpeg_bytes(work)
        event = self._event(work, final=True, paradigm="device", why=why)
        self.events.publish(event)
        return event

    def _announce(self, work: FrameInProgress, compact: bytes = b"") -> Event:
        """Publishes the draft, if there is one and the reply is not here yet. compact: the request for the outbox."""
        self._count_jpeg_bytes(work)
        event = self._event(work)
        self.tracker.announce(event, compact)
        return event

    def _count_jpeg_bytes(self, work: FrameInProgress) -> None:
        """The bytes of the frame as a JPEG, only to compare: of a live camera, one frame in JPEG_EVERY is encoded."""
        if work.jpeg_bytes:
            return
        work.jpeg_bytes, frames = self._jpeg_sizes.get(work.frame.camera, (0, 0))
        if work.frame.name or not frames:  # photos of a folder may all be different
            work.jpeg_bytes, frames = len(to_jpeg(work.pixels, work.plan.jpeg_quality)), JPEG_EVERY
        self._jpeg_sizes[work.frame.camera] = work.jpeg_bytes, frames - 1

    def _event(self, work: FrameInProgress, **changes: Any) -> Event:
        """An event with the present knowledge about the frame."""
        frame, plan = work.frame, work.plan
        values: dict[str, Any] = {
            "type": "new",
            "frame": work.request_id.hex(),
            "camera": frame.camera,
            "captured": datetime.fromtimestamp(frame.captured_unix, timezone.utc),
            "paradigm": plan.paradigm,
            "why": plan.why,
            "explain": plan.explain,
            "picture": frame.name.encode(errors="replace").decode()[-256:],  # a name may contain bytes that are no text
            "bytes_up": work.bytes_up,
            "jpeg_bytes": work.jpeg_bytes,
            "rate": work.rate,
            "frigate": frame.frigate,
            "timings_ms": dict(work.watch.ms),
            "after_ms": 1e3 * (time.monotonic() - frame.captured),
        }
        if plan.sampling.is_sampled:
            values["seed"] = f"{seed_of(plan.sampling, work.request_id):016x}"
        if self.labels and work.labels:
            scores = self.labels.scores(work.labels)
            values |= {"scores": scores, "label": next(iter(scores))}
        if work.draft:
            text = self.bundle.text(list(work.draft.tokens))
            values |= {"text": text, "tokens": work.draft.tokens, "answered_by": AnsweredBy("device")}
            if isfinite(work.draft.confidence):
                values["confidence"] = work.draft.confidence
                values["unsure"] = work.draft.confidence < self.bundle.manifest.unsure_below.get("device", 0.0)
        return Event(**(values | changes))


def wanted(plan: Plan) -> Options:
    """The settings that change an answer, besides the frame."""
    return msgspec.structs.replace(plan.sampling, tier=plan.tier, questions=plan.questions, prompt=plan.prompt)


def is_accepted(event: Event, plan: Plan) -> bool:
    """Whether an answer is good enough now: a user may have raised the floor since the board accepted its draft."""
    is_draft = event.answered_by == AnsweredBy("device")
    return not is_draft or (event.confidence is not None and plan.accepts(event.confidence))


def build_request(
    bundle: Bundle,
    request_id: bytes,
    plan: Plan,
    pixels: npt.NDArray[np.uint8],
    features: RatedSymbols | None,
    draft: tuple[int, ...],
    age_ms: int = 0,
    labels: Sequence[tuple[int, float]] = (),
) -> Request:
    """The request of one frame; for a real board and for an evaluation. features: None sends the picture.

    age_ms: since the capture. labels: that the board has seen, class and probability; they go with features only.
    """
    if features:
        kind = ContentKind.LATENT
        content = bitstream.encode(features.symbols, bundle.tables, features.level, features.groups)
    else:
        kind, content = ContentKind.JPEG, to_jpeg(pixels, plan.jpeg_quality)
        while len(content) > MAX_SENT_PICTURE:
            pixels = shrunk(pixels, max(pixels.shape) // 2)
            content = to_jpeg(pixels, plan.jpeg_quality)
    camera = "" if features else plan.camera
    options = msgspec.structs.replace(wanted(plan), propose=plan.propose, camera=camera)
    return Request(
        id=request_id,
        bundle=bundle.id,
        paradigm=Paradigm[plan.paradigm.upper()],
        age_ms=age_ms,
        budget_ms=max(0, plan.budget_ms - age_ms),
        content_kind=kind,
        content=content,
        draft=encode_tokens(draft) if plan.paradigm == "speculative" or plan.sends_draft else b"",
        options=options if options != Options() else None,
        labels=encode_labels(worth_sending(labels)) or None if features else None,
    )
