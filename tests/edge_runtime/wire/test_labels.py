"""The labels in a request: what survives the wire, and what is refused."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire import (
    ContentKind,
    EnvelopeError,
    Paradigm,
    Request,
    decode_labels,
    decode_request,
    encode_labels,
    encode_request,
)
from edge_runtime.wire.labels import MAX_CLASS, MAX_LABELS

PLAIN = Request(
    id=bytes(8),
    bundle=bytes(8),
    paradigm=Paradigm.SPLIT,
    age_ms=0,
    budget_ms=1,
    content_kind=ContentKind.LATENT,
    content=b"",
)
numbers = st.lists(st.integers(0, MAX_CLASS), max_size=MAX_LABELS, unique=True)


@given(numbers, st.data())
def test_labels_survive_to_within_half_a_step(classes, data):
    left, labels = 1.0, []
    for number in classes:
        labels.append((number, data.draw(st.floats(0, left))))
        left -= labels[-1][1]
    read = decode_labels(encode_labels(labels))
    for number, probability in labels:
        assert read.get(number, 0.0) == pytest.approx(probability, abs=0.5 / 255 + 1e-9)
    assert all(read.values())


def test_a_label_takes_three_bytes():
    assert encode_labels([(258, 0.6), (7, 0.2)]) == bytes([1, 2, 153, 0, 7, 51])


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"\0\1",
        b"\0\1\2\3",
        b"\0\1\0",
        b"\0\1\7\0\1\7",
        b"\0\1\xff\0\2\xff",
        b"".join(bytes([0, i, 1]) for i in range(6)),
    ],
)
def test_what_is_no_list_of_labels_is_refused_alone_and_in_a_request(data):
    with pytest.raises(EnvelopeError, match="labels"):
        decode_labels(data)
    with pytest.raises(EnvelopeError):
        encode_request(msgspec.structs.replace(PLAIN, labels=data))


@given(st.binary(max_size=20))
def test_any_bytes_are_read_or_refused_by_name(data):
    try:
        labels = decode_labels(data)
    except EnvelopeError:
        return
    assert encode_labels(labels.items()) == data


def test_a_request_without_labels_has_none():
    data = encode_request(PLAIN)
    older = data[:1].replace(b"\x9b", b"\x9a") + data[1:-1]  # of a board that does not know the field
    assert decode_request(older) == decode_request(data)
    assert decode_request(older).seen_labels == {}
