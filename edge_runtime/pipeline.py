"""The path of a frame, top to bottom: read this file first.

frame -> plan -> input -> head -> symbols -> draft -> bits -> request -> event "new". Nothing here waits for the
network: what comes back, or does not, is the business of answers.py, which ends every request in one more event. What
the plan is, and why, is the business of planner.py.
"""

import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Protocol

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.capture import Frame
from edge_runtime.inference.backends import BackendError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.draft import Draft, Drafted
from edge_runtime.inference.head import Head
from edge_runtime.inference.preprocess import to_input
from edge_runtime.reporting.events import Events
from edge_runtime.requests.tracker import Answers, Question
from edge_runtime.wire import (
    ContentKind,
    Options,
    Paradigm,
    Request,
    RequestIds,
    Tables,
    WireError,
    bitstream,
    encode_request,
)
from edge_runtime.wire.envelope import Tier, encode_tokens
from edge_runtime.wire.event import AnsweredBy, Event, Explain, ParadigmName

logger = logging.getLogger(__name__)

NOTHING_DRAFTED = Drafted((), 0.0)
NO_PIXELS = np.empty((0, 0, 3), np.uint8)  # where features travel
NOTHING_SEEN = np.empty((0, 0, 0), np.int8)  # the symbols where the server runs the head


@dataclass(frozen=True, slots=True)
class Plan:
    """How one frame is answered."""

    paradigm: ParadigmName
    why: str  # for people, in every event
    budget_ms: int  # from capture until the draft stands
    tier: Tier | None = None  # wanted for the answer
    jpeg_quality: int = 75  # of offload
    explain: Explain | None = None  # the same for programs, with what a policy expected
    drafts: bool = True  # where the draft is no part of the request: whether there is time for one
    may_stand: bool = False  # a draft that is worth enough needs nobody who verifies it
    keeps: bool = False  # the link is away: the request goes to the outbox at once
    proposes: bool = False  # the server may draft by itself where no draft is sent


class Planner(Protocol):
    """Chooses, and learns from what it cost."""

    def plan(self, camera: str) -> Plan:
        """How the next frame of a camera is answered; before anything is known of the frame."""

    def stands(self, plan: Plan, confidence: float) -> str | None:
        """Why the draft needs nobody to verify it; None: it does."""

    def took(self, plan: Plan, timings_ms: dict[str, float]) -> None:
        """What the stages of a frame took."""


class Fixed:
    """A planner that always has the same plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def plan(self, camera: str) -> Plan:
        return self._plan

    def stands(self, plan: Plan, confidence: float) -> str | None:
        return None

    def took(self, plan: Plan, timings_ms: dict[str, float]) -> None:
        pass


class Stopwatch:
    """Milliseconds per named stage; with a slowdown it sleeps as a slower board would compute."""

    def __init__(self, slowdown: float = 1.0) -> None:
        self.ms: dict[str, float] = {}
        self._slowdown = slowdown
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage, which began where the last one ended."""
        if self._slowdown > 1.0:
            time.sleep((self._slowdown - 1.0) * (time.perf_counter() - self._last))
        now = time.perf_counter()
        self.ms[stage], self._last = round(1e3 * (now - self._last), 3), now


