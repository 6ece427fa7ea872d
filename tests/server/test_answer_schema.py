"""The schema of a prompt's answers: a bad one is named at start, and no text takes long to check."""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from edge_runtime.wire import decode_object
from server.answer_schema import MAX_DEPTH, MAX_PARTS, MAX_SCHEMA, MAX_STARTS, AnswerError, AnswerSchema

DOOR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "people": {"type": "integer", "minimum": 0},
        "parcel": {"enum": ["none", "left", "taken"]},
        "animals": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["people", "parcel"],
    "additionalProperties": False,
}
door = AnswerSchema("door", DOOR)


def with_definitions(definitions: dict[str, Any], use: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": use}, "$defs": definitions}


def doubled(levels: int) -> dict[str, Any]:
    """Each definition uses the next one twice: twice as many parts per level."""
    twice = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)}
    return with_definitions({**twice, f"d{levels}": {"type": "string"}}, {"$ref": "#/$defs/d0"})


def inside(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"allOf": [schema]}
    return {"type": "object", "properties": {"a": schema}}


def of_toml(values: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": msgspec.toml.decode(values)}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({}, 'its type must be "object"'),
        ({"type": "string"}, 'its type must be "object"'),
        ({"type": "thing"}, r"is no JSON Schema: .*thing"),
        ({"type": "object", "required": "people"}, "is no JSON Schema"),
        ({"type": "object", "properties": {"a": {"pattern": "(a+)+$"}}}, "'pattern', which is not supported"),
        ({"type": "object", "unevaluatedProperties": False}, "'unevaluatedProperties', which is not supported"),
        ({"type": "object", "$id": "https://example.com/door"}, r"'\$id', which is not supported"),
        ({"type": "object", "properties": {"a": {"$ref": "https://example.com/door"}}}, "refers to 'https"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, "refers to '#'"),
        ({"type": "object", "properties": {"a": {"$dynamicRef": "#a"}}}, r"'\$dynamicRef', which is not supported"),
        (with_definitions({}, {"$ref": "#/$defs/b"}), r"refers to '#/\$defs/b'"),
        (with_definitions({"b": {"items": {"$ref": "#/$defs/b"}}}, {"$ref": "#/$defs/b"}), "is recursive: b -> b"),
        (
            with_definitions({"b": {"not": {"$ref": "#/$defs/c"}}, "c": {"$ref": "#/$defs/b"}}, {"$ref": "#/$defs/b"}),
            "is recursive: b -> c -> b",
        ),
        (with_definitions({"b": {}}, {"$ref": "#/$defs/b", "type": "string"}), r"has type beside a \$ref"),
        (doubled(12), f"more than {MAX_PARTS} parts"),
        (inside(MAX_DEPTH), "inside one another"),
        (inside(400), "inside one another"),
        ({"type": "object", "enum": list(range(5000))}, "more than 4096 values"),
        (of_toml("const = 2020-01-01"), r"\$\.properties\.a\.const = 2020-01-01 is a date, .* want a string"),
        (of_toml("const = 2020-01-01T10:00:00Z"), "is a datetime"),
        (of_toml("enum = [1, 10:00:00]"), r"a\.enum\[1\] = 10:00:00 is a time"),
        (of_toml("maximum = inf"), r"a\.maximum = inf, which JSON does not have: want a finite number"),
        (of_toml("enum = [nan]"), r"a\.enum\[0\] = nan"),
        (of_toml("default = {b = [{c = -inf}]}"), r"a\.default\.b\[0\]\.c = -inf"),
    ],
)
def test_a_schema_that_is_none_or_has_no_bound_is_named(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)schema of the prompt gate: .*{message}"):
        AnswerSchema("gate", schema)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 50_000, "is not JSON"),
        (b"[1]", "is no JSON Schema: want an object"),
        (b" " * (MAX_SCHEMA + 1), f"larger than {MAX_SCHEMA} bytes"),
    ],
)
def test_a_file_without_a_schema_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "door.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        AnswerSchema("door", str(tmp_path / "door.json"))


def test_without_jsonschema_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[json\]'"):
        AnswerSchema("door", DOOR)


