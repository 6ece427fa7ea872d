"""The messages of Frigate that a board reads: the fields that it uses, with bounds. Other fields are ignored.

Frigate's documentation, "MQTT", describes them.
"""

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from edge_runtime.errors import AiflowError
from edge_runtime.wire.bounded import decode_bounded
from edge_runtime.wire.envelope import Name
from edge_runtime.wire.event import FrigateId

MAX_MESSAGE = 256 * 1024  # bytes; one has some kilobytes, and more with the path of an object that was long in view
Seconds = Annotated[float, Meta(ge=0, le=1e11)]  # Unix time
Type = Literal["new", "update", "end"]
Message = TypeVar("Message")


class FrigateMessageError(AiflowError, ValueError):
    """A message is not one of Frigate's."""


class TrackedObject(Struct, frozen=True):
    """An object as it is now."""

    id: FrigateId  # of the event
    camera: str
    label: Name
    start_time: Seconds  # when it was first seen
    frame_time: Seconds  # of the frame that the message is about


class ObjectChange(Struct, frozen=True):
    """`frigate/events`."""

    type: Type
    after: TrackedObject


class ReviewData(Struct, frozen=True):
    """What a review item consists of."""

    detections: Annotated[tuple[FrigateId, ...], Meta(max_length=1024)] = ()  # ids of events


class Review(Struct, frozen=True):
    """A review item as it is now."""

    id: FrigateId
    camera: str
    severity: Literal["alert", "detection"]
    data: ReviewData


class ReviewChange(Struct, frozen=True):
    """`frigate/reviews`."""

    type: Type
    after: Review


def read_message(payload: bytes, kind: type[Message]) -> Message:
    """Raises FrigateMessageError."""
    return decode_bounded(
        msgspec.json.Decoder(kind), payload, MAX_MESSAGE, "a message of Frigate's", FrigateMessageError
    )
