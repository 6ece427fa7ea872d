"""Answers as JSON objects: a text of a model is untrusted, so size, depth and numbers have bounds.

RFC 8259 leaves bounds to each reader. These are the same on server and board: what a server calls valid, a board reads.
"""

from typing import Any

import msgspec

from edge_runtime.wire.errors import EnvelopeError

MAX_OBJECT = 8192  # bytes of JSON, as long as a text may be; an event holds it twice
MAX_DEPTH = 16  # objects and lists inside one another
MAX_VALUES = 1024  # in the whole object, itself and keys not counted
MAX_INTEGER = (1 << 63) - 1  # beyond it most readers of JSON lose digits, or fail


def decode_object(text: str) -> dict[str, Any]:
    """A JSON object within the bounds. Raises EnvelopeError, whose text says what is wrong."""
    data = text.encode(errors="replace")  # half a character becomes "?", which changes nothing but itself
    if len(data) > MAX_OBJECT:
        raise EnvelopeError(f"{len(data)} bytes of JSON, want at most {MAX_OBJECT}")
    try:
        found = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise EnvelopeError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise EnvelopeError(f"a JSON {type(found).__name__}, want an object: {{...}}")
    check_object(found)
    return found


def check_object(found: dict[str, Any], max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES) -> None:
    """Raises EnvelopeError for an object that is deeper, has more values or a larger integer than the bounds allow."""
    count, level = 0, list[Any]([found])
    for _ in range(max_depth):
        below: list[Any] = []
        for each in level:
            below += each.values() if isinstance(each, dict) else each
        count += len(below)
        if count > max_values:
            raise EnvelopeError(f"a JSON object of more than {max_values} values: want fewer")
        if any(isinstance(value, int) and abs(value) > MAX_INTEGER for value in below):
            raise EnvelopeError("an integer of more than 64 bits: want a smaller one, or a string")
        if not (level := [value for value in below if isinstance(value, dict | list)]):
            return
    raise EnvelopeError(f"JSON of more than {max_depth} objects and lists inside one another: want fewer")
