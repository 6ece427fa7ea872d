"""The path of a frame, top to bottom: read this file first.

frame -> input -> head -> symbols -> draft -> event "new" -> bits -> request. Nothing here waits for the network: what
comes back, or does not, is the business of answers.py, which ends every request in one more event.
"""

import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone

import cv2
import numpy as np
import numpy.typing as npt

from edge_runtime.answers import Answers, Question
from edge_runtime.backends import BackendError
from edge_runtime.bundle import Bundle
from edge_runtime.draft import Draft, Drafted
from edge_runtime.events import Events
from edge_runtime.head import Head
from edge_runtime.preprocess import to_input
from edge_runtime.sources import Frame
from edge_runtime.wire import ContentKind, Options, Paradigm, Request, RequestIds, WireError, bitstream, encode_request
from edge_runtime.wire.envelope import Tier, encode_tokens
from edge_runtime.wire.event import AnsweredBy, Event, ParadigmName

logger = logging.getLogger(__name__)

NOTHING_DRAFTED = Drafted((), 0.0)
NOTHING_SEEN = np.empty((0, 0, 0), np.int8)  # the symbols where the server runs the head


@dataclass(frozen=True, slots=True)
class Plan:
    """How one frame is answered."""

    paradigm: ParadigmName
    why: str  # for people, in every event
    budget_ms: int  # from capture until the draft stands
    tier: Tier | None = None  # wanted for the answer
    jpeg_quality: int = 75  # of offload


class Stopwatch:
    """Milliseconds per named stage."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage, which began where the last one ended."""
        now = time.perf_counter()
        self.ms[stage], self._last = round(1e3 * (now - self._last), 3), now


class Pipeline:
    """One board's head, draft and ways out."""

    def __init__(
        self, bundle: Bundle, head: Head | None, draft: Draft | None, plan: Plan, answers: Answers, events: Events
    ) -> None:
        """Without a head every plan must be to offload."""
        self.bundle, self.head, self.draft, self.plan = bundle, head, draft, plan
        self.answers, self.events = answers, events
        self.ids = RequestIds()
        self.failed = 0  # frames that the head or the coder could not handle

    def run(self, frames: Iterable[Frame]) -> None:
        """Handles frames until there are none."""
        for frame in frames:
            self.handle(frame)

    def handle(self, frame: Frame) -> Event | None:
        """`answer_at_once`, but a frame that fails is counted, and the next one is handled."""
        try:
            return self.answer_at_once(frame)
        except (BackendError, WireError) as error:
            self.failed += 1
            logger.error("frame failed camera=%s error=%s", frame.camera, error)
            return None

    def answer_at_once(self, frame: Frame) -> Event:
        """One frame: the draft at once, the question on its way. Returns the event that says so."""
        plan, watch = self.plan, Stopwatch()
        pixels = to_input(frame.pixels)
        watch.lap("resize")
        symbols = self.head.symbols(pixels) if self.head else NOTHING_SEEN
        watch.lap("head")
        drafted = self.draft.write(symbols) if self.draft else NOTHING_DRAFTED
        watch.lap("draft")

        request_id = self.ids.next(int(frame.captured_unix * 1e3), secrets.randbits(16))
        request = None
        if plan.paradigm != "device":
            request = build_request(self.bundle, request_id, plan, pixels, symbols, drafted.tokens, age_ms(frame))
        payload = encode_request(request) if request else b""
        watch.lap("encode")

        seen = Event(
            type="new",
            frame=request_id.hex(),
            camera=frame.camera,
            captured=datetime.fromtimestamp(frame.captured_unix, timezone.utc),
            final=request is None,
            text=self.bundle.text(list(drafted.tokens)),
            tokens=drafted.tokens,
            answered_by=AnsweredBy("device") if drafted.tokens else None,
            paradigm=plan.paradigm,
            why=plan.why,
            bytes_up=len(payload),
            jpeg_bytes=len(to_jpeg(pixels, plan.jpeg_quality)),
            timings_ms=watch.ms,
            # A file's name may hold bytes that are no text.
            picture=frame.name.encode(errors="replace").decode()[-256:],
        )
        if drafted.tokens or not request:
            self.events.publish(seen)  # before the question leaves: no answer may overtake it
        if request:
            self.answers.ask(Question(request, payload, seen, frame.captured + plan.budget_ms / 1e3))
        watch.lap("publish")
        return seen


def age_ms(frame: Frame) -> int:
    """Milliseconds since the frame was captured."""
    return int(1e3 * (time.monotonic() - frame.captured))


def build_request(
    bundle: Bundle,
    request_id: bytes,
    plan: Plan,
    pixels: npt.NDArray[np.uint8],
    symbols: npt.NDArray[np.int8],
    draft: tuple[int, ...],
    age_ms: int = 0,
) -> Request:
    """The envelope of one frame; the same for a real board and for an evaluation."""
    offloads = plan.paradigm == "offload"
    return Request(
        id=request_id,
        bundle=bundle.id,
        paradigm=Paradigm[plan.paradigm.upper()],
        age_ms=age_ms,
        budget_ms=max(0, plan.budget_ms - age_ms),
        content_kind=ContentKind.JPEG if offloads else ContentKind.LATENT,
        content=to_jpeg(pixels, plan.jpeg_quality) if offloads else bitstream.encode(symbols, bundle.tables),
        draft=encode_tokens(draft) if plan.paradigm == "speculative" else b"",
        options=None if plan.tier is None else Options(tier=plan.tier),
    )


def to_jpeg(pixels: npt.NDArray[np.uint8], quality: int) -> bytes:
    """uint8 RGB [H, W, 3] to a JPEG; quality 1..100."""
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok  # an array of this type and shape always encodes
    return data.tobytes()
