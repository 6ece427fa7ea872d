"""Every event that a test produces is checked against docs/event.schema.json after the test: see conftest.py.

An event is seen where `encode_event` writes it, and where a test or a benchmark receives it from a child process.
"""

import json
from pathlib import Path

from jsonschema import Draft202012Validator

from edge_runtime.wire import Event, decode_event

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "event.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)
written: list[bytes] = []  # not yet checked; threads append to it


def read(data: bytes) -> Event:
    """Replaces `decode_event`."""
    event = decode_event(data)
    written.append(data)
    return event


def check() -> None:
    """Raises AssertionError if an event since the last call breaks the contract."""
    events, written[:] = written[:], []
    wrong = [f"{error.message}: {data!r}" for data in events for error in VALIDATOR.iter_errors(json.loads(data))]
    assert not wrong, "\n".join(wrong)
