"""The two envelopes, request and reply, as msgpack arrays: field names are not transmitted.

The order of the fields is part of the protocol (docs/protocol.md, sections 3 and 4). New fields go at the end, with a
default, and a reader ignores fields it does not know. This file knows nothing about MQTT, clocks and the content.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from edge_runtime.wire.bounded import decode_bounded
from edge_runtime.wire.errors import EnvelopeError
from edge_runtime.wire.labels import LABEL_BYTES, MAX_LABELS, decode_labels

VERSION = 1
MAX_ENVELOPE = 256 * 1024  # bytes; enough for a full-size JPEG; checked before anything is parsed
MAX_TOKENS = 1024  # ids in one draft or reply; captions have tens
MAX_QUESTIONS = 16  # taught questions that one request may ask
MAX_VIA = 4  # servers that a request may pass on its way up
MAX_TOKEN = (1 << 20) - 1  # largest id: three varint bytes, twice the largest vocabularies in use
MAX_STOP = 16  # tokens that may end a text besides the end token
MAX_SEED = (1 << 63) - 1  # as a signed 64-bit integer, the largest that TOML and msgspec know


class Paradigm(IntEnum):
    """Which part of the work for a frame is done where."""

    DEVICE = 0
    SPLIT = 1
    SPECULATIVE = 2
    OFFLOAD = 3


class ContentKind(IntEnum):
    """The format of the content bytes."""

    LATENT = 0  # a bitstream
    JPEG = 1
    WEBP = 2


class Status(IntEnum):
    """How a request ended."""

    OK = 0
    STALE = 1  # its time budget was used up before it could be served
    BUSY = 2  # ask again after retry_after_ms
    UNKNOWN_BUNDLE = 3
    BAD_REQUEST = 4
    FAILED = 5
    REFERENCE_LOST = 6  # send the whole frame: the one that it was coded against is not here


class Tier(IntEnum):
    """A station on a request's path."""

    DEVICE = 0
    EDGE = 1
    CLOUD = 2


Bytes8 = Annotated[bytes, Meta(min_length=8, max_length=8)]
Varints = Annotated[bytes, Meta(max_length=3 * MAX_TOKENS)]
MAX_UINT32 = 0xFFFFFFFF
UInt32 = Annotated[int, Meta(ge=0, le=MAX_UINT32)]
Share = Annotated[float, Meta(ge=0, le=1)]
Millis = Annotated[float, Meta(ge=0, le=1e9)]
Name = Annotated[str, Meta(max_length=64)]
MAX_TEXT = 8192  # characters; twice what 1024 tokens usually spell
Text = Annotated[str, Meta(max_length=MAX_TEXT)]


# To taught questions: the probability of each class.
Answers = Annotated[dict[Name, Annotated[dict[Name, Share], Meta(max_length=64)]], Meta(max_length=MAX_QUESTIONS)]


class Options(Struct, frozen=True, omit_defaults=True):
    """A request's optional wishes. A map, since it is usually absent and otherwise has few entries."""

    tier: Tier | None = None  # this tier or a higher one shall answer
    min_confidence: Share | None = None  # an answer with less confidence is passed up a tier
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None  # longest text
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None  # of the noise; None: the request's id, see seed_of
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0  # divides the logits; below 0.001: greedy
    top_k: Annotated[int, Meta(ge=1, le=MAX_TOKEN)] | None = None  # sample from so many likeliest tokens only
    top_p: Share | None = None  # sample from the fewest likeliest tokens that have this probability together
    via: Annotated[tuple[Name, ...], Meta(max_length=MAX_VIA)] = ()  # servers that passed the request up, in order
    propose: bool = False  # the server may draft by itself if there is no draft: the same text, sooner
    questions: Annotated[tuple[Name, ...], Meta(max_length=MAX_QUESTIONS)] = ()  # taught ones, by name
    prompt: Name = ""  # what to ask of the picture, by the server's name for it; empty: the server's usual prompt
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = 0  # no end before so many
    repetition_penalty: Annotated[float, Meta(ge=1, le=10)] = 1.0  # divides positive logits of tokens that are written
    # Tokens that end the text, besides the end token.
    stop: Annotated[tuple[Annotated[int, Meta(ge=0, le=MAX_TOKEN)], ...], Meta(max_length=MAX_STOP)] = ()
    camera: Name = ""  # that took the picture; empty: the board has one camera

    @property
    def is_sampled(self) -> bool:
        """Whether noise decides. Scores that were divided by less could be infinite."""
        return self.temperature >= 0.001

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always chosen, without any change of the logits and with one end token."""
        return not (self.is_sampled or self.min_tokens or self.stop) and self.repetition_penalty == 1.0


GREEDY = Options()


def seed_of(options: Options | None, request_id: bytes) -> int:
    """The seed of a request's noise: its own, or else its id without the highest bit."""
    if options and options.seed is not None:
        return options.seed
    return int.from_bytes(request_id, "big") & MAX_SEED


