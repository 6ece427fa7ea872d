"""Requests, replies and token ids: what survives the wire, what it costs, and what is refused."""

import tracemalloc
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire import (
    MAX_ENVELOPE,
    CheckedObject,
    ContentKind,
    EnvelopeError,
    Hop,
    Options,
    Paradigm,
    Reply,
    Request,
    RequestIds,
    Status,
    Tier,
    decode_reply,
    decode_request,
    decode_tokens,
    encode_reply,
    encode_request,
    encode_tokens,
)

uint32 = st.integers(0, 2**32 - 1)
bytes8 = st.binary(min_size=8, max_size=8)
share = st.floats(0, 1) | st.none()
millis = st.floats(0, 1e9)
name = st.text(max_size=64)
ids = st.lists(st.integers(0, 2**20 - 1), max_size=1024)
options = st.builds(
    Options,
    tier=st.none() | st.sampled_from(Tier),
    min_confidence=share,
    max_tokens=st.none() | st.integers(1, 1024),
    temperature=st.floats(0, 100),
    top_k=st.none() | st.integers(1, 2**20 - 1),
    top_p=share,
    seed=st.none() | st.integers(0, 2**63 - 1),
    min_tokens=st.integers(0, 1024),
    repetition_penalty=st.floats(1, 10),
    stop=st.lists(st.integers(0, 2**20 - 1), max_size=16).map(tuple),
    propose=st.booleans(),
    prompt=name,
)
requests = st.builds(
    Request,
    version=st.just(1),
    id=bytes8,
    bundle=bytes8,
    paradigm=st.sampled_from(Paradigm),
    age_ms=uint32,
    budget_ms=uint32,
    content_kind=st.sampled_from(ContentKind),
    content=st.binary(max_size=1000),
    draft=ids.map(encode_tokens),
    options=st.none() | options,
)
stages = st.none() | st.dictionaries(name, millis, max_size=3)
replies = st.builds(
    Reply,
    version=st.just(1),
    id=bytes8,
    status=st.sampled_from(Status),
    tokens=ids.map(encode_tokens),
    text=st.text(max_size=200),
    tier=st.sampled_from(Tier),
    server=name,
    accepted=uint32,
    proposed=uint32,
    passes=uint32,
    confidence=share,
    hops=st.lists(st.builds(Hop, st.sampled_from(Tier), name, millis, millis, stages), max_size=3).map(tuple),
    error=st.text(max_size=100),
    retry_after_ms=st.none() | uint32,
    label=st.none() | name,
    scores=st.none() | st.dictionaries(name, st.floats(0, 1), max_size=3),
    checked=st.none() | st.builds(CheckedObject, name, st.booleans()),
)

REQUEST = Request(
    id=b"request1",
    bundle=b"bundle 1",
    paradigm=Paradigm.SPECULATIVE,
    age_ms=12,
    budget_ms=1988,
    content_kind=ContentKind.LATENT,
    content=b"symbols",
    draft=encode_tokens([2, 300, 70000]),
)
REPLY = Reply(id=b"request1", status=Status.OK)


def with_field(envelope: Request | Reply, index: int, value: object) -> bytes:
    """The envelope's array with one element replaced, encoded without any check."""
    array = msgspec.to_builtins(envelope, builtin_types=(bytes,))
    return msgspec.msgpack.encode([*array[:index], value, *array[index + 1 :]])


@given(requests)
def test_a_request_survives_the_wire(request: Request):
    assert decode_request(encode_request(request)) == request


@given(replies)
def test_a_reply_survives_the_wire(reply: Reply):
    assert decode_reply(encode_reply(reply)) == reply


@given(requests)
def test_a_request_costs_at_most_40_bytes_beside_content_draft_and_options(request: Request):
    plain = msgspec.structs.replace(request, options=None)
    assert (
        len(encode_request(plain)) - len(plain.content) - len(plain.draft) <= 41
    )  # a draft over 255 bytes takes one more
    assert len(encode_request(msgspec.structs.replace(plain, draft=b""))) - len(plain.content) <= 40


@given(ids)
def test_token_ids_survive_as_varints(tokens: list[int]):
    data = encode_tokens(tokens)
    assert decode_tokens(data) == tokens
    assert len(data) == sum(1 + (i > 127) + (i > 16383) for i in tokens)


@given(st.binary(max_size=100))
def test_any_bytes_are_token_ids_written_the_only_way_or_refused(data: bytes):
    with suppress(EnvelopeError):
        assert encode_tokens(decode_tokens(data)) == data


@pytest.mark.parametrize("data", ["80", "0580", "8000", "ffff7f", "80808001", "ffffffffffffffff7f", "00" * 1025])
def test_varints_out_of_bounds_are_refused(data: str):
    with pytest.raises(EnvelopeError):
        decode_tokens(bytes.fromhex(data))


@pytest.mark.parametrize("tokens", [[2**20], [-1], [0] * 1025])
def test_token_ids_out_of_bounds_are_refused(tokens: list[int]):
    with pytest.raises(EnvelopeError, match="want at most 1024"):
        encode_tokens(tokens)


def test_ids_for_people_are_lists():
    assert REQUEST.draft_ids == [2, 300, 70000]
    assert Reply(id=b"request1", status=Status.OK, tokens=encode_tokens([5, 6])).token_ids == [5, 6]


