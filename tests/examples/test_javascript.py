"""examples/javascript reads what boards and servers write, and refuses everything else by name."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.wire import EnvelopeError, Reply, decode_reply
from tests.examples.replies import REPLIES, changed_replies

EVENTS, REFUSED = (
    json.loads((Path(__file__).parents[1] / f"golden/{name}.json").read_text()) for name in ("event", "refused")
)
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(not NODE, reason="Node is not installed: apt install --no-install-recommends nodejs")


def read(kind: str, payloads: list[bytes]) -> list[Any]:
    """The values that the example reads in them, or {"refused": why}; kind: reply or event."""
    command = [str(NODE), str(Path(__file__).with_name("read.mjs"))]
    asked = json.dumps([(kind, payload.hex()) for payload in payloads])
    result = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout))


def as_read(reply: Reply) -> dict[str, Any]:
    """The object that the example makes of it."""

    def usage(hop: Any) -> Any:
        names = {"inputTokens": "input_tokens", "outputTokens": "output_tokens", "cost": "cost", "currency": "currency"}
        return hop.usage and {name: getattr(hop.usage, field) for name, field in names.items()}

    hops = [
        {
            "tier": hop.tier.name.lower(),
            "server": hop.server,
            "queueMs": hop.queue_ms,
            "computeMs": hop.compute_ms,
            "stagesMs": hop.stages_ms,
            "usage": usage(hop),
        }
        for hop in reply.hops
    ]
    same = ("version", "text", "server", "accepted", "proposed", "passes", "confidence", "error", "label", "scores")
    return {name: getattr(reply, name) for name in (*same, "final", "answers", "unsure")} | {
        "id": reply.id.hex(),
        "status": reply.status.name.lower().replace("_", " "),
        "tokens": reply.token_ids,
        "tier": reply.tier.name.lower(),
        "hops": hops,
        "retryAfterMs": reply.retry_after_ms,
        "isReference": reply.is_reference,
        "isCut": reply.is_cut,
        "checked": reply.checked and {"schema": reply.checked.schema, "valid": reply.checked.valid},
    }


def test_it_reads_the_golden_replies_as_the_product_does():
    assert read("reply", REPLIES) == [as_read(decode_reply(data)) for data in REPLIES]


def test_it_reads_the_golden_events():
    events = [json.loads(vector["json"]) for vector in EVENTS]
    defaults = {"final": False, "text": ""}
    assert read("event", [vector["json"].encode() for vector in EVENTS]) == [defaults | event for event in events]


@pytest.mark.parametrize("kind", ["reply", "event"])
def test_it_refuses_what_breaks_the_protocol(kind: str):
    payloads = {
        vector["name"]: bytes.fromhex(vector["bytes"]) if kind == "reply" else vector["json"].encode()
        for vector in REFUSED["replies" if kind == "reply" else "events"]
    }
    results = dict(zip(payloads, read(kind, list(payloads.values())), strict=True))
    assert [name for name, result in results.items() if list(result) != ["refused"]] == []


def test_it_agrees_with_the_product_about_changed_replies():
    changed, good = changed_replies(), 0
    for data, result in zip(changed, read("reply", changed), strict=True):
        try:
            wanted: Any = as_read(decode_reply(data))
            good += 1
        except EnvelopeError as error:
            wanted = str(error)
        if isinstance(wanted, str):
            # JavaScript has one kind of number: it takes 1.0 for 1.
            assert "refused" in result or "got `float`" in wanted, (data.hex(), wanted)
        else:
            assert result == wanted, data.hex()
    assert 100 < good < len(changed) - 100
