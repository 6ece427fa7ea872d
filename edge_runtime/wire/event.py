"""Events, which users of a board subscribe to: JSON for people and Home Assistant. Empty fields are left out.

The types, bounds and descriptions here are the contract with these users: event_schema.py writes them as JSON Schema.
Enumerations are the lower-case names of the envelope's members, since people read them.
"""

from datetime import datetime, timedelta
from math import isfinite
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from edge_runtime.wire.bounded import decode_bounded
from edge_runtime.wire.envelope import MAX_TOKEN, MAX_TOKENS, Answers, Hop, Millis, Name, Share, Text, UInt32
from edge_runtime.wire.errors import EnvelopeError
from edge_runtime.wire.json_object import check_object

VERSION: Final = 1
MAX_EVENT = 64 * 1024  # bytes of JSON; a caption takes 1 KB, 1024 tokens and their text some 12 KB

TierName = Literal["device", "edge", "cloud"]
ParadigmName = Literal["device", "split", "speculative", "offload"]
TypeName = Literal["new", "update", "lost", "trigger"]
EVENT_TYPES: tuple[TypeName, ...] = get_args(TypeName)
PARADIGMS: tuple[ParadigmName, ...] = get_args(ParadigmName)  # by the envelope's number
Stages = Annotated[dict[Name, Millis], Meta(max_length=32)]
FrameName = Annotated[str, Meta(max_length=64)]
# It becomes a segment of a path in a URL.
FrigateId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
UTC = {"pattern": r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{1,6})?Z$"}  # most validators do not check `format`


class AnsweredBy(Struct, frozen=True, omit_defaults=True):
    """Who wrote the text."""

    tier: Annotated[TierName, Meta(description="The board, a server near it, or a server in the cloud.")]
    server: Annotated[Name, Meta(description="The server's id. Left out if the board wrote the text.")] = ""


class EventUsage(Struct, frozen=True, omit_defaults=True):
    """Tokens and cost of the answer at somebody else's server, as that server counts them."""

    input_tokens: Annotated[UInt32, Meta(description="Tokens of the prompt and of the picture.")]
    output_tokens: Annotated[UInt32, Meta(description="Tokens that the server's model wrote.")]
    cost: Annotated[
        Annotated[float, Meta(ge=0, le=1e9)] | None,
        Meta(description="Their cost, in the currency. Left out if no prices are configured."),
    ] = None
    currency: Annotated[str, Meta(max_length=8, description="The currency of the cost.")] = ""


class EventHop(Struct, frozen=True, omit_defaults=True):
    """One server's part in the answer."""

    tier: Annotated[TierName, Meta(description="The server's tier.")]
    server: Annotated[Name, Meta(description="The server's id.")]
    queue_ms: Annotated[Millis, Meta(description="Milliseconds that the request waited at this server.")]
    compute_ms: Annotated[Millis, Meta(description="Milliseconds that this server computed.")]
    stages_ms: Annotated[Stages, Meta(description="Parts of compute_ms: stage to milliseconds.")] = {}
    usage: Annotated[
        EventUsage | None, Meta(description="Tokens and cost of the answer, if this server asked somebody else's.")
    ] = None

    @classmethod
    def from_hop(cls, hop: Hop) -> "EventHop":
        tier: TierName = ("device", "edge", "cloud")[hop.tier]
        usage = EventUsage(**msgspec.structs.asdict(hop.usage)) if hop.usage else None
        return cls(tier, hop.server, hop.queue_ms, hop.compute_ms, hop.stages_ms or {}, usage)


class Explain(Struct, frozen=True, omit_defaults=True):
    """Why this paradigm was chosen: by configuration, or what the policy expected when it decided."""

    chosen: Annotated[ParadigmName, Meta(description="The paradigm that was chosen.")]
    reason: Annotated[str, Meta(max_length=256, description="Why, as a sentence for people.")]
    expected_ms: Annotated[
        dict[ParadigmName, Millis],
        Meta(
            max_length=8,
            description="Paradigm to the expected milliseconds until the verified text.",
            extra_json_schema={"propertyNames": {"enum": PARADIGMS}},
        ),
    ] = {}
    facts: Annotated[
        dict[Name, float], Meta(max_length=32, description="The board's measurements. Each name contains the unit.")
    ] = {}


