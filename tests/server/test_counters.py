"""A server's numbers for the exporter, in kinds."""

from collections import Counter

from server.counters import SERVER, by_label, values

STATUS = {
    "version": "1",
    "counts": {},
    "queue": {"waiting": 3, "capacity": 64},
    "engine": {"batches": 2, "compute_s": 0.5},
    "asked_above": 0,
}


def test_a_servers_counters_come_by_what_happened():
    gateway = {"undelivered": 1, "mqtt": {"published": 5}, "mqtt_pending": 2}
    counts = by_label(
        Counter({("received", ""): 9, ("replies", "ok"): 4, ("replies", "busy"): 1, ("alone", "full"): 2})
    )
    read = values(STATUS | {"counts": counts, "asked_above": 1, "gateway": gateway})
    assert (read["received"], read["replies"], read["alone"]) == (9, {"ok": 4, "busy": 1}, {"full": 2})
    assert (read["waiting"], read["asked_above"], read["answered_above"]) == (3, 1, 0)
    assert (read["undelivered"], read["mqtt"], read["mqtt_pending"]) == (1, {"published": 5}, 2)
    assert (read["queue_capacity"], read["batch_seconds"]) == (64, {"count": 2, "sum": 0.5})
    assert read.keys() <= SERVER.keys()


def test_what_has_not_happened_yet_is_told_as_nothing():
    read = values(STATUS)
    assert {name for name, meaning in SERVER.items() if meaning.suffix} <= read.keys()
    assert (read["received"], read["replies"], read["undelivered"]) == (0, {}, 0)


def test_the_budget_of_a_day_is_told_if_there_is_one():
    usage = {"calls": {}, "tokens": {}, "cost": 9.0, "cost_today": 0.5, "budget_per_day": 2.0}
    read = values(STATUS | {"usage": usage})
    assert (read["target_cost"], read["target_cost_today"], read["target_budget_per_day"]) == (9.0, 0.5, 2.0)
    assert "target_budget_per_day" not in values(STATUS | {"usage": usage | {"budget_per_day": None}})


def test_an_assistant_is_told_by_what_it_did():
    assistant = {"model": "small", "proposed": 9, "accepted": 7, "passes": 8, "failed": 0}
    assert values(STATUS | {"assistant": assistant})["assistant"] == {k: assistant[k] for k in list(assistant)[1:]}


def test_what_a_tier_above_says_unasked_is_counted():
    above = {"requests": {"accepted": 4, "unknown": 2, "open": 1}, "replies": {"ok": 3, "unreadable": 1}}
    read = values(STATUS | {"upstream": above})
    assert read["upstream"] == {"accepted": 4, "unknown": 2}
    assert read["upstream_replies"] == {"ok": 3, "unreadable": 1}