@pytest.mark.parametrize(
    ("index", "value", "reason"),
    [
        (1, b"seven b", "length"),
        (1, "8 letter", "bytes"),
        (2, b"nine byte", "length"),
        (3, 4, "enum"),
        (4, -1, ">= 0"),
        (5, 2**32, "<= 4294967295"),
        (5, 1.5, "int"),
        (6, 3, "enum"),
        (7, "text", "bytes"),
        (8, b"\x80", "varint"),
        (8, bytes(3073), "length"),
        (9, {"tier": 7}, "enum"),
        (9, {"min_confidence": float("nan")}, "0.0"),
        (9, {"temperature": float("inf")}, "100"),
        (9, {"temperature": -1}, ">= 0"),
        (9, {"temperature": float("nan")}, "0.0"),
        (9, {"top_k": 0}, ">= 1"),
        (9, {"top_p": 1.5}, "<= 1.0"),
        (9, {"seed": 2**63}, "9223372036854775807"),
        (9, {"min_tokens": 1025}, "<= 1024"),
        (9, {"repetition_penalty": 0.5}, ">= 1"),
        (9, {"stop": [-1]}, ">= 0"),
        (9, {"stop": [4] * 17}, "length"),
    ],
)
def test_a_field_out_of_bounds_is_refused_with_its_reason(index: int, value: object, reason: str):
    with pytest.raises(EnvelopeError, match=reason):
        decode_request(with_field(REQUEST, index, value))


@pytest.mark.parametrize(
    ("index", "value", "reason"),
    [
        (2, 7, "enum"),
        (3, bytes(1025), "at most 1024"),
        (4, "x" * 8193, "length"),
        (4, b"bytes", "str"),
        (10, 1.1, "1.0"),
        (10, float("nan"), "0.0"),
        (11, [[1, "e", 0.0, 0.0]] * 17, "length"),
        (11, [[1, "e", 0.0]], "at least length 4"),
        (11, [[1, "e", float("nan"), 0.0]], "0.0"),
        (15, {"x" * 65: 0.5}, "length"),
    ],
)
def test_a_reply_out_of_bounds_is_refused_with_its_reason(index: int, value: object, reason: str):
    with pytest.raises(EnvelopeError, match=reason):
        decode_reply(with_field(REPLY, index, value))


def test_the_sender_refuses_what_the_receiver_would():
    with pytest.raises(EnvelopeError, match="length"):
        encode_request(msgspec.structs.replace(REQUEST, id=b"short"))
    with pytest.raises(EnvelopeError, match="262"):
        encode_request(msgspec.structs.replace(REQUEST, content=bytes(MAX_ENVELOPE)))
    with pytest.raises(EnvelopeError, match="surrogates"):
        encode_reply(Reply(id=b"request1", status=Status.OK, text="\ud800"))
    with pytest.raises(EnvelopeError, match="cannot hold"):
        encode_request(msgspec.structs.replace(REQUEST, age_ms=2**64))


def test_an_unknown_version_is_refused_by_name_whatever_follows():
    for data in (with_field(REQUEST, 0, 2), msgspec.msgpack.encode([2]), msgspec.msgpack.encode([2, {"all": "new"}])):
        for decode in (decode_request, decode_reply):
            with pytest.raises(EnvelopeError, match="version 2, this side speaks 1"):
                decode(data)


def test_later_fields_and_options_are_ignored():
    array = msgspec.msgpack.decode(encode_request(msgspec.structs.replace(REQUEST, options=Options(max_tokens=7))))
    array[9]["invented later"] = True
    assert decode_request(msgspec.msgpack.encode([*array, "new", [1, 2]])).options == Options(max_tokens=7)


def test_fields_added_with_a_default_may_be_missing():
    array = msgspec.msgpack.decode(encode_reply(REPLY))
    assert decode_reply(msgspec.msgpack.encode(array[:3])) == REPLY


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x9a\x01\xc4\x08", encode_request(REQUEST)[:-3]]))
def test_any_bytes_are_an_envelope_or_an_envelope_error(data: bytes, start: bytes):
    for decode in (decode_request, decode_reply):
        with suppress(EnvelopeError):
            decode(start + data)


def test_every_cut_of_an_envelope_is_refused():
    for data, decode in ((encode_request(REQUEST), decode_request), (encode_reply(REPLY), decode_reply)):
        for size in range(len(data)):
            with pytest.raises(EnvelopeError):
                decode(data[:size])


@pytest.mark.parametrize(
    "tail",
    [b"\x91" * 200_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xa2\xff\xff"],
    ids=["deep nesting", "long array", "long bytes", "long map", "wrong UTF-8"],
)
def test_hostile_counts_and_nesting_are_refused_in_little_memory(tail: bytes):
    for start in (b"", encode_request(REQUEST)[:-1], encode_reply(REPLY)[:-1], encode_reply(REPLY)[:17]):
        tracemalloc.start()
        for decode in (decode_request, decode_reply):
            with pytest.raises(EnvelopeError):
                decode(start + tail)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100_000 + 2 * len(tail)


def test_text_that_is_not_utf_8_is_refused():
    data = encode_reply(msgspec.structs.replace(REPLY, text="text"))
    with pytest.raises(EnvelopeError, match=r"(?i)utf-8"):
        decode_reply(data.replace(b"text", b"te\xff\xfe"))


def test_an_oversized_envelope_is_refused_before_it_is_parsed():
    with pytest.raises(EnvelopeError, match="at most 262144"):
        decode_request(b"\xc1" * (MAX_ENVELOPE + 1))  # 0xc1 is never msgpack, and was not looked at


@given(st.lists(st.tuples(st.integers(0, 2**48 - 2), st.integers(0, 2**16 - 1)), max_size=20))
def test_ids_of_a_board_rise_whatever_its_clock_does(clock: list[tuple[int, int]]):
    ids = RequestIds()
    made = [ids.next(now_ms, salt) for now_ms, salt in clock]
    assert made == sorted(set(made))
    assert {len(i) for i in made} <= {8}


def test_an_id_begins_with_its_time():
    assert RequestIds().next(0x0123456789AB, 0xCDEF).hex() == "0123456789abcdef"
