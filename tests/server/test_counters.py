"""A server's numbers for the exporter, in kinds."""

from server.counters import SERVER, values


def test_a_servers_counters_come_by_what_happened():
    counts = {"received": 9, "ok": 4, "busy": 1, "escalated": 2, "escalated_tier": 2, "alone_offline": 1, "changed": 1}
    counts |= {"changed_tier": 1, "answered_above": 1, "bad_request": 2}
    gateway = {"undelivered": 1, "mqtt_published": 5, "mqtt_pending": 2}
    read = values({"counts": counts, "queue": {"waiting": 3}, "asked_above": 1, "gateway": gateway})
    assert read["replies"] == {"ok": 4, "busy": 1, "bad_request": 2}
    assert (read["escalated"], read["alone"], read["changed"]) == ({"tier": 2}, {"offline": 1}, {"tier": 1})
    assert (read["waiting"], read["asked_above"], read["answered_above"]) == (3, 1, 1)
    assert (read["undelivered"], read["mqtt"], read["mqtt_pending"]) == (1, {"published": 5}, 2)
    assert read.keys() <= SERVER.keys()


def test_what_a_tier_above_says_unasked_is_counted():
    above = {"requests": {"accepted": 4, "unknown": 2, "open": 1}, "replies": {"ok": 3, "unreadable": 1}}
    read = values({"counts": {}, "queue": {"waiting": 0}, "asked_above": 1, "upstream": above})
    assert read["upstream"] == {"accepted": 4, "unknown": 2, "reply_ok": 3, "reply_unreadable": 1}
