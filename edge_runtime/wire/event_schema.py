"""docs/event.schema.json, from the types in event.py: `python -m edge_runtime.wire.event_schema` prints it."""

import sys
from typing import Any

import msgspec

from edge_runtime.wire.event import MAX_EVENT, VERSION, Event


def event_schema() -> bytes:
    """JSON Schema (draft 2020-12) of what `encode_event` writes, as indented JSON."""
    _, structs = msgspec.json.schema_components([Event], ref_template="#/$defs/{name}")
    event = structs.pop("Event")
    for field in (each for struct in (event, *structs.values()) for each in struct["properties"].values()):
        if "anyOf" in field:  # with null, which is never written
            field.update(next(kind for kind in field.pop("anyOf") if kind != {"type": "null"}))
            del field["default"]
        if "pattern" in field:
            field["pattern"] = field["pattern"].replace(r"\Z", "$")  # which is the end of a text there, as \Z is here
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:aiflow-edge:event:{VERSION}",
        **event,
        "title": "Event of an aiflow-edge board",
        "description": f"{event['description']} A JSON object of at most {MAX_EVENT:,} bytes. A field that is left out "
        "has its default, or is unknown if it has none. Later releases may add fields: ignore those you do not know.",
        "required": ["version", *event["required"]],
        "additionalProperties": True,
        "$defs": structs,
    }
    return msgspec.json.format(msgspec.json.encode(_with_sorted_enums(schema))) + b"\n"


def _with_sorted_enums(schema: Any) -> Any:
    """The same schema. The order in which msgspec writes an enum depends on its version."""
    if isinstance(schema, dict):
        return {key: sorted(each) if key == "enum" else _with_sorted_enums(each) for key, each in schema.items()}
    return [_with_sorted_enums(each) for each in schema] if isinstance(schema, list) else schema


if __name__ == "__main__":
    sys.stdout.buffer.write(event_schema())
