"""How long to wait before the next connection to the broker, and what to say about the lost one.

Pure: the time that a connection lasted and the source of randomness are arguments.
"""

import random
from dataclasses import dataclass

from edge_runtime.mqtt.settings import Timing

FIGHT = 3  # Evictions in a row from which another client with our id is the likely cause.


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a connection ended, or an attempt failed."""

    reason: str
    by_broker: bool = False  # the broker closed an established connection: one of our messages may be the cause
    refused: bool = False  # login or subscription: trying again soon cannot help
    taken_over: bool = False  # MQTT 5 reason code 0x8E


CLOSED = Loss("closed")  # on purpose


class Backoff:
    def __init__(self, timing: Timing, rng: random.Random, client_id: str) -> None:
        self.evictions = 0  # connections that another client with our id seems to have ended
        self._timing, self._rng, self._client_id = timing, rng, client_id
        self._failures = 0  # connections in a row that did not last
        self._evictions_in_row = 0

    def next(self, loss: Loss, lasted_s: float, may_be_our_message: bool) -> tuple[float, str]:
        """The delay in seconds, and the reason to show.

        lasted_s: how long the client was ONLINE. may_be_our_message: a message other than a birth was in flight.

        Full jitter: the delay is drawn from the whole interval, since after a power cut all boards return in the same
        second (Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015). A CONNACK alone resets nothing:
        two clients with one id would evict each other at the shortest delay for ever.
        """
        timing, reason = self._timing, loss.reason
        if lasted_s >= timing.stable:
            self._failures = 0
        is_short = loss.by_broker and lasted_s < timing.short_session
        if loss.taken_over or (is_short and not may_be_our_message):
            self.evictions += 1  # Mosquitto 2.0 closes the socket of the evicted client without a reason code.
            self._evictions_in_row += 1
        elif not is_short:
            self._evictions_in_row = 0
        if self._evictions_in_row >= FIGHT:
            delay = self._rng.uniform(*timing.duplicate_id)
            reason += f", again and again: does another client use the id {self._client_id}, or its account?"
        else:
            cap, base = timing.backoff_cap, timing.backoff_base
            if loss.refused:
                cap, base = timing.refused_cap, 10 * base
            delay = self._rng.uniform(0, min(cap, base * 2 ** min(self._failures, 30)))
        self._failures += 1
        return delay, reason