class Rate(Struct, frozen=True):
    """How finely the frame's features were sent."""

    level: Annotated[int, Meta(ge=0, le=7, description="The level of detail: 0 is the coarsest.")]
    groups: Annotated[int, Meta(ge=1, le=4, description="How many groups of the features' channels were sent.")]
    bytes: Annotated[UInt32, Meta(description="Bytes of the features.")]


class Reuse(Struct, frozen=True):
    """The answer of an earlier frame is used again, and nothing was sent."""

    frame: Annotated[FrameName, Meta(description="The `frame` of the earlier frame.")]
    distance: Annotated[float, Meta(ge=0, description="Between the features of the two frames. 0: they are equal.")]


class FrigateEvent(Struct, frozen=True, omit_defaults=True):
    """The event of Frigate, an object that it tracks, that the picture belongs to."""

    event: Annotated[FrigateId, Meta(description="Frigate's id of its event.")]
    label: Annotated[Name, Meta(description="What Frigate has detected, such as person.")]
    review: Annotated[
        FrigateId | None, Meta(description="Frigate's id of the review item that the event is in, if it was known.")
    ] = None
    severity: Annotated[
        Literal["alert", "detection"] | None, Meta(description="Of this review item, when the picture was chosen.")
    ] = None


class Event(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One piece of news about one frame."""

    # By a factory, since omit_defaults leaves out plain defaults. Events of 0.1.0 have no version.
    version: Annotated[
        Literal[1],
        Meta(
            description="The version of this contract. It changes only if a field gets another meaning or is removed."
        ),
    ] = msgspec.field(default_factory=lambda: VERSION)
    type: Annotated[
        TypeName,
        Meta(
            description="new: the board's draft, or an earlier answer that holds. update: a server's answer, or why "
            "there is none yet. lost: no answer came, see `why`. trigger: a camera's condition has become true."
        ),
    ]
    frame: Annotated[
        FrameName, Meta(description="The same in all events of a frame: the id of its request, in hexadecimal.")
    ]
    camera: Annotated[Name, Meta(description="The camera's name in the board's configuration.")]
    captured: Annotated[
        datetime, Meta(tz=True, description="When the frame was captured, in UTC.", extra_json_schema=UTC)
    ]
    final: Annotated[bool, Meta(description="True: no further event of this frame follows.")] = False
    text: Annotated[Text, Meta(description="The caption.")] = ""
    tokens: Annotated[
        tuple[Annotated[int, Meta(ge=0, le=MAX_TOKEN)], ...],
        Meta(max_length=MAX_TOKENS, description="The token ids of the text."),
    ] = ()
    answered_by: Annotated[AnsweredBy | None, Meta(description="Who wrote the text.")] = None
    label: Annotated[
        Name | None, Meta(description="The likeliest class, by the bundle's name for it, if the bundle classifies.")
    ] = None
    scores: Annotated[
        dict[Name, Share], Meta(max_length=64, description="The likeliest classes: label to probability, 0..1.")
    ] = {}
    paradigm: Annotated[
        ParadigmName | None,
        Meta(
            description="device: the board's draft, or an earlier answer, is the answer. split: the features were "
            "sent. speculative: features and draft were sent. offload: the picture was sent."
        ),
    ] = None
    why: Annotated[str, Meta(max_length=1024, description="The reason for the paradigm, or for a loss.")] = ""
    explain: Annotated[Explain | None, Meta(description="Why this paradigm was chosen, with figures.")] = None
    after_ms: Annotated[
        Millis, Meta(description="Milliseconds from the capture to this event, by the board's clock.")
    ] = 0.0
    bytes_up: Annotated[
        UInt32,
        Meta(
            description="Bytes that were sent for this frame: whole MQTT payloads, with those sent again, without "
            "those that never reached the broker."
        ),
    ] = 0
    jpeg_bytes: Annotated[
        UInt32,
        Meta(
            description="Bytes of the frame as a JPEG, to compare; of a camera without file names, of one in eight "
            "frames, for the next seven, too. 0 if the answer came before this was known."
        ),
    ] = 0
    timings_ms: Annotated[Stages, Meta(description="The board's work: stage to milliseconds.")] = {}
    hops: Annotated[
        tuple[EventHop, ...], Meta(max_length=16, description="The servers that worked on the answer.")
    ] = ()
    accepted: Annotated[UInt32, Meta(description="Proposed tokens that the server's text kept.")] = 0
    proposed: Annotated[UInt32, Meta(description="Tokens that were proposed to the server's decoder.")] = 0
    passes: Annotated[UInt32, Meta(description="Passes of the server's decoder.")] = 0
    picture: Annotated[
        str, Meta(max_length=256, description="The name of the frame's file, if it comes from a file.")
    ] = ""
    confidence: Annotated[
        Share | None,
        Meta(
            description="How sure the board or server that wrote the text says it is, 0..1: the geometric mean of the "
            "tokens' probabilities. This is not the probability that the text is right."
        ),
    ] = None
    seed: Annotated[
        str,
        Meta(
            max_length=16,
            description="The text was sampled, with the noise of this seed, in hexadecimal. Left out: it was not.",
        ),
    ] = ""
    unsure: Annotated[bool, Meta(description="True: the confidence is below what is usually right.")] = False
    cut: Annotated[bool, Meta(description="True: the server's text ends because it may have no more tokens.")] = False
    answers: Annotated[
        Answers, Meta(description="Answers to taught questions: question to class to probability, 0..1.")
    ] = {}
    object: Annotated[
        dict[str, Any] | None,
        Meta(description="The text as a JSON object, if the camera's prompt wants one and the text is valid."),
    ] = None
    schema: Annotated[
        Name, Meta(description="The server's name for the schema of the object, if the camera's prompt has one.")
    ] = ""
    valid: Annotated[
        bool | None,
        Meta(description="With a schema. True: the text matches it. False: it does not, and there is no `object`."),
    ] = None
    rate: Annotated[Rate | None, Meta(description="How finely the frame's features were sent.")] = None
    reuse: Annotated[
        Reuse | None, Meta(description="The answer of an earlier frame is used again, and nothing was sent.")
    ] = None
    trigger: Annotated[
        str, Meta(max_length=256, description="The condition that has become true, if the type is trigger.")
    ] = ""
    frigate: Annotated[
        FrigateEvent | None, Meta(description="The event of Frigate, if the camera's pictures come from there.")
    ] = None


_event = msgspec.json.Decoder(Event)


def encode_event(event: Event) -> bytes:
    """UTF-8 JSON. Raises EnvelopeError for everything that `decode_event` refuses, and if `captured` is not UTC."""
    if event.captured.utcoffset() != timedelta(0):
        raise EnvelopeError(f"captured = {event.captured.isoformat()}, want UTC: use datetime.now(timezone.utc)")
    if not isfinite(event.confidence or 0.0):  # it would be written as null, which reads as left out
        raise EnvelopeError(f"confidence = {event.confidence}, want 0 to 1, or None")
    try:
        data = msgspec.json.encode(event)
    except (OverflowError, UnicodeError) as error:
        raise EnvelopeError(f"an event cannot hold this: {error}") from error
    decode_event(data)
    return data


def decode_event(data: bytes) -> Event:
    """Raises EnvelopeError for anything that is not an event within its bounds; fields it does not know are ignored."""
    event = decode_bounded(_event, data, MAX_EVENT, "an event")
    if event.object is not None:
        check_object(event.object)
    return event