def test_a_schema_may_be_in_a_file_and_use_its_own_definitions(tmp_path: Path) -> None:
    schema = with_definitions({"count": {"type": "integer"}}, {"$ref": "#/$defs/count", "description": "how many"})
    (tmp_path / "door.json").write_text(json.dumps(schema))
    read = AnswerSchema("door", str(tmp_path / "door.json"))
    assert read.schema["properties"] == {"a": {"type": "integer", "description": "how many"}}
    assert read.object_in('{"a": 1}') == '{"a": 1}'
    with pytest.raises(AnswerError, match=r"\$\.a: 'x' is not of type 'integer'"):
        read.object_in('{"a": "x"}')


@pytest.mark.parametrize(
    "text",
    [
        '{"people": 1, "parcel": "left"}',
        'Here it is:\n```json\n{"people": 1, "parcel": "left"}\n```\n',
        '<think>one person</think>{"people": 1, "parcel": "left"}',
        'The set {a}: {"people": 1, "parcel": "left"}',
        '<think>So {x} is {"people": ...} then</think>{"people": 1, "parcel": "left"}',
        '<think>First {"people": </think>{"people": 1, "parcel": "left"}',
        '{"people": 2, "parcel": "none"}, no: {"people": 1, "parcel": "left"}',
        '{"people": 1, "parcel": "left"} I hope this {"helps": true} :-}',
        "{" * 100 + '{"a"' * 60 + '{"people": 1, "parcel": "left"}',
    ],
)
def test_what_is_written_around_the_object_is_left_out(text: str) -> None:
    assert door.object_in(text) == '{"people": 1, "parcel": "left"}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("One person.", "no JSON object"),
        ("} {", "no JSON object"),
        ('{"people": 1, "parcel": "le', "no JSON object"),
        ('{"people": 1} {"people": -2}', r"\$\.people: -2 is less"),
        ('{"people": left}', "not JSON"),
        ('{"people": ' + "9" * 5000 + ', "parcel": "left"}', "not JSON|64 bits"),
        ('{"a":' * 1600 + "1" + "}" * 100, "not JSON"),
        ('{"people": 1, "parcel": "left", "animals": ' + "[" * 50 + "]" * 50 + "}", "inside one another"),
        ('{"people": -1, "parcel": "left"}', r"\$\.people: -1 is less than the minimum"),
        ('{"parcel": "left"}', r"\$: 'people' is a required property"),
        ('{"people": 1, "parcel": "left", "cars": 2}', "cars"),
        ('{"people": 1e999, "parcel": "left"}', "not JSON"),
    ],
)
def test_what_is_wrong_is_said_to_the_model(text: str, message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        door.object_in(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"b": 1}, "c": ',
        '{"a": {"b": 1}, "c": }',
        '{"a": "the "big" dog", "b": {"c": 1}}',
        '{"a": {"b": x}, "c": {"d": 1}}',
        "{a: {'b': 1}, c: {\"d\": 1}}",
        '{"note": "cut {} off',
    ],
)
def test_a_part_of_a_broken_object_is_no_answer(text: str) -> None:
    with pytest.raises(AnswerError, match="not JSON"):
        AnswerSchema("any", {"type": "object"}).object_in(text)


def test_no_text_costs_more_than_so_many_checks() -> None:
    read, of_many = [], AnswerSchema("any", {"type": "object", "minProperties": 1})
    check = of_many._objection
    of_many._objection = lambda found: read.append(found) or check(found)
    with pytest.raises(AnswerError):
        of_many.object_in("{}" * 4096)
    assert read == ["{}"] * MAX_STARTS


def test_what_is_said_is_short_however_wrong_the_answer_is() -> None:
    text = json.dumps({f"key{n}": "x" * 50 for n in range(100)})
    with pytest.raises(AnswerError) as found:
        door.object_in(text)
    assert len(str(found.value)) < 700


answers = st.dictionaries(
    st.sampled_from(["people", "parcel", "animals", "cars"]),
    st.none() | st.integers() | st.sampled_from(["none", "left"]) | st.lists(st.text(max_size=5), max_size=5),
).map(json.dumps)


pieces = st.sampled_from(["{", "}", '{"people": 1, "parcel": "left"}', '{"people":', '"', "{a}", " ", "\\", "[", "]"])


@given(
    st.text()
    | answers
    | answers.map(lambda text: f"```\n{text}\n```")
    | st.lists(answers | pieces, max_size=12).map("".join)
)
def test_any_text_is_an_object_that_a_board_can_read_or_a_named_error(text: str) -> None:
    try:
        found = door.object_in(text)
    except AnswerError:
        return
    read = decode_object(found)
    assert read["people"] >= 0
    assert read["parcel"] in ("none", "left", "taken")
    assert found in text
