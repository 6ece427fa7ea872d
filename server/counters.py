"""A server's counters for Prometheus, each with its meaning."""

from collections.abc import Mapping
from typing import Any

from edge_runtime.reporting import Meaning, Values
from edge_runtime.wire import Status

SERVER = {
    "received": Meaning("Requests: received = replies for good + repeated + joined + waiting + asked_above"),
    "replies": Meaning("Last replies to requests, by status", "status"),
    "repeated": Meaning("Requests answered before, told the same again"),
    "joined": Meaning("Requests asked again while they were being answered"),
    "waiting": Meaning("Requests in the queue", is_gauge=True),
    "asked_above": Meaning("Requests that wait for the tier above, their boards have a first reply", is_gauge=True),
    "escalated": Meaning("Requests passed up, by reason", "reason"),
    "answered_above": Meaning("Requests passed up that the tier above answered"),
    "changed": Meaning("Of those, answers that differ from this server's own, by the reason to ask", "reason"),
    "unchanged": Meaning("Of those, answers that do not"),
    "alone": Meaning("Requests that should have gone up, or did in vain, by what stood in the way", "why"),
    "upstream": Meaning(
        "Requests to the tier above, by what became of them, and its replies (reply_*); unknown, late and duplicate "
        "are replies to nothing that was asked, to what had ended, and to what was answered",
        "what",
    ),
    "loop": Meaning("Requests refused since they had passed this server before"),
    "undelivered": Meaning("Replies, first ones included, that the broker did not take: their boards ask again"),
    "foreign_topics": Meaning("Messages on topics that are no board's request topic"),
    "retained_requests": Meaning("Requests that the broker had kept from an earlier time, not answered"),
    "probes": Meaning("Probes to this server's own request topic: sent, and missing (not returned in time)", "what"),
    "mqtt": Meaning("Messages to and from the boards' broker, by what became of them; its connections", "what"),
    "mqtt_pending": Meaning("Messages to the boards' broker that wait or are in flight", is_gauge=True),
}
STATUSES = {status.name.lower() for status in Status}


def values(status: Mapping[str, Any]) -> Values:
    """The numbers of `Service.status` and, under "gateway", of `Gateway.summary`, under the names above."""
    counts, gateway = status["counts"], dict(status.get("gateway", {}))
    plain = ("received", "repeated", "joined", "answered_above", "unchanged", "loop")
    values: dict[str, Any] = {name: counts.get(name, 0) for name in plain}
    values |= {"waiting": status["queue"]["waiting"], "asked_above": status["asked_above"]}
    values["replies"] = {name: count for name, count in counts.items() if name in STATUSES}
    values |= {kind: _labelled(counts, kind) for kind in ("escalated", "changed", "alone")}
    if above := status.get("upstream"):
        values["upstream"] = {name: count for name, count in above["requests"].items() if name != "open"}
        values["upstream"] |= {f"reply_{name}": count for name, count in above["replies"].items()}
    if mqtt := _labelled(gateway, "mqtt"):
        values |= {"mqtt_pending": mqtt.pop("pending"), "mqtt": mqtt}
    return values | {name: count for name, count in gateway.items() if not name.startswith("mqtt_")}


def _labelled(counts: Mapping[str, int], kind: str) -> dict[str, int]:
    return {name.removeprefix(f"{kind}_"): count for name, count in counts.items() if name.startswith(f"{kind}_")}