class Request(Struct, array_like=True, frozen=True, kw_only=True):
    """From a board to a server, or to the tier above. At most 40 bytes besides content, draft, options and labels."""

    version: int = VERSION
    id: Bytes8  # unique per board, increases with time; a resend has the same id
    bundle: Bytes8  # first 8 bytes of the SHA-256 of the bundle's manifest
    paradigm: Paradigm
    age_ms: UInt32  # since the frame was captured
    budget_ms: UInt32  # left for the answer when this was sent
    content_kind: ContentKind
    content: bytes
    draft: Varints = b""  # token ids, see draft_ids
    options: Options | None = None
    labels: Annotated[bytes, Meta(max_length=LABEL_BYTES * MAX_LABELS)] | None = None  # that the board has seen

    @property
    def draft_ids(self) -> list[int]:
        """Token ids proposed by the board or a lower tier."""
        return decode_tokens(self.draft)

    @property
    def seen_labels(self) -> dict[int, float]:
        """Class to probability of the labels that the board has seen."""
        return decode_labels(self.labels or b"")


def aged(request: Request, waited_s: float, left_s: float) -> Request:
    """The request as it is sent waited_s seconds later, with left_s seconds left for its reply."""
    age_ms = min(request.age_ms + int(1e3 * waited_s), MAX_UINT32)  # a board may claim any age
    return msgspec.structs.replace(request, age_ms=age_ms, budget_ms=max(0, int(1e3 * left_s)))


class Usage(Struct, array_like=True, frozen=True):
    """What an answer used at somebody else's server, as that server says."""

    input_tokens: UInt32
    output_tokens: UInt32
    cost: Annotated[float, Meta(ge=0, le=1e9)] | None = None  # in the currency; none: its operator has set no prices
    currency: Annotated[str, Meta(max_length=8)] = ""


class Hop(Struct, array_like=True, frozen=True):
    """One station's record in a reply."""

    tier: Tier
    server: Name
    queue_ms: Millis
    compute_ms: Millis
    stages_ms: Annotated[dict[Name, Millis], Meta(max_length=32)] | None = None  # parts of compute_ms, by name
    usage: Usage | None = None  # if the station asked somebody else's server


class CheckedObject(Struct, array_like=True, frozen=True):
    """The prompt wanted a JSON object: whether the text is one."""

    schema: Name  # the server's name for the schema that it was checked with
    valid: bool  # True: the text is an object within the bounds of json_object.py, and matches


class Reply(Struct, array_like=True, frozen=True, kw_only=True):
    """From a server to a board, one per request."""

    version: int = VERSION
    id: Bytes8  # the request's
    status: Status
    tokens: Varints = b""  # of the text, see token_ids
    text: Text = ""
    tier: Tier = Tier.EDGE  # who answered, together with `server`
    server: Name = ""
    accepted: UInt32 = 0  # number of proposed tokens that the answering tier kept
    proposed: UInt32 = 0
    passes: UInt32 = 0  # forward passes of the target
    confidence: Share | None = None
    hops: Annotated[tuple[Hop, ...], Meta(max_length=16)] = ()
    error: Annotated[str, Meta(max_length=1024)] = ""  # for people; empty when status is ok
    retry_after_ms: UInt32 | None = None  # with busy
    label: Name | None = None  # of a bundle that classifies
    scores: Annotated[dict[Name, Share], Meta(max_length=64)] | None = None  # of the likeliest labels
    final: bool = True  # false: a higher tier was asked, and one more reply with this id follows
    answers: Answers | None = None  # to the questions that were asked
    unsure: bool = False  # the confidence is below what is usually right
    is_reference: bool = False  # the first server of the hops keeps the symbols: later frames may be coded against them
    checked: CheckedObject | None = None  # None: the prompt wanted no JSON object
    is_cut: bool = False  # the text ends because it may have no more tokens

    @property
    def token_ids(self) -> list[int]:
        return decode_tokens(self.tokens)


