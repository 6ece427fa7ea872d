"""Events: readable JSON without empty fields, and named errors for everything else."""

from contextlib import suppress
from datetime import datetime, timedelta, timezone

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire import AnsweredBy, EnvelopeError, Event, EventHop, Hop, Tier, decode_event, encode_event

CAPTURED = datetime(2026, 3, 1, 12, 30, 5, 250000, tzinfo=timezone.utc)
DRAFT = Event(type="new", frame="0123456789abcdef", camera="door", captured=CAPTURED)


def test_empty_fields_are_left_out_but_the_version():
    assert encode_event(DRAFT) == (
        b'{"version":1,"type":"new","frame":"0123456789abcdef","camera":"door",'
        b'"captured":"2026-03-01T12:30:05.250000Z"}'
    )


def test_an_event_without_version_is_read_as_version_1_and_other_versions_are_refused_by_name():
    data = encode_event(DRAFT)
    assert decode_event(data.replace(b'"version":1,', b"")) == DRAFT
    with pytest.raises(EnvelopeError, match=r"2 - at `\$.version`"):
        decode_event(data.replace(b'"version":1', b'"version":2'))


def test_a_full_event_survives():
    event = Event(
        type="update",
        final=True,
        frame="0123456789abcdef",
        camera="door",
        captured=CAPTURED,
        text="a dog runs — schnell",
        tokens=(3, 5, 1023),
        answered_by=AnsweredBy("cloud", "c1"),
        label="dog",
        scores={"dog": 0.75},
        paradigm="speculative",
        why="the draft is not sure",
        bytes_up=402,
        jpeg_bytes=23000,
        timings_ms={"head": 12.5},
        hops=(EventHop.from_hop(Hop(Tier.EDGE, "e1", 1.5, 20.0, {"tail": 8.0})),),
        accepted=2,
        proposed=3,
        passes=4,
        picture="dogs/dog.jpg",
    )
    assert decode_event(encode_event(event)) == event
    assert msgspec.json.decode(encode_event(event))["hops"] == [
        {"tier": "edge", "server": "e1", "queue_ms": 1.5, "compute_ms": 20.0, "stages_ms": {"tail": 8.0}}
    ]


@pytest.mark.parametrize("tier", Tier)
def test_tiers_are_words(tier: Tier):
    assert EventHop.from_hop(Hop(tier, "s", 0, 0)).tier == tier.name.lower()


@pytest.mark.parametrize(
    "change",
    [
        {"type": "newer"},
        {"captured": datetime(2026, 3, 1)},
        {"captured": CAPTURED.astimezone(timezone(timedelta(hours=2)))},
        {"scores": {"dog": float("nan")}},
        {"confidence": float("nan")},
        {"tokens": tuple(range(1025))},
        {"tokens": (-1,)},
        {"text": "x" * 8193},
        {"bytes_up": -1},
        {"paradigm": "magic"},
        {"text": "\ud800"},
    ],
)
def test_an_event_out_of_bounds_is_refused_where_it_is_made(change: dict[str, object]):
    with pytest.raises(EnvelopeError):
        encode_event(msgspec.structs.replace(DRAFT, **change))


def test_later_fields_are_ignored():
    assert decode_event(encode_event(DRAFT)[:-1] + b',"invented_later":[1,{}]}') == DRAFT


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_an_event_or_an_error(data: bytes):
    for whole in (data, encode_event(DRAFT)[:-1] + b"," + data):
        with suppress(EnvelopeError):
            decode_event(whole)


@pytest.mark.parametrize("data", [b"[" * 60_000, b'{"x":' * 10_000, encode_event(DRAFT) + b" " * 70_000])
def test_deep_and_long_json_is_refused(data: bytes):
    with pytest.raises(EnvelopeError):
        decode_event(data)
