"""docs/event.schema.json is what boards write, and a test that produces another event fails."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from edge_runtime.wire import EnvelopeError, Event, decode_event, encode_event, topics
from edge_runtime.wire.event_schema import event_schema
from edge_runtime.wire.json_object import MAX_INTEGER
from testbed.processes import read_event
from tests import event_contract
from tests.event_contract import SCHEMA, VALIDATOR
from tests.listener import Listener

ROOT = Path(__file__).parents[1]
EVENT = Event(type="new", frame="0", camera="door", captured=datetime(2026, 3, 1, tzinfo=timezone.utc))
UNVERSIONED = encode_event(EVENT).replace(b'"version":1,', b"")


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Everything that a type allows, within its bounds."""
    return STRATEGIES[type(kind)](kind)


STRATEGIES: dict[type[inspect.Type], Callable[[Any], st.SearchStrategy[Any]]] = {
    inspect.StructType: lambda t: st.builds(t.cls, **{field.name: values(field.type) for field in t.fields}),
    inspect.UnionType: lambda t: st.one_of(map(values, t.types)),
    inspect.DictType: lambda t: st.dictionaries(values(t.key_type), values(t.value_type), max_size=t.max_length),
    inspect.VarTupleType: lambda t: st.lists(values(t.item_type), max_size=t.max_length).map(tuple),
    inspect.LiteralType: lambda t: st.sampled_from(t.values),
    inspect.StrType: lambda t: st.from_regex(t.pattern) if t.pattern else st.text(max_size=t.max_length),
    inspect.IntType: lambda t: st.integers(t.ge, t.le),
    inspect.FloatType: lambda t: st.floats(t.ge, t.le, allow_nan=False, allow_infinity=False),
    inspect.DateTimeType: lambda t: st.datetimes(timezones=st.just(timezone.utc)),
    inspect.BoolType: lambda t: st.booleans(),
    inspect.NoneType: lambda t: st.none(),
    inspect.AnyType: lambda t: (
        st.none()
        | st.booleans()
        | st.integers(-MAX_INTEGER, MAX_INTEGER)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text()
        | st.lists(st.text())
    ),
    inspect.Metadata: lambda t: values(t.type),
}


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """The schemas in a schema that list properties."""
    if isinstance(schema, dict):
        if "properties" in schema:
            yield schema
        for inner in schema.values():
            yield from objects(inner)


def test_the_schema_is_that_of_the_code():
    assert (ROOT / "docs" / "event.schema.json").read_bytes() == event_schema(), "run `make schema`"


def test_the_schema_is_valid_and_describes_each_field():
    VALIDATOR.check_schema(SCHEMA)
    fields = {name: field for schema in objects(SCHEMA) for name, field in schema["properties"].items()}
    assert [name for name, field in fields.items() if not field.get("description")] == []
    assert SCHEMA["properties"].keys() == set(Event.__struct_fields__)


@given(values(inspect.type_info(Event)))
def test_whatever_an_event_holds_follows_the_schema(event: Event):
    VALIDATOR.validate(json.loads(encode_event(event)))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": "1"},
        {"type": "newer"},
        {"frame": None},
        {"camera": "x" * 65},
        {"captured": "2026-03-01T12:30:05"},
        {"captured": "yesterday"},
        {"final": 1},
        {"text": "x" * 8193},
        {"tokens": [0] * 1025},
        {"tokens": [-1]},
        {"tokens": [0.5]},
        {"answered_by": {"server": "s1"}},
        {"answered_by": {"tier": "moon"}},
        {"scores": {"dog": 1.5}},
        {"scores": {"x" * 65: 0.5}},
        {"paradigm": "magic"},
        {"explain": {"chosen": "split", "reason": "", "expected_ms": {"magic": 1}}},
        {"bytes_up": -1},
        {"bytes_up": 1 << 32},
        {"after_ms": "12"},
        {"timings_ms": {str(number): 1 for number in range(33)}},
        {"hops": [{"tier": "edge"}]},
        {"confidence": 1.01},
        {"unsure": "yes"},
        {"answers": {"door": 0.5}},
        {"rate": {"level": 8, "groups": 1, "bytes": 1}},
        {"reuse": {"frame": "0", "distance": -1}},
    ],
    ids=str,
)
def test_what_decode_event_refuses_breaks_the_schema(change: dict[str, object]):
    event = json.loads(encode_event(EVENT)) | change
    with pytest.raises(EnvelopeError):
        decode_event(json.dumps(event).encode())
    assert not VALIDATOR.is_valid(event)


@pytest.mark.parametrize("name", ["type", "frame", "camera", "captured"])
def test_a_field_that_is_always_there_is_required(name: str):
    event = json.loads(encode_event(EVENT))
    del event[name]
    with pytest.raises(EnvelopeError):
        decode_event(json.dumps(event).encode())
    assert not VALIDATOR.is_valid(event)


def test_a_field_of_a_later_release_is_allowed():
    VALIDATOR.validate(json.loads(encode_event(EVENT)) | {"invented_later": [1, {}]})


class Unversioned(Event, frozen=True, omit_defaults=True, kw_only=True):
    """A mistake that the types do not show: a plain default is left out."""

    version: int = 1


def test_an_event_is_checked_where_it_is_written_and_where_it_comes_from_another_process(broker):
    encode_event(Unversioned(**msgspec.structs.asdict(EVENT)))
    with pytest.raises(AssertionError, match="'version' is a required property"):
        event_contract.check()
    read_event(UNVERSIONED)
    with pytest.raises(AssertionError, match="'version' is a required property"):
        event_contract.check()
    with Listener(broker.port, topic := topics.event("home", "b1")) as user:
        user.client.publish(topic, UNVERSIONED)
        user.next()
    with pytest.raises(AssertionError, match="'version' is a required property"):
        event_contract.check()


def test_a_test_fails_if_a_thread_of_it_writes_an_event_that_breaks_the_contract(tmp_path):
    (tmp_path / "test_events.py").write_text(
        "from threading import Thread\n"
        "from tests.test_event_contract import EVENT, Unversioned, encode_event, msgspec\n"
        "def write(event):\n"
        "    thread = Thread(target=encode_event, args=(event,))\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "def test_right(): write(EVENT)\n"
        "def test_wrong(): write(Unversioned(**msgspec.structs.asdict(EVENT)))\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 1
    assert re.search(r"^ERROR .*::test_wrong", result.stdout, re.MULTILINE)
    assert "AssertionError: 'version' is a required property" in result.stdout
    assert "2 passed, 1 error" in result.stdout
