"""Answers as JSON objects: whatever a model writes is an object within the bounds, or a named error."""

import json
from contextlib import suppress
from datetime import datetime, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire import EnvelopeError, Event, decode_event, decode_object, encode_event
from edge_runtime.wire.json_object import MAX_DEPTH, MAX_INTEGER, MAX_OBJECT, MAX_VALUES, check_object

EVENT = Event(type="update", frame="01", camera="door", captured=datetime(2026, 3, 1, tzinfo=timezone.utc))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=50,
)


def nested(depth: int) -> str:
    """An object of so many objects inside one another."""
    return '{"a":' * depth + "1" + "}" * depth


@given(st.dictionaries(st.text(), values) | values, st.booleans())
def test_any_json_is_an_object_that_an_event_can_hold_or_a_named_error(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    try:
        found = decode_object(text)
    except EnvelopeError:
        return
    assert found == value
    event = Event(**{name: getattr(EVENT, name) for name in ("type", "frame", "camera", "captured")}, object=found)
    assert decode_event(encode_event(event)).object == found


@given(st.text() | st.text(alphabet='{}[]",:\\u1e0.- dtrufalsn'))
def test_any_text_is_an_object_or_a_named_error(text: str) -> None:
    with suppress(EnvelopeError):
        assert isinstance(decode_object(text), dict)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[1]", "a JSON list, want an object"),
        ('"text"', "a JSON str"),
        ('{"a": NaN}', "not JSON"),
        ('{"a": 1e999}', "not JSON"),
        ('{"a": "\ud800"}', None),  # half a character is replaced
        ('{"a": "\\ud800"}', "not JSON"),
        (nested(MAX_DEPTH), None),
        (nested(MAX_DEPTH + 1), f"more than {MAX_DEPTH} objects and lists"),
        (nested(1300), "JSON"),  # about as deep as its bytes allow
        (json.dumps({"a": [1] * (MAX_VALUES - 1)}), None),
        (json.dumps({"a": [1] * MAX_VALUES}), f"more than {MAX_VALUES} values"),
        (json.dumps({"a": "é" * (MAX_OBJECT // 2)}, ensure_ascii=False), f"at most {MAX_OBJECT}"),
        (json.dumps({"a": [-MAX_INTEGER, MAX_INTEGER]}), None),
        (json.dumps({"a": [MAX_INTEGER + 1]}), "more than 64 bits"),
    ],
)
def test_each_bound_holds(text: str, message: str | None) -> None:
    if message is None:
        decode_object(text)
        return
    with pytest.raises(EnvelopeError, match=message):
        decode_object(text)


def test_an_event_refuses_an_object_beyond_the_bounds() -> None:
    deep = json.loads(nested(MAX_DEPTH + 1))
    with pytest.raises(EnvelopeError, match="inside one another"):
        encode_event(Event(type="new", frame="1", camera="c", captured=EVENT.captured, object=deep))
    check_object(deep, max_depth=MAX_DEPTH + 1)


def test_the_largest_object_and_its_text_fit_an_event() -> None:
    """The text has a backslash before each quote, and again in the event."""
    text = json.dumps({"a": '"' * (MAX_OBJECT // 2 - 10)})
    event = Event(type="update", frame="1", camera="c", captured=EVENT.captured, text=text, object=decode_object(text))
    assert decode_event(encode_event(event)) == event