class Pipeline:
    """One board's head, draft and ways out."""

    def __init__(
        self,
        bundle: Bundle,
        head: Head | None,
        draft: Draft | None,
        planner: Planner,
        answers: Answers,
        events: Events,
        slowdown: float = 1.0,
    ) -> None:
        """Without a head every plan must be to offload."""
        self.bundle, self.head, self.draft, self.planner = bundle, head, draft, planner
        self.answers, self.events, self.slowdown = answers, events, slowdown
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
        """One frame: the question on its way, the draft at once. Returns the event that says so.

        The question leaves as soon as it can: the draft, where it is no part of it, is written behind it.
        """
        plan, watch = self.planner.plan(frame.camera), Stopwatch(self.slowdown)
        seen = self._seen(frame, plan)
        pixels = to_input(frame.pixels)
        watch.lap("resize")
        symbols, drafted, why = NOTHING_SEEN, NOTHING_DRAFTED, None
        if plan.paradigm == "offload":
            plan, seen = self._ask(frame, plan, seen, pixels, symbols, watch)
        if self.head and (plan.drafts or plan.paradigm != "offload"):
            symbols = self.head.symbols(pixels)
            watch.lap("head")
        if plan.paradigm == "split":
            plan, seen = self._ask(frame, plan, seen, pixels, symbols, watch)
        if self.draft and (plan.drafts or plan.paradigm == "device"):
            drafted = self.draft.write(symbols)
            watch.lap("draft")
            text, device = self.bundle.text(list(drafted.tokens)), AnsweredBy("device")
            seen = msgspec.structs.replace(seen, text=text, tokens=drafted.tokens, answered_by=device)
            why = self.planner.stands(plan, drafted.confidence)  # asked in any case: the planner learns from it
        if plan.paradigm == "speculative":
            if why and not plan.keeps:
                plan = replace(plan, paradigm="device", why=why)
            else:
                plan, seen = self._ask(frame, plan, seen, pixels, symbols, watch)
        seen = self._as_picture(seen, plan, pixels)
        if plan.paradigm == "device":
            seen = msgspec.structs.replace(seen, final=True, paradigm="device", why=plan.why)
            seen = self._timed(seen, frame, watch)
            self.events.publish(seen)
        else:
            seen = self._timed(seen, frame, watch)
            self.answers.announce(seen, self._compact(frame, plan, seen, symbols))
        watch.lap("publish")
        self.planner.took(plan, watch.ms)
        return seen

    def _seen(self, frame: Frame, plan: Plan) -> Event:
        """What is known of a frame before anybody looked at it."""
        return Event(
            type="new",
            frame=self.ids.next(int(frame.captured_unix * 1e3), secrets.randbits(16)).hex(),
            camera=frame.camera,
            captured=datetime.fromtimestamp(frame.captured_unix, timezone.utc),
            paradigm=plan.paradigm,
            why=plan.why,
            explain=plan.explain,
            # A file's name may hold bytes that are no text.
            picture=frame.name.encode(errors="replace").decode()[-256:],
        )

    def _ask(
        self,
        frame: Frame,
        plan: Plan,
        seen: Event,
        pixels: npt.NDArray[np.uint8],
        symbols: npt.NDArray[np.int8],
        watch: Stopwatch,
    ) -> tuple[Plan, Event]:
        """The frame's request leaves; returned with what is known of the frame then.

        Where the byte budget has no room for it, the plan that is returned is the device's.
        """
        request_id = bytes.fromhex(seen.frame)
        request = build_request(self.bundle, request_id, plan, pixels, symbols, seen.tokens, age_ms(frame))
        payload = encode_request(request)
        watch.lap("encode")
        if plan.paradigm == "offload":
            seen = msgspec.structs.replace(seen, jpeg_bytes=len(request.content))
        elif plan.keeps:  # others' features should be on their way before it is counted what they save
            seen = self._as_picture(seen, plan, pixels)
        if not plan.keeps and not self.answers.affords(len(payload)):
            why = f"{plan.paradigm}: {len(payload)} bytes more do not fit into this minute's budget"
            return replace(plan, paradigm="device", why=why), seen
        seen = self._timed(msgspec.structs.replace(seen, bytes_up=len(payload)), frame, watch)
        deadline = frame.captured + plan.budget_ms / 1e3
        self.answers.ask(Question(request, payload, seen, frame.captured, deadline, plan.keeps))
        return plan, seen

    def _compact(self, frame: Frame, plan: Plan, seen: Event, symbols: npt.NDArray[np.int8]) -> bytes:
        """A picture's request as features, for an outbox: what is kept for hours is small, and shows nobody."""
        if plan.paradigm != "offload" or not self.answers.has_outbox:
            return b""
        plan, request_id = replace(plan, paradigm="speculative"), bytes.fromhex(seen.frame)
        request = build_request(self.bundle, request_id, plan, NO_PIXELS, symbols, seen.tokens, age_ms(frame))
        return encode_request(request)

    def _as_picture(self, seen: Event, plan: Plan, pixels: npt.NDArray[np.uint8]) -> Event:
        """With what the frame would have cost as a picture."""
        if seen.jpeg_bytes:
            return seen
        return msgspec.structs.replace(seen, jpeg_bytes=len(to_jpeg(pixels, plan.jpeg_quality)))

    def _timed(self, seen: Event, frame: Frame, watch: Stopwatch) -> Event:
        """With what it took until now."""
        after_ms = 1e3 * (time.monotonic() - frame.captured)
        return msgspec.structs.replace(seen, timings_ms=dict(watch.ms), after_ms=after_ms)


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
        content=to_jpeg(pixels, plan.jpeg_quality) if offloads else encode_finest(symbols, bundle.tables),
        draft=encode_tokens(draft) if plan.paradigm == "speculative" else b"",
        options=Options(tier=plan.tier, propose=plan.proposes) if plan.proposes or plan.tier is not None else None,
    )


def encode_finest(symbols: npt.NDArray[np.int8], tables: Tables) -> bytes:
    """The bits of symbols at the finest level, as the head gives them."""
    return bitstream.encode(symbols, tables, level=tables.levels - 1)


def to_jpeg(pixels: npt.NDArray[np.uint8], quality: int) -> bytes:
    """uint8 RGB [H, W, 3] to a JPEG; quality 1..100."""
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok  # an array of this type and shape always encodes
    return data.tobytes()
