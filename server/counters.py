"""A server's counters for Prometheus, each with its meaning."""

from collections.abc import Mapping
from typing import Any

from edge_runtime.reporting import Meaning, Values

SERVER = {
    "received": Meaning(
        "Requests: received = replies for good + repeated + joined + waiting + being answered + asked_above"
    ),
    "replies": Meaning("Last replies to requests, by status", "status"),
    "repeated": Meaning("Requests answered before, told the same again"),
    "joined": Meaning("Requests asked again while they were being answered"),
    "waiting": Meaning("Requests in the queues of pictures and of the engine", is_gauge=True),
    "queue_capacity": Meaning("Requests that each of these queues holds", is_gauge=True),
    "accepting": Meaning("1 while the server takes requests, 0 while it has left the share", is_gauge=True),
    "share_proven": Meaning("1 while its probes come back, so that requests reach a server", is_gauge=True),
    "batch_seconds": Meaning("Seconds that batches took which were answered", is_summary=True),
    "batched": Meaning("Requests in these batches"),
    "decoding": Meaning(
        "Tokens and passes of the target's decoder: proposed and accepted (of drafts), tokens (written), passes", "what"
    ),
    "asked_above": Meaning("Requests that wait for the tier above, their boards have a first reply", is_gauge=True),
    "pictures": Meaning(
        "Pictures of offloaded requests: decoded, unreadable, too_costly (more time or memory than one may take), "
        "not_taken (this server takes none)",
        "what",
    ),
    "questions": Meaning(
        "Taught questions in requests: asked, and unknown (this server has none of that name)", "what"
    ),
    "prompts": Meaning(
        "Prompts in requests: asked, and unknown (this server has none of that name); texts of prompts with a schema: "
        "valid, and invalid (after a second try, too)",
        "what",
    ),
    "target_calls": Meaning(
        "Calls to another server as the target, by what became of them: answered, retried (called once more), "
        "cut (answered with a text that max_tokens or the longest reply cut), usage_unknown (answered without sound "
        "token counts), given_up (no more calls for a request, since four may have been billed), repair (called "
        "since the answer does not match its schema), invalid (no text matched it), draft_refused, draft_unread and "
        "features_refused (a request or a probe: it may be probed again), draft_recut (asked again without the draft); "
        "paused, over_budget and too_late (too little time is left) were not made",
        "what",
    ),
    "target_tokens": Meaning(
        "Tokens of those calls, as the other server counts them: input, output, prediction_accepted, "
        "prediction_rejected",
        "what",
    ),
    "target_cost": Meaning("Cost of those calls in the configured currency, estimated if one broke off"),
    "target_cost_today": Meaning("Cost of those calls since the day began (UTC), kept over a restart", is_gauge=True),
    "target_budget_per_day": Meaning("The budget of a day for those calls, if there is one", is_gauge=True),
    "assistant": Meaning(
        "The assistant of a model of transformers: tokens proposed and accepted (of those), its passes, and failed "
        "(texts for which it failed)",
        "what",
    ),
    "setting": Meaning("Messages that set the questions: set, refused (nothing has changed)", "what"),
    "late": Meaning("How often the engine was found to hang: the server leaves its share until it works again"),
    "escalated": Meaning("Requests passed up, by reason", "reason"),
    "answered_above": Meaning("Requests passed up that the tier above answered"),
    "changed": Meaning("Of those, answers that differ from this server's own, by the reason to ask", "reason"),
    "unchanged": Meaning("Of those, answers that do not"),
    "alone": Meaning(
        "Requests that should have gone up, or did in vain, by what stood in the way; asked_too_often: beyond "
        "max_requested_share, board_full: one board has half of open_requests",
        "why",
    ),
    "upstream": Meaning(
        "Requests to the tier above, by what became of them; unknown, late and duplicate are replies to nothing that "
        "was asked, to what had ended, and to what was answered",
        "what",
    ),
    "upstream_replies": Meaning("Replies of the tier above, by what they said", "status"),
    "loop": Meaning("Requests refused since they had passed this server before"),
    "undelivered": Meaning("Replies, first ones included, that the broker did not take: their boards ask again"),
    "foreign_topics": Meaning("Messages on topics that are no board's request topic"),
    "retained_requests": Meaning("Requests that the broker had kept from an earlier time, not answered"),
    "retained_settings": Meaning("Messages to set something that the broker had kept from an earlier time, not read"),
    "probes": Meaning("Probes to this server's own request topic: sent, and missing (not returned in time)", "what"),
    "mqtt": Meaning("Messages to and from the boards' broker, by what became of them; its connections", "what"),
    "mqtt_pending": Meaning("Messages to the boards' broker that wait or are in flight", is_gauge=True),
    "mqtt_connected": Meaning("1 while the boards' broker answers", is_gauge=True),
    "info": Meaning("1 for the version of the program", "version", is_gauge=True),
}
# Counts of events that have not happened yet are exported too: an alert needs a number before the first fault.
NOTHING: dict[str, Any] = {name: {} if meaning.label else 0 for name, meaning in SERVER.items() if meaning.suffix}


def by_label(counts: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    """Counts by (name, label) to counts by name, and those with a label by name and label."""
    nested: dict[str, Any] = {}
    for (name, label), count in sorted(counts.items()):
        if label:
            nested.setdefault(name, {})[label] = count
        else:
            nested[name] = count
    return nested


def values(status: Mapping[str, Any]) -> Values:
    """The numbers of `Service.status` and, under "gateway", of `Gateway.summary`, under the names above."""
    numbers: dict[str, Any] = NOTHING | status["counts"]
    numbers |= {"waiting": status["queue"]["waiting"], "queue_capacity": status["queue"]["capacity"]}
    numbers |= {"asked_above": status["asked_above"], "info": {status["version"]: 1}}
    numbers["batch_seconds"] = {"count": status["engine"]["batches"], "sum": status["engine"]["compute_s"]}
    numbers |= status.get("gateway", {})
    if usage := status.get("usage"):
        numbers |= {"target_calls": usage["calls"], "target_tokens": usage["tokens"], "target_cost": usage["cost"]}
        numbers["target_cost_today"] = usage["cost_today"]
        if usage["budget_per_day"]:
            numbers["target_budget_per_day"] = usage["budget_per_day"]
    if assistant := status.get("assistant"):
        numbers["assistant"] = {name: count for name, count in assistant.items() if name != "model"}
    if above := status.get("upstream"):
        numbers["upstream"] = {name: count for name, count in above["requests"].items() if name != "open"}
        numbers["upstream_replies"] = above["replies"]
    return numbers
