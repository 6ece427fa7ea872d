"""The messages between boards, servers and users, as values and functions of values. See docs/protocol.md.

- `tables`, `entropy`, `bitstream`: a latent's symbols as a few hundred bytes. Import these modules directly: they load
  numpy, which the others do not need
- `envelope`: request and reply, msgpack; `labels`: those in a request
- `json_object`: a text that is an answer as JSON
- `update`: a new bundle for a board
- `bounded`: decodes a message within a bound
- `event`: what users of a board receive, JSON
- `topics`: the MQTT topic of each; used as `topics.request(site, board)`

No I/O, no clock and no model: it imports numpy, msgspec and `edge_runtime.errors`.
"""

from edge_runtime.wire import topics
from edge_runtime.wire.envelope import (
    MAX_ENVELOPE,
    CheckedObject,
    ContentKind,
    Hop,
    Options,
    Paradigm,
    Reply,
    Request,
    RequestIds,
    Status,
    Tier,
    Usage,
    aged,
    decode_reply,
    decode_request,
    decode_tokens,
    encode_reply,
    encode_request,
    encode_tokens,
)
from edge_runtime.wire.errors import (
    BitstreamError,
    EnvelopeError,
    ReferenceLostError,
    TablesError,
    TopicError,
    WireError,
)
from edge_runtime.wire.event import AnsweredBy, Event, EventHop, Explain, decode_event, encode_event
from edge_runtime.wire.json_object import decode_object
from edge_runtime.wire.labels import decode_labels, encode_labels

__all__ = [
    "MAX_ENVELOPE",
    "AnsweredBy",
    "BitstreamError",
    "CheckedObject",
    "ContentKind",
    "EnvelopeError",
    "Event",
    "EventHop",
    "Explain",
    "Hop",
    "Options",
    "Paradigm",
    "ReferenceLostError",
    "Reply",
    "Request",
    "RequestIds",
    "Status",
    "TablesError",
    "Tier",
    "TopicError",
    "Usage",
    "WireError",
    "aged",
    "decode_event",
    "decode_labels",
    "decode_object",
    "decode_reply",
    "decode_request",
    "decode_tokens",
    "encode_event",
    "encode_labels",
    "encode_reply",
    "encode_request",
    "encode_tokens",
    "topics",
]
