"""Events, which users of a board subscribe to: JSON for people and Home Assistant. Empty fields are left out.

Enumerations are the lower-case names of the envelope's members, since people read them.
"""

from datetime import datetime, timedelta
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from edge_runtime.wire.envelope import MAX_TOKENS, Answers, Hop, Millis, Name, Share, Text, UInt32
from edge_runtime.wire.errors import EnvelopeError

MAX_EVENT = 64 * 1024  # bytes of JSON; a caption takes 1 KB, 1024 tokens and their text some 12 KB

TierName = Literal["device", "edge", "cloud"]
ParadigmName = Literal["device", "split", "speculative", "offload"]
PARADIGMS: tuple[ParadigmName, ...] = get_args(ParadigmName)  # by the envelope's number
Stages = Annotated[dict[Name, Millis], Meta(max_length=32)]


class AnsweredBy(Struct, frozen=True, omit_defaults=True):
    """Who wrote the text."""

    tier: TierName
    server: Name = ""


class EventHop(Struct, frozen=True, omit_defaults=True):
    """A reply's hop in readable form."""

    tier: TierName
    server: Name
    queue_ms: Millis
    compute_ms: Millis
    stages_ms: Stages = {}

    @classmethod
    def from_hop(cls, hop: Hop) -> "EventHop":
        tier: TierName = ("device", "edge", "cloud")[hop.tier]
        return cls(tier, hop.server, hop.queue_ms, hop.compute_ms, hop.stages_ms or {})


class Explain(Struct, frozen=True, omit_defaults=True):
    """Why this paradigm was chosen: by configuration, or what the policy expected when it decided."""

    chosen: ParadigmName
    reason: Annotated[str, Meta(max_length=256)]
    expected_ms: Annotated[dict[ParadigmName, Millis], Meta(max_length=8)] = {}  # until the verified text
    facts: Annotated[dict[Name, float], Meta(max_length=32)] = {}  # measured, unit in the name


class Rate(Struct, frozen=True):
    """At which rate the frame's features were sent."""

    level: Annotated[int, Meta(ge=0, le=7)]  # 0 = coarsest
    groups: Annotated[int, Meta(ge=1, le=4)]  # of the latent's channels
    bytes: UInt32  # of the bitstream


class Reuse(Struct, frozen=True):
    """The answer of an earlier frame stands again: nothing was sent."""

    frame: Annotated[str, Meta(max_length=64)]  # whose answer it is
    distance: Annotated[float, Meta(ge=0)]  # between the symbols of the two frames


class Event(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One piece of news about one frame."""

    # The draft; a server's answer; no answer came; a camera's trigger has become true.
    type: Literal["new", "update", "lost", "trigger"]
    # The same in all events of a frame: the request's id in hex, if there is one.
    frame: Annotated[str, Meta(max_length=64)]
    camera: Name
    captured: Annotated[datetime, Meta(tz=True)]  # UTC
    final: bool = False  # no further event of this frame follows
    text: Text = ""
    tokens: Annotated[tuple[int, ...], Meta(max_length=MAX_TOKENS)] = ()
    answered_by: AnsweredBy | None = None
    label: Name | None = None
    scores: Annotated[dict[Name, Share], Meta(max_length=64)] = {}
    paradigm: ParadigmName | None = None
    why: Annotated[str, Meta(max_length=1024)] = ""  # of the paradigm, or of a loss
    explain: Explain | None = None
    after_ms: Millis = 0.0  # from capture to this event, on the board's own clock
    bytes_up: UInt32 = 0  # whole PUBLISH payloads of this frame, resends included
    jpeg_bytes: UInt32 = 0  # size of the frame as a JPEG, for comparison
    timings_ms: Stages = {}
    hops: Annotated[tuple[EventHop, ...], Meta(max_length=16)] = ()
    accepted: UInt32 = 0
    proposed: UInt32 = 0
    passes: UInt32 = 0  # of the target's decoder
    picture: Annotated[str, Meta(max_length=256)] = ""  # the name of the frame's file, if it comes from a file
    confidence: Share | None = None  # of the text, as whoever wrote it says
    unsure: bool = False  # the confidence is below what is usually right
    answers: Answers = {}  # to taught questions: the probability of each class
    rate: Rate | None = None
    reuse: Reuse | None = None
    trigger: Annotated[str, Meta(max_length=256)] = ""  # the condition that has become true, of type "trigger"


_event = msgspec.json.Decoder(Event)


def encode_event(event: Event) -> bytes:
    """UTF-8 JSON. Raises EnvelopeError for everything that `decode_event` refuses, and if `captured` is not UTC."""
    if event.captured.utcoffset() != timedelta(0):
        raise EnvelopeError(f"captured = {event.captured.isoformat()}, want UTC: use datetime.now(timezone.utc)")
    try:
        data = msgspec.json.encode(event)
    except (OverflowError, UnicodeError) as error:
        raise EnvelopeError(f"an event cannot hold this: {error}") from error
    decode_event(data)
    return data


def decode_event(data: bytes) -> Event:
    """Raises EnvelopeError for anything that is not an event within its bounds; fields it does not know are ignored."""
    if len(data) > MAX_EVENT:
        raise EnvelopeError(f"event of {len(data)} bytes, at most {MAX_EVENT} are read: shorten its text")
    try:
        return _event.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EnvelopeError(f"not an event: {error}") from error
