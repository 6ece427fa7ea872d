"""The fields of boards' and servers' statuses that the page shows; docs/protocol.md, section 9."""

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from edge_runtime.errors import AiflowError
from edge_runtime.wire.bounded import decode_bounded
from edge_runtime.wire.envelope import Millis, Name, UInt32

MAX_STATUS = 16 * 1024  # bytes of JSON; a server writes 1 KB
Line = Annotated[str, Meta(max_length=1024)]
Amount = Annotated[float, Meta(ge=0, le=1e12)]
Count = Annotated[int, Meta(ge=0, le=2**53)]  # the largest that a browser reads exactly
State = Literal["online", "offline"]


class MessageError(AiflowError, ValueError):
    """A message that the page does not use."""


class BoardFields(Struct, frozen=True):
    state: State
    version: Name = ""
    bundle: Name = ""
    paradigm: Name = ""
    cameras: Annotated[dict[Name, Name], Meta(max_length=16)] = {}
    problems: Annotated[dict[Name, Line], Meta(max_length=32)] = {}


class TargetFields(Struct, frozen=True):
    name: Line = ""


class QueueFields(Struct, frozen=True):
    waiting: UInt32 = 0
    capacity: UInt32 = 0


class EngineFields(Struct, frozen=True):
    busy_s: Millis = 0.0
    batches: Count = 0


class PriceFields(Struct, frozen=True):
    batch: Millis = 0.0
    one_pass: Millis = msgspec.field(default=0.0, name="pass")


class UsageFields(Struct, frozen=True):
    cost: Amount | None = None
    cost_today: Amount | None = None
    budget_per_day: Amount | None = None
    currency: Annotated[str, Meta(max_length=8)] = ""


class CountsFields(Struct, frozen=True):
    received: Count = 0
    replies: Annotated[dict[Name, Count], Meta(max_length=64)] = {}


class ServerFields(Struct, frozen=True):
    state: State
    server: Name
    version: Name = ""
    tier: Name = ""
    share_proven: bool = False
    accepting: bool = False
    why: Line = ""
    target: TargetFields = TargetFields()
    queue: QueueFields = QueueFields()
    engine: EngineFields = EngineFields()
    price_ms: PriceFields = PriceFields()
    usage: UsageFields | None = None
    counts: CountsFields = CountsFields()


S = TypeVar("S", BoardFields, ServerFields)


def decode_fields(payload: bytes, kind: type[S]) -> S:
    """Raises MessageError for what is not a status within its bounds; fields it does not know are ignored."""
    return decode_bounded(msgspec.json.Decoder(kind), payload, MAX_STATUS, "a status", MessageError)
