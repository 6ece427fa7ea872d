"""How many bytes the features of the next frame may have: on a thin link, or with little left of the byte budget, a
board sends less rather than later. A function of a snapshot.
"""

from math import inf

from edge_runtime.planning.measurements import MINUTE_S, Snapshot

OTHER_BYTES = 60  # of a request besides the features: envelope and draft
DEADLINE_SHARE = 0.5  # of the time until the deadline may be spent on the link
INTERVAL_SHARE = 0.5  # of the time until the next frame: what is still being sent then delays that frame


def feature_bytes(snapshot: Snapshot, bytes_per_minute: int, deadline_ms: float) -> float:
    """At most so many bytes, inf without a reason for less. bytes_per_minute: 0 is no limit."""
    return min(_of_budget(snapshot, bytes_per_minute), _of_link(snapshot, deadline_ms)) - OTHER_BYTES


def _of_budget(snapshot: Snapshot, budget: int) -> float:
    """A frame's equal share of the budget, or what is left of it if that is less."""
    if not budget:
        return inf
    link, interval_ms = snapshot.link, snapshot.board.interval_ms
    left = min(budget - link.bytes_last_minute, budget / 4 - link.bytes_last_quarter)
    return min(left, budget * interval_ms / (1e3 * MINUTE_S)) if interval_ms else left


def _of_link(snapshot: Snapshot, deadline_ms: float) -> float:
    """What the link carries in its share of the deadline, and of the time between two frames, as far as is known."""
    link, interval_ms = snapshot.link.estimate, snapshot.board.interval_ms
    if link is None:
        return inf
    ms_per_byte = link.ms / (link.max_window + link.at_bytes)
    round_trip_ms = ms_per_byte * link.max_window
    in_time = (DEADLINE_SHARE * deadline_ms - round_trip_ms) / ms_per_byte
    if in_time <= 0:  # fewer bytes would not be sooner
        in_time = inf
    return min(in_time, INTERVAL_SHARE * interval_ms / ms_per_byte) if interval_ms else in_time