class _Versioned(Struct, array_like=True):
    version: int


Envelope = TypeVar("Envelope", Request, Reply)
_version = msgspec.msgpack.Decoder(_Versioned)
_request = msgspec.msgpack.Decoder(Request)
_reply = msgspec.msgpack.Decoder(Reply)


def encode_request(request: Request) -> bytes:
    """Raises EnvelopeError for everything that `decode_request` refuses, so that the sender finds its own mistakes."""
    return _encode(request, decode_request)


def decode_request(data: bytes) -> Request:
    """Raises EnvelopeError for anything that is not a request of this version within its bounds."""
    request = _decode(data, _request)
    decode_tokens(request.draft)
    decode_labels(request.labels or b"")
    return request


def encode_reply(reply: Reply) -> bytes:
    """Raises EnvelopeError for everything that `decode_reply` refuses."""
    return _encode(reply, decode_reply)


def decode_reply(data: bytes) -> Reply:
    """Raises EnvelopeError for anything that is not a reply of this version within its bounds."""
    reply = _decode(data, _reply)
    decode_tokens(reply.tokens)
    return reply


def _encode(envelope: Request | Reply, check: Callable[[bytes], object]) -> bytes:
    try:
        data = msgspec.msgpack.encode(envelope)
    except (OverflowError, UnicodeError) as error:
        raise EnvelopeError(f"an envelope cannot hold this: {error}") from error
    check(data)
    return data


def _decode(data: bytes, decoder: "msgspec.msgpack.Decoder[Envelope]") -> Envelope:
    version = decode_bounded(_version, data, MAX_ENVELOPE, "an envelope").version
    if version != VERSION:
        raise EnvelopeError(f"envelope of version {version}, this side speaks {VERSION}: update the older side")
    return decode_bounded(decoder, data, MAX_ENVELOPE, f"an envelope of version {VERSION}")


def encode_tokens(ids: Sequence[int]) -> bytes:
    """Token ids as LEB128 varints (DWARF 5, section 7.6): 7 bits a byte, lowest first, bit 7 set while more follow.

    Raises EnvelopeError for too many or too large ones.
    """
    if len(ids) > MAX_TOKENS or not all(0 <= i <= MAX_TOKEN for i in ids):
        raise EnvelopeError(f"{len(ids)} token ids up to {max(ids)}, want at most {MAX_TOKENS} from 0 to {MAX_TOKEN}")
    data = bytearray()
    for i in ids:
        last = max(i.bit_length() - 1, 0) // 7
        data += bytes(i >> 7 * k & 127 | (128 if k < last else 0) for k in range(last + 1))
    return bytes(data)


def decode_tokens(data: bytes) -> list[int]:
    """The inverse of `encode_tokens`. Raises EnvelopeError for too many, too large, truncated or overlong ids."""
    ids: list[int] = []
    value = shift = 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if value > MAX_TOKEN or shift > 21 or len(ids) == MAX_TOKENS:
            raise EnvelopeError(f"token ids must be at most {MAX_TOKENS} from 0 to {MAX_TOKEN}: not a list of varints?")
        if byte < 128:
            if byte == 0 and shift > 7:
                raise EnvelopeError("token id with an unnecessary zero byte: write varints in their shortest form")
            ids.append(value)
            value = shift = 0
    if shift:
        raise EnvelopeError("token ids end inside a varint: the list was truncated")
    return ids


class RequestIds:
    """Makes a board's request ids: strictly increasing, whatever the clock does. For one thread."""

    def __init__(self) -> None:
        self._last = 0

    def next(self, now_ms: int, salt: int) -> bytes:
        """8 bytes big-endian: now_ms, Unix time in ms (48 bits), then salt, 16 random bits.

        The salt separates two ids if a board without a battery-backed clock starts twice at the same time. If the
        clock stands still or goes back, the next id is the last one plus one.
        """
        self._last = max(self._last + 1, now_ms << 16 | salt)
        return self._last.to_bytes(8, "big")
