"""A server's numbers for the exporter, in kinds."""

from collections import Counter

from server.counters import SERVER, by_label, values


def test_a_servers_counters_come_by_what_happened():
    gateway = {"undelivered": 1, "mqtt": {"published": 5}, "mqtt_pending": 2}
    counts = by_label(
        Counter({("received", ""): 9, ("replies", "ok"): 4, ("replies", "busy"): 1, ("alone", "full"): 2})
    )
    read = values({"counts": counts, "queue": {"waiting": 3}, "asked_above": 1, "gateway": gateway})
    assert (read["received"], read["replies"], read["alone"]) == (9, {"ok": 4, "busy": 1}, {"full": 2})
    assert (read["waiting"], read["asked_above"], read["answered_above"]) == (3, 1, 0)
    assert (read["undelivered"], read["mqtt"], read["mqtt_pending"]) == (1, {"published": 5}, 2)
    assert read.keys() <= SERVER.keys()


def test_what_a_tier_above_says_unasked_is_counted():
    above = {"requests": {"accepted": 4, "unknown": 2, "open": 1}, "replies": {"ok": 3, "unreadable": 1}}
    read = values({"counts": {}, "queue": {"waiting": 0}, "asked_above": 1, "upstream": above})
    assert read["upstream"] == {"accepted": 4, "unknown": 2, "reply_ok": 3, "reply_unreadable": 1}
