"""Requests, replies, events, bitstreams, tables, topics, and the messages of Frigate."""

import json
from pathlib import Path
from zlib import crc32

import numpy as np

from edge_runtime.capture.frigate_events import FrigateEvents
from edge_runtime.capture.frigate_messages import FrigateMessageError, ObjectChange, ReviewChange, read_message
from edge_runtime.wire import (
    EnvelopeError,
    TopicError,
    WireError,
    decode_event,
    decode_reply,
    decode_request,
    encode_event,
    encode_reply,
    encode_request,
    topics,
)
from edge_runtime.wire.bitstream import Inter, Reference, decode, encode
from edge_runtime.wire.tables import Tables
from tests.fuzz.mutations import JSON, MSGPACK
from tests.fuzz.target import Target

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "bitstream.json").read_text())
*TABLES, INTER_TABLES = [Tables.from_bytes(bytes.fromhex(text)) for text in GOLDEN["tables"].values()]
EARLIER = np.frombuffer(bytes.fromhex(GOLDEN["inter_vectors"][0]["reference"]), np.int8).reshape(INTER_TABLES.shape)


def request(data: bytes) -> None:
    """What was read can be sent again, and is the same then."""
    read = decode_request(data)
    assert len(read.draft_ids) <= len(read.draft)
    assert decode_request(encode_request(read)) == read


def reply(data: bytes) -> None:
    read = decode_reply(data)
    assert len(read.token_ids) <= len(read.tokens)
    assert decode_reply(encode_reply(read)) == read


def event(data: bytes) -> None:
    encode_event(decode_event(data))


def bitstream(data: bytes) -> None:
    """The first byte chooses the tables. Symbols that the check vouches for give the same bytes again.

    The first tables have a reference for every message that wants one.
    """
    tables = TABLES[data[0] % len(TABLES)] if data else TABLES[0]
    inter = Inter(INTER_TABLES, lambda _: EARLIER) if tables is TABLES[0] else None
    decoded = decode(data[1:], tables, inter)
    if decoded.checked:
        name = decoded.header.reference
        coder, reference = (tables, None) if name is None else (INTER_TABLES, Reference(name, EARLIER))
        again = encode(decoded.symbols, coder, decoded.header.level, decoded.header.groups, reference)
        assert (decode(again, tables, inter).symbols == decoded.symbols).all()


def tables(data: bytes) -> None:
    """With a right checksum, which no fuzzer would find; then a bitstream of zeros is read with them."""
    read = Tables.from_bytes(data + crc32(data).to_bytes(4, "little"))
    decode(bytes(64), read)


def topic(data: bytes) -> None:
    """A topic that has a board has a reply's topic, and one only."""
    text = data.decode("utf-8", "replace")
    try:
        topics.server_of(text)
    except TopicError:
        assert topics.reply_topic_for(text).endswith(f"/{topics.board_of(text)}/down/reply")


def frigate(data: bytes) -> None:
    """The first byte chooses the kind. Whatever was read, an event of Frigate's ends once."""
    events = FrigateEvents(wait_s=0.0)
    events.snapshot_arrived("person", b"", 0.0)
    if data[:1] == b"r":
        events.review_changed(read_message(data[1:], ReviewChange))
    else:
        events.object_changed(read_message(data[1:], ObjectChange), 0.0)
    taken = events.take(0.0)
    assert events.counts["begun"] == events.open + bool(taken)


TARGETS = {
    "request": Target(request, EnvelopeError, 4096, weight=3, format=MSGPACK),
    "reply": Target(reply, EnvelopeError, 4096, weight=3, format=MSGPACK),
    "event": Target(event, EnvelopeError, 4096, weight=3, format=JSON),
    "bitstream": Target(bitstream, WireError, 512, weight=2),
    "tables": Target(tables, WireError, 4096, weight=2),
    "frigate": Target(frigate, FrigateMessageError, 4096),
    "topic": Target(topic, TopicError, 256, weight=3),
}
