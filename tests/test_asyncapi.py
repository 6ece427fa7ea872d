"""docs/asyncapi.yaml describes exactly the topics of the product, with their directions, QoS and payloads."""

import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from jsonschema import Draft7Validator
from paho.mqtt.client import topic_matches_sub
from referencing import Registry
from referencing.jsonschema import DRAFT7

from edge_runtime.wire import Reply, Request, topics
from edge_runtime.wire.envelope import Options
from tests.test_protocol_page import PAGE, rows

ROOT = Path(__file__).parents[1]
DOCUMENT = yaml.safe_load((ROOT / "docs" / "asyncapi.yaml").read_text())
ADDRESSES = {name: channel["address"] for name, channel in DOCUMENT["channels"].items()}
ENVELOPES, REFUSED = (json.loads((ROOT / f"tests/golden/{name}.json").read_text()) for name in ("envelope", "refused"))
SPECS = os.environ.get("AIFLOW_ASYNCAPI_SPECS")


def resolved(reference: str) -> Any:
    """The target of a reference within the document, or to a file beside it. Raises KeyError, FileNotFoundError."""
    if not reference.startswith("#/"):
        return json.loads((ROOT / "docs" / reference).read_text())
    value = DOCUMENT
    for key in reference.removeprefix("#/").split("/"):
        value = value[key]
    return value


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def operations(side: str, action: str) -> dict[str, dict[str, Any]]:
    """Address to QoS and retain, of what a board or server sends or receives."""
    found = {}
    for name, operation in DOCUMENT["operations"].items():
        if name.startswith(side) and operation["action"] == action:
            (trait,) = operation["traits"]
            found[resolved(operation["channel"]["$ref"])["address"]] = resolved(trait["$ref"])["bindings"]["mqtt"]
    return found


def product_topics() -> dict[str, str]:
    """Function of the product to its topic or filter, with ids as parameters of the document."""
    found = {}
    for name, function in inspect.getmembers(topics, inspect.isfunction):
        ids = list(inspect.signature(function).parameters)
        if name.startswith("_") or any(parameter.endswith("_topic") for parameter in ids):
            continue
        named = {"name": "questions"} if name == "server_setting" else {}
        topic = function(**{parameter: f"the-{parameter}" for parameter in ids} | named)
        if "/" in topic:  # not an id
            found[name] = re.sub(r"the-(\w+?)(?=/|_|$)", r"{\1}", topic)
    return found | {"frame of the only camera": "aiflow/{site}/{board}/down/frame"}


def matches(pattern: str, address: str) -> bool:
    pattern = re.sub(r"^\$share/[^/]+/", "", pattern)
    return bool(topic_matches_sub(pattern, address))


def test_each_topic_of_the_product_is_described_and_no_other():
    written = product_topics()
    filters = {topic for topic in written.values() if "+" in topic or "#" in topic}
    assert set(ADDRESSES.values()) == set(written.values()) - filters
    assert all(any(matches(pattern, address) for address in ADDRESSES.values()) for pattern in filters)
    assert filters


@pytest.mark.parametrize("side", ["board", "server"])
def test_each_side_sends_and_receives_what_the_page_gives_it_rights_for(side: str):
    cells = next(cells for cells in rows("rights") if cells[0] == side)
    for action, cell in zip(("send", "receive"), cells[1:], strict=True):
        # A server is also a board: its probes have its id.
        rights = [name.replace("<server>/up", "<board>/up") for name in re.findall("`(.*?)`", cell)]
        rights = [re.sub("<(.*?)>", r"{\1}", name.replace("<server>/down", "<board>/down")) for name in rights]
        described = operations(side, action)
        assert [right for right in rights if not any(matches(right, address) for address in described)] == []
        assert [address for address in described if not any(matches(right, address) for right in rights)] == []


def test_qos_and_retain_are_those_of_the_page():
    table = PAGE.split("| topic | from, to | payload | QoS, retained |")[1].split("\n\n")[0]
    said = {
        re.sub("<(.*?)>", r"{\1}", line.split("`")[1]): line.rstrip("| ").split("|")[-1].strip()
        for line in table.strip().splitlines()[1:]
    }
    assert said.keys() == set(ADDRESSES.values())
    for side in ("board", "server"):
        for action in ("send", "receive"):
            for address, mqtt in operations(side, action).items():
                assert (str(mqtt["qos"]), mqtt["retain"]) == (said[address][0], said[address].endswith("yes")), address


def test_its_references_and_parameters_exist():
    assert [resolved(reference) for reference in references(DOCUMENT)]
    for channel in DOCUMENT["channels"].values():
        assert set(re.findall("{(.*?)}", channel["address"])) == channel["parameters"].keys()
    for operation in DOCUMENT["operations"].values():
        assert operation.keys() <= {"action", "channel", "traits", "reply", "messages"}
        assert operation["channel"]["$ref"].startswith("#/channels/")


def test_its_arrays_have_the_fields_of_the_product():
    for name, kind in (("request", Request), ("reply", Reply)):
        items = DOCUMENT["components"]["schemas"][name]["items"]
        assert [item["title"] for item in items] == list(kind.__struct_fields__)
    assert DOCUMENT["components"]["schemas"]["options"]["properties"].keys() == set(Options.__struct_fields__)


def validator(name: str) -> Draft7Validator:
    registry = Registry().with_resource("urn:document", DRAFT7.create_resource(DOCUMENT))
    return Draft7Validator({"$ref": f"urn:document#/components/schemas/{name}"}, registry=registry)


def as_json(value: Any) -> Any:
    """The content of msgpack, with a character for each byte of a bin."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return [as_json(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("vector", ENVELOPES, ids=lambda v: v["name"])
def test_golden_envelopes_follow_its_schemas(vector: dict[str, Any]):
    validator(vector["name"].split(":")[0]).validate(as_json(msgspec.msgpack.decode(bytes.fromhex(vector["bytes"]))))


def test_what_no_reader_takes_breaks_its_schemas():
    # Not what breaks msgpack, or rules for the bytes of a bin and for their difference from a string.
    names = [
        *("version 2", "no status", "an id of 7 bytes", "status 7", "tier 3", "confidence 1.5", "65 scores", "score 2"),
        *("17 hops", "a hop of three elements", "a hop of 33 stages", "17 answers", "checked without valid"),
        *("final 1, not true", "passes 0.5", "retry_after_ms -1", "a label of 65 characters", "a text that is nil"),
    ]
    payloads = {vector["name"]: bytes.fromhex(vector["bytes"]) for vector in REFUSED["replies"]}
    check = validator("reply").is_valid
    assert [name for name in names if check(as_json(msgspec.msgpack.decode(payloads[name])))] == []


@pytest.mark.skipif(not SPECS, reason="npm install --prefix DIR @asyncapi/specs, and AIFLOW_ASYNCAPI_SPECS=DIR")
def test_the_document_follows_the_schema_of_asyncapi():
    schemas = Path(str(SPECS)) / "node_modules" / "@asyncapi" / "specs" / "schemas"
    schema = json.loads((schemas / "3.0.0.json").read_text())
    assert [error.message for error in Draft7Validator(schema).iter_errors(DOCUMENT)] == []
