"""The JSON Schema (draft 2020-12) of a prompt's answers: checked at start, then answers are checked with it.

Its keywords are a list. What is not on it is refused at start, since the time of a check must have a bound: `pattern`
runs a regular expression on a stranger's text, and `unevaluated...` checks the same parts again and again. `$ref` leads
only to the schema's own `$defs` and is replaced by what it names, so nothing is recursive and nothing is fetched.
Validation is jsonschema's (the extra `json`).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.bounded_file import read_bounded
from edge_runtime.errors import AiflowError, ConfigError
from edge_runtime.packages import require
from edge_runtime.wire import EnvelopeError, decode_object
from edge_runtime.wire.json_object import check_object

MAX_SCHEMA = 64 * 1024  # bytes of its file; it goes along with each picture, so useful ones are far smaller
MAX_VALUES = 4096  # of the schema as it is written
MAX_DEPTH, MAX_PARTS = 32, 512  # of its subschemas, when each `$ref` is replaced
MAX_OBJECTIONS, MAX_OBJECTION = 3, 200  # that are told, and characters of each
MAX_STARTS = 64  # braces of a text from which an object is read

ANNOTATIONS = {"$schema", "$comment", "title", "description", "default", "examples", "format"}
ASSERTIONS = {
    *("type", "enum", "const", "required", "multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("minLength", "maxLength", "minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties"),
}
WITH_ONE = {"items", "additionalProperties", "not"}  # their value is a schema
WITH_LIST = {"allOf", "anyOf", "oneOf", "prefixItems"}  # a list of schemas
WITH_NAMES = {"properties"}  # names to schemas
DEFINITIONS = "$defs"

BEGINNING = re.compile(r'\{\s*["}]')  # of an object: most other braces of a text are none
DECODER = json.JSONDecoder(parse_int=float)  # it finds the ends of objects: an int may have too many digits for Python


class AnswerError(AiflowError, ValueError):
    """A text that is not the object that was asked for. Its message is for the model that wrote the text."""


class AnswerSchema:
    """Any number of threads."""

    def __init__(self, name: str, given: Mapping[str, Any] | str) -> None:
        """name: what answers call it. given: the schema, or the path of a file with it. Raises ConfigError."""
        self.name = name
        try:
            self.schema = _checked(_read(given) if isinstance(given, str) else dict(given))
        except ConfigError as error:
            raise ConfigError(f"schema of the prompt {name}: {error}") from error
        from jsonschema import Draft202012Validator

        self._validator = Draft202012Validator(self.schema)

    def object_in(self, text: str) -> str:
        """The JSON of the object that a model wrote. Raises AnswerError if there is none, or if it does not match.

        What is written around the object is left out: many models put it between fences, or explain it. Of several
        objects, the last one that matches counts, since a model that thinks in words writes its answer last.
        """
        begin, end = text.find("{"), text.rfind("}")
        if not 0 <= begin < end:
            raise AnswerError("there is no JSON object in it")
        wrong = ""
        for found in reversed(_objects(text) or [text[begin : end + 1]]):
            if not (objection := self._objection(found)):
                return found
            wrong = wrong or objection  # to the last one
        raise AnswerError(wrong)

    def _objection(self, found: str) -> str:
        """Why a JSON is no object within the bounds, or does not match; empty: it is one that does."""
        try:
            value = decode_object(found)
        except EnvelopeError as error:
            return str(error)[:MAX_OBJECTION]
        wrong = islice(self._validator.iter_errors(value), MAX_OBJECTIONS)
        return "; ".join(f"{each.json_path}: {each.message}"[:MAX_OBJECTION] for each in wrong)


def _objects(text: str) -> list[str]:
    """The JSON objects in a text that are not a part of something else in braces, in time linear in its length.

    A part of a broken object would match many schemas. It is inside braces that end after it, or before the place where
    the decoder gave up. So that place is where the next object may begin, and no character is decoded twice.
    """
    found = list[str]()
    opened = list[int]()  # for each brace that is open: the number of objects that were found before it
    whole = broken = starts = 0  # ends of the last object and of the last part of one; tries to read one
    for brace in re.finditer("[{}]", text):
        at = brace.start()
        if at < whole:
            continue
        if brace[0] == "}":
            del found[opened.pop() if opened else len(found) :]
            continue
        if at >= broken and starts < MAX_STARTS and BEGINNING.match(text, at):
            starts += 1
            try:
                _, whole = DECODER.raw_decode(text, at)
            except json.JSONDecodeError as error:
                # The place of a string without an end is where it begins. No object can follow in it.
                broken = len(text) if error.msg.startswith("Unterminated string") else error.pos
            except RecursionError:
                broken = len(text)
            else:
                found.append(text[at:whole])
                continue
        opened.append(len(found))
    return found


def _read(path: str) -> Any:
    """The JSON in a file. Raises ConfigError."""
    try:
        return msgspec.json.decode(read_bounded(Path(path), MAX_SCHEMA))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error


def _checked(given: Any) -> dict[str, Any]:
    """The same schema without `$ref`. Raises ConfigError."""
    if not isinstance(given, dict):
        raise ConfigError('is no JSON Schema: want an object such as { type = "object", properties = ... }')
    try:
        check_object(given, 2 * MAX_DEPTH, MAX_VALUES)
    except EnvelopeError as error:
        raise ConfigError(str(error)) from error
    _check_values(given)
    require("jsonschema")
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(given)
    except SchemaError as error:
        raise ConfigError(f"is no JSON Schema: {error.json_path}: {error.message[:MAX_OBJECTION]}") from error
    definitions = given.get(DEFINITIONS, {})
    schema = _Expansion(definitions).of({name: value for name, value in given.items() if name != DEFINITIONS})
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise ConfigError('its type must be "object": events carry an object')
    return schema


def _check_values(value: Any, path: str = "$") -> None:
    """Raises ConfigError for what TOML has and JSON has not: models are sent the schema, and answers compared with it.

    Its depth is within the bounds of `check_object`.
    """
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            _check_values(each, f"{path}.{key}" if isinstance(value, dict) else f"{path}[{key}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path[:MAX_OBJECTION]} = {value}, which JSON does not have: want a finite number")
    elif not (value is None or isinstance(value, str | int | float)):
        raise ConfigError(
            f"{path[:MAX_OBJECTION]} = {value} is a {type(value).__name__}, which JSON does not have: want a string"
        )


class _Expansion:
    """Replaces each `$ref` by what it names, as long as the result is of a bearable size."""

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions, self._parts = definitions, 0

    def of(self, schema: Any, depth: int = 0, inside: Sequence[str] = ()) -> Any:
        """depth: of subschemas around it. inside: the definitions that are being replaced. Raises ConfigError."""
        self._parts += 1
        if depth > MAX_DEPTH or self._parts > MAX_PARTS:
            raise ConfigError(
                f"has more than {MAX_PARTS} parts, or {MAX_DEPTH} inside one another, counted where `$ref` uses them: "
                "want a smaller one"
            )
        if isinstance(schema, bool):
            return schema
        if (reference := schema.get("$ref")) is not None:
            return self._replaced(reference, schema, depth, inside)
        return {keyword: self._value(keyword, value, depth + 1, inside) for keyword, value in schema.items()}

    def _value(self, keyword: str, value: Any, depth: int, inside: Sequence[str]) -> Any:
        if keyword in ANNOTATIONS | ASSERTIONS:
            return value
        if keyword in WITH_ONE:
            return self.of(value, depth, inside)
        if keyword in WITH_LIST:
            return [self.of(each, depth, inside) for each in value]
        if keyword in WITH_NAMES:
            return {name: self.of(each, depth, inside) for name, each in value.items()}
        known = ", ".join(sorted(ASSERTIONS | WITH_ONE | WITH_LIST | WITH_NAMES))
        raise ConfigError(f"has the keyword {keyword[:64]!r}, which is not supported: want some of {known}")

    def _replaced(self, reference: str, schema: Mapping[str, Any], depth: int, inside: Sequence[str]) -> Any:
        beside = {name: value for name, value in schema.items() if name != "$ref"}
        name = reference.removeprefix(f"#/{DEFINITIONS}/")
        if name == reference or name not in self._definitions:
            raise ConfigError(f"refers to {reference[:64]!r}: want #/$defs/NAME with a NAME of its own $defs")
        if name in inside:
            raise ConfigError(f"is recursive: {' -> '.join((*inside, name))}: want one without a circle")
        if not beside.keys() <= ANNOTATIONS:
            raise ConfigError(f"has {', '.join(sorted(beside))} beside a $ref: want them in the definition {name!r}")
        found = self.of(self._definitions[name], depth + 1, (*inside, name))
        return found if isinstance(found, bool) else found | beside
