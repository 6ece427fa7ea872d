"""Asks the tier above after a board has this server's reply, and tells the board what comes back.

The rules are in escalation.py, the connection is in upstream.py. A request that is passed up ends here exactly once,
also if nothing comes back.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from edge_runtime.wire import EnvelopeError, Reply, Tier, encode_reply
from server.escalation import (
    Allowances,
    Bounds,
    Ranks,
    Reason,
    ask_until,
    obstacle_to,
    own_reason,
    passed_down,
    passed_up,
    requested_reason,
)
from server.received import Received
from server.reply_cache import Key
from server.upstream import Upstream


@dataclass(slots=True)
class AskedAbove:
    """A request whose board has a first reply and gets one more."""

    received: Received
    reason: Reason
    own: Reply  # this server's
    latest: Reply  # what the board was told last; it becomes final if nothing better follows


class Escalator:
    """For the threads that call the target, except where it says otherwise.

    upstream: the tier above, if there is one. count: adds one to a counter, by name and label. finish: sends a final
    reply.
    """

    def __init__(
        self,
        upstream: Upstream | None,
        bounds: Bounds,
        server: str,
        tier: Tier,
        count: Callable[[str, str], None],
        finish: Callable[[Received, Reply], None],
    ) -> None:
        self._upstream, self._bounds, self._server, self._tier = upstream, bounds, server, tier
        self._count, self._finish = count, finish
        self._lock = threading.Lock()  # over the next two
        self._ranks, self._allowances = Ranks(), Allowances(bounds.max_requested_share)
        # By `id`: of a request that came again after ReplyCache's max_flight_s, two copies may wait.
        self._waiting: set[int] = set()
        self._first_replies: dict[Key, bytes] = {}  # for a board that asks again because it lost the first reply

    def __len__(self) -> int:
        """Requests that wait for the tier above. Any thread."""
        return len(self._waiting)

    def first_reply(self, key: Key) -> bytes | None:
        """What the board of a request that waits for the tier above was told last. Any thread."""
        return self._first_replies.get(key)

    def forget(self, key: Key) -> None:
        """The request has a final reply. Any thread."""
        self._first_replies.pop(key, None)

    def ask(self, received: Received, own: Reply) -> bool:
        """Asks the tier above, if it should be asked and can be. False: this server's own reply is final."""
        reason = self._reason_to_ask(received, own.confidence or 0.0)
        if reason is None:
            return False
        now, until = time.monotonic(), ask_until(received.arrival.at, received.deadline)
        of_board = sum(board == received.arrival.board for board, _ in list(self._first_replies))
        above = self._upstream.above(now) if self._upstream else None
        obstacle = obstacle_to(above, until - now, of_board < self._bounds.max_open_per_board)
        if obstacle or self._upstream is None:
            self._count("alone", obstacle or "no_upstream")
            return False
        self._count("escalated", reason)
        asked = AskedAbove(received, reason, own, own)
        self._reply_for_now(asked)
        try:
            request = passed_up(received.request, self._server, own.token_ids, now - received.arrival.at)
            self._upstream.ask(request, until, partial(self._answered, asked))
        except EnvelopeError:  # content that just fits an envelope
            self._answered(asked, None, "too_large")
        return True

    def _reason_to_ask(self, received: Received, confidence: float) -> Reason | None:
        requested = requested_reason(received.request.options, self._tier, confidence)
        with self._lock:
            rank = self._ranks.rank(confidence, random.random())
            may_ask = self._allowances.spend(received.arrival.board, requested is not None)
        own = own_reason(confidence, rank, self._bounds, random.random())
        if requested and not may_ask:
            self._count("alone", "asked_too_often")
        return requested if may_ask else own

    def _reply_for_now(self, asked: AskedAbove) -> None:
        data = encode_reply(msgspec.structs.replace(asked.latest, final=False))
        self._waiting.add(id(asked))
        self._first_replies[asked.received.key] = data
        asked.received.arrival.reply(data, asked.received.deadline - time.monotonic())

    def _answered(self, asked: AskedAbove, reply: Reply | None, why: str) -> None:
        """On the thread of upstream.py: what the tier above says. None: it says nothing more, and why.

        A reply that is not final takes the place of this server's own: if nothing better follows, the board keeps the
        best text that it has seen, and learns whose that is.
        """
        if reply is None:
            self._count("alone", why)
        else:
            asked.latest = passed_down(asked.own, reply)
            if not reply.final:
                self._reply_for_now(asked)
                return
            self._count("answered_above", "")
            if reply.text == asked.own.text:  # a text of another vocabulary has no tokens
                self._count("unchanged", "")
            else:
                self._count("changed", asked.reason)  # that of "explore" says what the bounds miss
        self._waiting.discard(id(asked))
        self._finish(asked.received, msgspec.structs.replace(asked.latest, final=True))
