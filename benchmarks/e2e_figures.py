"""Computes the figures of the case study from a board's events. No process, clock or file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

import numpy as np

from benchmarks.quality import mean
from edge_runtime.wire import Event

BASELINE = "offload"
NOT_FIXED = ("device", "policy", "escalate")  # one has no verified text, one chooses, one has other servers


@dataclass(frozen=True, slots=True)
class PhotoOutcome:
    photo: str
    at_s: float  # when it was shown, since the first photo that counts
    text: str = ""  # the last text; after a loss, the draft
    paradigm: str = ""  # of the last event
    answered_by: str = ""  # tier; empty: lost
    first_ms: float | None = None  # from capture to the first event with a text
    final_ms: float | None = None  # from capture to the final answer; None: lost
    server_ms: float = 0.0  # computation on all servers
    bytes_up: int = 0  # payloads of all requests of the frame
    was_passed_up: bool = False  # a server answered and asked the tier above


def outcome_of(photo: str, at_s: float, events: Sequence[Event]) -> PhotoOutcome:
    """From all events of one frame, in order. Without a final event the photo is lost."""
    if not events:
        return PhotoOutcome(photo, at_s)
    last = events[-1]
    is_answered = last.final and last.type != "lost"
    return PhotoOutcome(
        photo,
        at_s,
        text=last.text,
        paradigm=last.paradigm or "",
        answered_by=last.answered_by.tier if is_answered and last.answered_by else "",
        first_ms=next((event.after_ms for event in events if event.text), None),
        final_ms=last.after_ms if is_answered else None,
        server_ms=sum(hop.compute_ms for hop in last.hops),
        bytes_up=last.bytes_up,
        was_passed_up=any(event.type == "update" and not event.final for event in events),
    )


def figures_of(name: str, outcomes: Sequence[PhotoOutcome], lost_ms: float) -> dict[str, Any]:
    """The figures of one paradigm. Times in ms; None if there is nothing to count.

    A lost photo counts with the time lost_ms; otherwise a paradigm that loses slow photos would look fast. A draft that
    the policy accepts counts as verified when it was written, since no better text follows; `served` leaves those out.
    With the paradigm `device`, drafts are never verified.
    """
    answered = [outcome for outcome in outcomes if outcome.final_ms is not None]
    lost = [lost_ms] * (len(outcomes) - len(answered))
    verified = [o.final_ms for o in answered if o.final_ms is not None] if name != "device" else []
    served = [o.final_ms for o in answered if o.final_ms is not None and o.answered_by != "device"]
    first = [o.first_ms for o in outcomes if o.first_ms is not None]
    textless = [lost_ms for o in outcomes if o.first_ms is None and o.final_ms is None]
    return {
        "bytes_mean": mean([outcome.bytes_up for outcome in outcomes]),
        "first_text_ms_p50": _percentile(first, textless, 50),
        "verified_ms_p50": _percentile(verified, lost, 50),
        "verified_ms_p95": _percentile(verified, lost, 95),
        "served_ms_p50": _percentile(served, lost, 50),
        "server_ms_mean": mean([outcome.server_ms for outcome in answered]),
        "answered": len(answered),
        "lost": len(lost),
        "chosen": _shares([outcome.paradigm for outcome in answered]),
        "answered_by": _shares([outcome.answered_by for outcome in answered]),
    }


def compared(
    ciders: Mapping[str, float | None], outcomes: Mapping[str, Sequence[PhotoOutcome]], lost_ms: float
) -> dict[str, dict[str, Any]]:
    """The figures of all paradigms, with their ratios to the baseline, which must be one of them."""
    paradigms = {name: {"cider": ciders[name]} | figures_of(name, seen, lost_ms) for name, seen in outcomes.items()}
    baseline = paradigms[BASELINE]
    for figures in paradigms.values():
        figures["cider_ratio"] = ratio(figures["cider"], baseline["cider"])
        figures["bytes_ratio"] = ratio(figures["bytes_mean"], baseline["bytes_mean"])
        figures["verified_ratio"] = ratio(figures["verified_ms_p50"], baseline["verified_ms_p50"])
        figures["server_ms_ratio"] = ratio(figures["server_ms_mean"], baseline["server_ms_mean"])
        figures["first_to_verified"] = ratio(figures["first_text_ms_p50"], figures["verified_ms_p50"])
    if policy := paradigms.get("policy"):
        medians = {name: figures["verified_ms_p50"] for name, figures in paradigms.items()}
        policy["best_fixed"], policy["verified_to_best_fixed"] = best_fixed(medians)
    if escalating := paradigms.get("escalate"):
        cloud = paradigms["speculative"]  # its texts are exactly the cloud's
        escalating["escalated_share"] = mean([outcome.was_passed_up for outcome in outcomes["escalate"]])
        escalating["cider_to_cloud"] = ratio(escalating["cider"], cloud["cider"])
        escalating["verified_to_cloud"] = ratio(escalating["verified_ms_p50"], cloud["verified_ms_p50"])
    return paradigms


def slots_of(
    trace: Sequence[tuple[float, str]], end_s: float, outcomes: Mapping[str, Sequence[PhotoOutcome]], lost_ms: float
) -> list[dict[str, Any]]:
    """Per entry of a trace (seconds, profile): each paradigm's median, the best fixed one, the policy's ratio to it.

    A photo counts in the slot in which it was shown, whenever its answer came. A lost one counts with lost_ms.
    """
    slots = []
    for (start_s, profile), until_s in zip(trace, [*(s for s, _ in trace[1:]), end_s], strict=True):
        medians: dict[str, float] = {}
        for name, seen in outcomes.items():
            here = [lost_ms if o.final_ms is None else o.final_ms for o in seen if start_s <= o.at_s < until_s]
            if here and name != "device":
                medians[name] = float(np.median(here))
        best, policy_to_best = best_fixed(medians)
        slots.append(
            {
                "profile": profile,
                "from_s": start_s,
                "to_s": until_s,
                "photos": {name: sum(start_s <= o.at_s < until_s for o in seen) for name, seen in outcomes.items()},
                "verified_ms_p50": medians,
                "best_fixed": best,
                "policy_to_best": policy_to_best,
            }
        )
    return slots


def best_fixed(medians: Mapping[str, float | None]) -> tuple[str | None, float | None]:
    """The fastest fixed paradigm, and the ratio of the policy's time to its time; None if there is none."""
    fixed = {name: ms for name, ms in medians.items() if ms is not None and name not in NOT_FIXED}
    best = min(fixed, key=lambda name: fixed[name], default=None)
    return best, ratio(medians.get("policy"), fixed[best] if best else None)


def against_oracle(slots: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The policy against an oracle that knows the best fixed paradigm of each slot: in total, and slot by slot."""
    both = [(slot["verified_ms_p50"], slot["policy_to_best"], slot["best_fixed"]) for slot in slots]
    both = [each for each in both if each[1] is not None]
    return {
        "policy_to_oracle": ratio(
            sum(medians["policy"] for medians, _, _ in both) or None, sum(medians[best] for medians, _, best in both)
        ),
        "policy_to_oracle_geometric": exp(sum(log(each) for _, each, _ in both) / len(both)) if both else None,
    }


def ratio(value: float | None, to: float | None) -> float | None:
    """None if a value is missing or the divisor is zero."""
    return None if value is None or not to else value / to


def _percentile(values: Sequence[float], lost: Sequence[float], percent: float) -> float | None:
    return float(np.percentile([*values, *lost], percent)) if values else None


def _shares(names: Sequence[str]) -> dict[str, float]:
    return {name: count / len(names) for name, count in Counter(names).most_common()}
