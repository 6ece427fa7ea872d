"""The life of a request: `lifecycle.py` decides it, without I/O; `tracker.py` is the board's thread around it.

A request is submitted, sent, sent again, answered, kept in the outbox or lost. Each ends in exactly one final event.
The server's connection to the tier above uses the same lifecycle.
"""

from edge_runtime.requests.byte_budget import ByteBudget
from edge_runtime.requests.tracked import NewRequest
from edge_runtime.requests.tracker import Observer, RequestTracker

__all__ = ["ByteBudget", "NewRequest", "Observer", "RequestTracker"]
