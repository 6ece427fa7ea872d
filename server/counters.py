"""A server's counters for Prometheus, each with its meaning."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from edge_runtime.metrics import Meaning, Values

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
    "loop": Meaning("Requests refused since they had passed this server before"),
}
STATUSES = ("ok", "stale", "busy", "unknown_bundle", "bad_request", "failed")


def values(status: Mapping[str, Any]) -> Values:
    """The numbers of `Service.status`, under the names above."""
    counts = status["counts"]
    by_label: dict[str, dict[str, float]] = defaultdict(dict)
    for name, count in counts.items():
        kind, _, label = name.partition("_")
        if name in STATUSES:
            by_label["replies"][name] = count
        elif label and SERVER.get(kind, Meaning("")).label:
            by_label[kind][label] = count
    plain = ("received", "repeated", "joined", "answered_above", "unchanged", "loop")
    waiting = {"waiting": status["queue"]["waiting"], "asked_above": status["asked_above"]}
    return {name: counts.get(name, 0) for name in plain} | waiting | by_label
