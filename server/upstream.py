"""The connection to the tier above: this server asks there as a board would, under its own id as the board's.

The requests that wait there have the same lifecycle as a board's (edge_runtime/requests/). Whoever asks is told any
number of replies that are not final, then exactly once how the request ended: a final reply, or the reason why there is
none. Nothing here is waited for. If the tier above is gone, slow or hostile, a request loses its improvement and never
its answer.

A request that was asked and is then cut off is not given up before its time: the connection may come back, the request
is sent again, and the board has a text to show meanwhile.
"""

import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from typing import Any

import msgspec

from edge_runtime.logs import printable
from edge_runtime.mqtt import Message, MqttClient, Outcome, State
from edge_runtime.requests.actions import Action, Answer, Lose, Send, Settle, Why
from edge_runtime.requests.lifecycle import RequestLifecycle
from edge_runtime.requests.thread import LifecycleThread
from edge_runtime.wire import (
    Reply,
    Request,
    RequestIds,
    aged,
    encode_request,
    topics,
)
from edge_runtime.wire.envelope import MAX_UINT32
from server.config import UpstreamConfig
from server.escalation import Above

logger = logging.getLogger(__name__)

COUNTS = ("accepted", "answered", "lost", "open", "resent", "busy", "duplicate", "late", "unknown")
TRIPS = 64  # round trips that the estimate is made of
TRIP_AGE_S = 60.0  # how long each counts: a tier above that was slow is tried again after it

Tell = Callable[[Reply | None, str], None]


@dataclass(slots=True)
class UpstreamRequest:
    """A request that was passed up."""

    request: Request  # as it was when asked
    until: float  # seconds, time.monotonic(): then whoever asked goes on without
    tell: Tell  # on the thread of Upstream; None: there is no reply, and why
    asked_at: float  # seconds, time.monotonic()
    # Copies. `offered` is written by the thread of Upstream, `ended` by that of the MQTT client.
    offered: int = 0  # to the client
    ended: int = 0  # of these, whatever became of them


class Upstream:
    """The requests that wait for the tier above; `with` starts and ends connection and thread."""

    def __init__(self, config: UpstreamConfig, server: str) -> None:
        """Raises ConfigError if no connection can ever work."""
        self._capacity = config.open_requests
        self._topic, self._ids = topics.request(config.site, server), RequestIds()
        self._lifecycle: RequestLifecycle[UpstreamRequest] = RequestLifecycle(
            config.open_requests, min_resend_s=config.resend_ms / 1e3, rng=random.Random()
        )
        self._thread: LifecycleThread[UpstreamRequest, UpstreamRequest] = LifecycleThread(
            "upstream", self._lifecycle, self._receive, self._perform
        )
        self._asking = threading.Lock()  # over the ids and the next one; held for a few statements
        self._asked = 0
        self._trips: tuple[tuple[float, float], ...] = ()  # (when, seconds), replaced as a whole: two threads read it
        self._client = MqttClient(
            config.settings(server),
            subscriptions=[(topics.reply(config.site, server), 1)],
            on_message=self._message_arrived,
        )

    def __enter__(self) -> "Upstream":
        self._client.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.close(Why("stopping", "this server stops"))
        self._client.close(drain_s=0.0)  # nobody waits for what is still to be sent

    # ---- the threads that call the target ----

    def above(self, now: float) -> Above:
        """What `escalation.obstacle_to` wants to know."""
        counts = self._thread.counts
        waiting = self._asked - counts.accepted + counts.open + counts.improvable
        return Above(self._client.state is State.ONLINE, waiting < self._capacity, self._round_trip_s(0.95, now))

    def ask(self, request: Request, until: float, tell: Tell) -> None:
        """Passes a request up, under an id of our own. Never waits. Raises EnvelopeError if it is too large."""
        with self._asking:
            own_id = self._ids.next(time.time_ns() // 1_000_000, secrets.randbits(16))
        request = msgspec.structs.replace(request, id=own_id)
        # In its longest form: numbers grow with their values, and a later copy is older.
        encode_request(msgspec.structs.replace(request, age_ms=MAX_UINT32, budget_ms=MAX_UINT32))
        with self._asking:
            self._asked += 1
        self._thread.put(UpstreamRequest(request, until, tell, time.monotonic()))

    # ---- any thread ----

    def wait_online(self, timeout_s: float) -> bool:
        """Whether the broker has answered in that time."""
        return self._client.wait_online(timeout_s)

    def hangs(self) -> bool:
        return self._client.hangs()

    def status(self) -> dict[str, Any]:
        """Connection, round trip in ms and counters: accepted = answered + lost + open."""
        now, counts = time.monotonic(), self._thread.counts
        return {
            "state": self._client.state.value,
            "round_trip_ms": {f"p{int(100 * p)}": round(1e3 * self._round_trip_s(p, now), 1) for p in (0.5, 0.95)},
            "requests": {name: count for name, count in asdict(counts).items() if name in COUNTS},
            "replies": {**self._thread.replies, "not_final_again": counts.repeated},
        }

    def _round_trip_s(self, share: float, now: float) -> float:
        """What this share of the latest round trips stayed below; 0: not known."""
        latest = sorted(seconds for at, seconds in self._trips if now - at <= TRIP_AGE_S)
        return latest[ceil(share * len(latest)) - 1] if latest else 0.0

    # ---- the thread of its own ----

    def _receive(self, asked: UpstreamRequest, now: float) -> Sequence[Action[UpstreamRequest]]:
        return self._lifecycle.on_request(asked.request.id, asked, asked.until, now)

    def _perform(self, action: Action[UpstreamRequest], now: float) -> Sequence[Action[UpstreamRequest]]:
        match action:
            case Send(_, asked, _, left_s):
                if action.is_resend and not action.is_asked_for and asked.offered > asked.ended:
                    return self._lifecycle.on_unsent(action, Why("no_reply", "an earlier copy has not left"), now)
                payload = encode_request(aged(asked.request, now - asked.asked_at, left_s))
                asked.offered += 1
                outcome = partial(self._copy_ended, asked)
                self._client.publish(self._topic, payload, expiry_s=max(0.0, left_s), on_outcome=outcome)
            case Answer(_, asked, reply, _, round_trip_s):
                if round_trip_s is not None:
                    self._add_trip(now, round_trip_s)
                asked.tell(reply, "")
            case Settle(_, asked, why) | Lose(_, UpstreamRequest() as asked, why):
                if why.code == "no_reply":  # a reply would take longer still; so a tier that is gone is soon left alone
                    self._add_trip(now, now - asked.asked_at)
                logger.info("no reply from above reason=%s", printable(why.text, 256))
                asked.tell(None, why.code)
        return ()

    def _message_arrived(self, message: Message) -> None:
        """On the client's thread."""
        if message.retained:  # kept from an earlier time, so no reply to what is asked now
            self._thread.replies["retained"] += 1
        else:
            self._thread.reply_arrived(message.payload)

    def _copy_ended(self, asked: UpstreamRequest, outcome: Outcome) -> None:
        """On the client's thread: the broker has a copy, or it was given up."""
        asked.ended += 1
        self._thread.copy_ended(asked.request.id, outcome)

    def _add_trip(self, now: float, seconds: float) -> None:
        self._trips = (*self._trips[1 - TRIPS :], (now, seconds))
