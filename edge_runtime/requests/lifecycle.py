"""What becomes of a request: a state machine without I/O, shared by the board and a server's connection upstream.

A PUBACK only says that a broker took a message, and a server that dies takes its share of the requests with it. So a
request stays open until a reply with its id comes. Until then it is sent again with the *same* id (servers answer a
repeat from their cache). With an outbox, a request without a reply at its deadline is kept and asked again later.

    submitted -> STORING -> OPEN -> IMPROVABLE      IMPROVABLE has been answered, and waits for a better answer.
                    |        | ^                    A final answer ends a request in OPEN, IMPROVABLE and READING.
                    v        v |                    From every state but IMPROVABLE, it may be lost.
                       KEPT -> READING

The methods named `on_...` take what happened and return the actions that follow; the caller carries these out. Time is
an argument (seconds on one clock that never goes back), and so is the source of jitter. For one thread.

At every moment: accepted + found = answered + lost + open + kept.
"""

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from math import inf
from typing import Generic, TypeVar

from edge_runtime.config import OutboxConfig
from edge_runtime.logs import printable
from edge_runtime.requests.actions import (
    Action,
    Answer,
    Counts,
    Delete,
    Found,
    Lose,
    Postpone,
    Read,
    Send,
    Settle,
    Store,
    Why,
)
from edge_runtime.requests.entries import Entry, State, StoredEntries
from edge_runtime.requests.timing import ResendTimer, RetryTimer, busy_wait_s
from edge_runtime.wire import Reply, Status
from edge_runtime.wire.envelope import MAX_VIA

T = TypeVar("T")

ENDED = 4096  # ended requests that are remembered, to tell late and duplicate replies apart; about 100 bytes each
STORE_S = 0.3  # a request that must be on disk first is sent after this time even if the disk has not answered
RETRY_DEADLINE_S = 30.0  # for the reply to a request that comes out of the outbox
AWAY_S = 5.0  # after a frame found the link away, nothing is retried for this time
POLL_S = 0.5  # between two looks whether a kept request may be retried
DEFAULT_BUSY_S = 1.0  # for a server that says "busy" without a time
# Replies "unknown bundle" in one try. If one of four servers has the bundle, 1 % of requests miss it after 16. If no
# server is known that has not refused, more copies than a few would only cost bytes.
MAX_UNKNOWN_BUNDLE, FEW_UNKNOWN_BUNDLE = 16, 4


class RequestLifecycle(Generic[T]):
    """All requests that have not ended. At most `capacity` are open; one more ends when it is complete, unsent.

    The newest is refused, not the oldest: link and server have already worked for those that wait. If the oldest were
    dropped, a slow server would see each request end shortly before its reply.

    min_resend_s: before a request is sent again; unknown_share: the same as a share of the time until its deadline, as
    long as no reply time is known.
    outbox: its limits, if there is one; size_of: the bytes that a content takes there; may_store: whether it may go
    there. can_store: whether the outbox takes one more request. The caller keeps it up to date. is_complete: whether a
    content has all that its events and the outbox shall have; if not, `on_complete` follows.
    has_other_server: whether a server besides these, by name, may take a request at this time.
    """

    def __init__(
        self,
        capacity: int,
        *,
        min_resend_s: float,
        rng: random.Random,
        unknown_share: float = 0.0,
        outbox: OutboxConfig | None = None,
        size_of: Callable[[T], int] = lambda _: 0,
        may_store: Callable[[T], bool] = lambda _: True,
        is_complete: Callable[[T], bool] = lambda _: True,
        has_other_server: Callable[[AbstractSet[str], float], bool] = lambda refused, now: True,
    ) -> None:
        if capacity < 1 or min_resend_s <= 0:
            raise ValueError(f"capacity = {capacity}, min_resend_s = {min_resend_s}: want at least 1, and more than 0")
        self.can_store = outbox is not None
        self._capacity, self._rng, self._outbox = capacity, rng, outbox
        self._size_of, self._may_store, self._is_complete = size_of, may_store, is_complete
        self._has_other_server = has_other_server
        self._resend = ResendTimer(min_resend_s, rng, unknown_share)
        self._retry = RetryTimer(outbox.replay_per_s if outbox else 1.0, rng)
        self._live: dict[bytes, Entry[T]] = {}  # those that are not KEPT
        self._stored: StoredEntries[T] = StoredEntries(outbox)  # some are live, too
        self._in_state: Counter[State] = Counter()
        self._away_at = -inf  # when a frame last found the link away
        self._poll_at = -inf
        self._ended: OrderedDict[bytes, str] = OrderedDict()  # id -> what a further reply is counted as
        self._counts: Counter[str] = Counter()

    # ---- what is known ----

    @property
    def open_count(self) -> int:
        """Requests that wait for a reply."""
        return self._in_state[State.STORING] + self._in_state[State.OPEN]

    @property
    def counts(self) -> Counts:
        """A copy."""
        return Counts(
            **self._counts,
            open=self.open_count,
            kept=self._in_state[State.KEPT] + self._in_state[State.READING],
            improvable=self._in_state[State.IMPROVABLE],
        )

    def find(self, request_id: bytes) -> T | None:
        """The content of a request that waits for a reply, or for a better one."""
        entry = self._live.get(request_id)
        return entry.content if entry else None

    def kept_for_s(self, request_id: bytes, now: float) -> float:
        """Seconds since the outbox got a request; 0 for one that is not there."""
        entry = self._stored.get(request_id)
        return now - entry.kept_at if entry else 0.0

    def has_ended(self, request_id: bytes) -> bool:
        """Whether it was answered or lost, as far as that is remembered."""
        return request_id in self._ended

    def next_at(self) -> float:
        """When `on_time` will next have something to do; inf: never."""
        times = [min(entry.deadline, entry.resend_at) for entry in self._live.values()]
        if self._in_state[State.KEPT]:
            times += [max(self._retry.free_at(), self._poll_at), self._stored.drops_at()]
        return min(times, default=inf)

    # ---- what happens ----

    def on_request(
        self, request_id: bytes, content: T, deadline: float, now: float, *, link_is_away: bool = False
    ) -> list[Action[T]]:
        """A new request. ValueError: the id is in use.

        link_is_away: not worth sending now. It goes to the outbox at once, if that takes it.
        """
        if request_id in self._live or self._stored.get(request_id):
            raise ValueError(f"request {request_id.hex()} is open already: ids are used once")
        self._counts["accepted"] += 1
        entry = Entry(request_id, content, now, deadline, State.STORING)
        self._live[request_id] = entry
        self._in_state[State.STORING] += 1
        if link_is_away:
            self._away_at = now
            if self._takes(entry):
                return self._keep(entry, now)
        if self.open_count > self._capacity:
            entry.why_not_yet = Why("full", f"{self._capacity} requests wait already")
            self._move(entry, State.OPEN)  # but not sent
            return self.on_complete(request_id, now)
        if self._outbox and self._outbox.every_request and self._takes(entry):
            entry.resend_at = now + STORE_S
            return self._store(entry, now)
        return self._send_first(entry, now)

    def on_stored(self, ids: Iterable[bytes], now: float) -> list[Action[T]]:
        """These requests are on disk: from now on they outlive a power cut."""
        entries = [entry for request_id in ids if (entry := self._live.get(request_id))]
        return [action for entry in entries if entry.state is State.STORING for action in self._send_first(entry, now)]

    def on_unsent(self, send: Send[T], why: Why, now: float) -> list[Action[T]]:
        """A `Send` was not carried out. A resend waits for its next turn; a first send has failed."""
        entry = self._live.get(send.id)
        if entry is None or entry.state is not State.OPEN:
            return []
        entry.sends -= 1
        if not send.is_resend:
            return self._no_reply(entry, why, now)
        self._counts["resent"] -= 1
        # No copy was lost, so the next turn is not later. Linux does the same for TCP, in `tcp_retransmit_timer`.
        entry.is_asked_for, entry.doublings = send.is_asked_for, entry.doublings - (not send.is_asked_for)
        entry.resend_at = now + self._resend.interval(entry.doublings)
        # The first copy may still wait for the broker or for a server, so its reply says nothing of the link.
        entry.is_unclear = entry.is_held_back = True
        return []

    def on_reply(self, reply: Reply, now: float) -> list[Action[T]]:
        """A reply, whatever it says."""
        entry = self._live.get(reply.id) or self._stored.get(reply.id)
        if entry is None:
            self._counts[self._ended.get(reply.id, "unknown")] += 1
            return []
        # A server without the bundle cannot answer, but another one of its pool may.
        if reply.status in (Status.BUSY, Status.UNKNOWN_BUNDLE):
            return self._come_back_later(entry, reply, now)
        if reply.status is Status.REFERENCE_LOST:
            return self._send_alone(entry, reply, now)
        if reply.status is not Status.OK:
            return self._refused(entry, reply, now)
        if entry.state in (State.KEPT, State.READING):
            entry.late_reply = reply if reply.final else entry.late_reply
            return self._read(entry) if reply.final and entry.state is State.KEPT else []
        return self._answer(entry, reply, now)

    def on_complete(self, request_id: bytes, now: float) -> list[Action[T]]:
        """The content has become complete. One that no server takes in time, or one too many, has waited for that."""
        entry = self._live.get(request_id)
        if entry is None or entry.state is not State.OPEN or entry.resend_at < inf or entry.why_not_yet is None:
            return []
        assert entry.content is not None
        # Another server may be about to answer another copy.
        is_awaited = entry.sends > entry.copies_asked_for or not self._is_complete(entry.content)
        return [] if is_awaited else self._no_reply(entry, entry.why_not_yet, now)

    def on_not_taken(self, request_id: bytes, why: Why) -> list[Action[T]]:
        """The broker does not take a copy of the request."""
        entry = self._live.get(request_id)
        if entry is None or entry.state is not State.OPEN:  # it has a reply, or is on disk after an earlier try
            return []
        entry.sends, entry.is_unclear = entry.sends - 1, True
        # A server may be about to answer another copy.
        return [] if entry.sends > entry.copies_asked_for else self._lose(entry, why)

    def on_unusable_answer(self, request_id: bytes, why: Why) -> list[Action[T]]:
        """A server has answered, and what it said is no event. Its answer to another copy would be the same."""
        entry = self._live.get(request_id)
        if entry is None or entry.content is None:
            return []
        return self._settle(entry, why) if entry.state is State.IMPROVABLE else self._lose(entry, why)

    def on_found(self, found: Iterable[Found], missing: int, now: float) -> list[Action[T]]:
        """What an earlier run left in the outbox; missing: requests that the disk has lost, with their ids."""
        for item in found:
            if item.id not in self._live and not self._stored.get(item.id):
                self._counts["found"] += 1
                entry: Entry[T] = Entry(item.id, None, now, inf, State.KEPT, is_stored=True, size=item.size)
                entry.was_kept, entry.kept_at, entry.is_unclear = True, now - item.age_s, True
                self._in_state[State.KEPT] += 1
                self._stored.add(entry)
        self._stored.sort()
        self._counts["found"] += missing
        self._counts["lost"] += missing
        return []

    def on_read(
        self, request_id: bytes, content: T | None, now: float, why: str = "lost by the disk"
    ) -> list[Action[T]]:
        """What the outbox has of a request; None: it has lost the content, and why. May come unasked with None."""
        entry = self._live.get(request_id) or self._stored.get(request_id)
        if entry is None:
            return []
        if content is None:
            return self._lost_by_disk(entry, why)
        if entry.state is not State.READING:
            return []
        entry.content, entry.handed_over_at = content, now
        if entry.late_reply:
            return self._answer(entry, entry.late_reply, now)
        if entry.drop_reason:
            return self._lose(entry, entry.drop_reason)
        self._counts["retried"] += 1
        entry.deadline = now + RETRY_DEADLINE_S
        return self._send_first(entry, now)

    def on_unwritten(self, request_id: bytes, content: T) -> list[Action[T]]:
        """The process ends, and the disk has not taken this request."""
        entry = self._stored.get(request_id)
        if entry is None or entry.state is not State.KEPT:
            return []
        entry.content = content
        self._move(entry, State.READING)
        return self._lose(entry, Why("outbox", "outbox: not on disk when the process ended"))

    def on_time(self, now: float, *, link_is_free: bool = True) -> list[Action[T]]:
        """What is due now. Call it after every other call, and at `next_at`.

        link_is_free: online, a server answers, and there are bytes to spare for requests out of the outbox.
        """
        actions: list[Action[T]] = []
        for entry in list(self._live.values()):
            if entry.deadline <= now:
                actions += self._deadline(entry, now)
            elif entry.resend_at <= now:
                actions += (
                    self._send_first(entry, now) if entry.state is State.STORING else [self._send_again(entry, now)]
                )
        return [*actions, *self._give_up_old(now), *self._retry_one(now, link_is_free)]

    def close(self, why: Why, now: float) -> list[Action[T]]:
        """The process ends: what is open is kept or lost."""
        actions: list[Action[T]] = []
        for entry in list(self._live.values()):
            if entry.state is State.IMPROVABLE:
                actions += self._settle(entry, Why(why.code, f"{why.text} before a higher tier answered"))
            elif entry.state is State.READING:  # still in the outbox, even if it was to be given up
                self._move(entry, State.KEPT)
                self._stored.add(entry)
            else:
                actions += self._no_reply(entry, why, now)
        return actions

    # ---- sending ----

    def _send_first(self, entry: Entry[T], now: float) -> list[Action[T]]:
        self._move(entry, State.OPEN)
        entry.sent_at, entry.sends, entry.doublings = now, 1, self._resend.doublings
        entry.resend_at = now + self._resend.interval(entry.doublings, entry.deadline - now)
        return [self._send(entry, now, is_resend=False)]

    def _send_again(self, entry: Entry[T], now: float) -> Send[T]:
        is_asked_for, entry.is_asked_for = entry.is_asked_for, False
        entry.doublings += not is_asked_for  # a server that says "busy" is not silent
        entry.resend_at = now + self._resend.interval(entry.doublings, entry.deadline - now)
        entry.sends += 1
        self._counts["resent"] += 1
        return self._send(entry, now, is_resend=True, is_asked_for=is_asked_for)

    def _send(self, entry: Entry[T], now: float, is_resend: bool, is_asked_for: bool = False) -> Send[T]:
        assert entry.content is not None
        waited_s, left_s = now - entry.handed_over_at, entry.deadline - now
        return Send(entry.id, entry.content, waited_s, left_s, is_resend, is_asked_for)

    # ---- replies ----

    def _answer(self, entry: Entry[T], reply: Reply, now: float) -> list[Action[T]]:
        is_first, seen = entry.state is not State.IMPROVABLE, (reply.server, reply.tokens)
        if not reply.final and (seen == entry.latest or entry.not_final > MAX_VIA):
            # Each new text once, and no more than there can be tiers: a server answers each copy of a request.
            self._counts["repeated"] += 1
            return []
        is_timed = is_first and entry.sends == 1 and not (entry.copies_asked_for or entry.is_unclear)
        round_trip_s = now - entry.sent_at if is_timed else None
        assert entry.content is not None
        actions: list[Action[T]] = [Answer(entry.id, entry.content, reply, is_first, round_trip_s, entry.is_unclear)]
        if is_first:
            self._counts["answered"] += 1
            self._retry.end(entry.id)
            if entry.sends:
                # Later requests wait longer: otherwise replies over a slow link would never be measured.
                self._resend.replied(round_trip_s, entry.doublings + entry.is_held_back)
        if reply.final:
            self._end(entry, "duplicate")
            return actions + self._leave_outbox(entry)
        entry.latest, entry.not_final, entry.resend_at = seen, entry.not_final + 1, inf
        self._move(entry, State.IMPROVABLE)
        return actions + self._bound_improvable()

    def _bound_improvable(self) -> list[Action[T]]:
        if self._in_state[State.IMPROVABLE] <= self._capacity:
            return []
        oldest = next(entry for entry in self._live.values() if entry.state is State.IMPROVABLE)
        return self._settle(oldest, Why("full", "too many wait for a higher tier"))

    def _settle(self, entry: Entry[T], why: Why) -> list[Action[T]]:
        assert entry.content is not None
        self._end(entry, "duplicate")
        return [Settle(entry.id, entry.content, why), *self._leave_outbox(entry)]

    def _come_back_later(self, entry: Entry[T], reply: Reply, now: float) -> list[Action[T]]:
        if entry.state is not State.OPEN:
            self._counts["duplicate" if entry.state is State.IMPROVABLE else "late"] += 1
            return []
        self._counts["busy"] += 1
        told_s = DEFAULT_BUSY_S if reply.retry_after_ms is None else reply.retry_after_ms / 1e3
        # A server without the bundle is not overloaded, so its replies do not double the wait for another server.
        entry.resend_at = now + busy_wait_s(told_s, entry.copies_asked_for - len(entry.unknown_bundle), self._rng)
        self._ask_for_copy(entry, reply)
        if reply.status is Status.UNKNOWN_BUNDLE:
            entry.unknown_bundle += (reply.server,)
        if entry.resend_at < entry.deadline and not self._is_vain(entry, now):
            return []
        entry.resend_at = inf
        return self.on_complete(entry.id, now)

    def _is_vain(self, entry: Entry[T], now: float) -> bool:
        """Whether enough servers have said that they lack the bundle."""
        refused = entry.unknown_bundle
        few = len(refused) >= FEW_UNKNOWN_BUNDLE and not self._has_other_server(frozenset(refused), now)
        return few or len(refused) >= MAX_UNKNOWN_BUNDLE

    def _send_alone(self, entry: Entry[T], reply: Reply, now: float) -> list[Action[T]]:
        """The server lacks the reference of the first copy. Later copies have none.

        A later copy does not help if the server has discarded it as a repeat, while the first one waited.
        """
        if entry.state is not State.OPEN or entry.lost_its_reference:
            self._counts["duplicate" if entry.state is State.IMPROVABLE else "late"] += 1
            return []
        entry.lost_its_reference = True
        self._ask_for_copy(entry, reply)
        return [self._send_again(entry, now)] if now < entry.deadline else []

    def _ask_for_copy(self, entry: Entry[T], reply: Reply) -> None:
        entry.copies_asked_for, entry.is_asked_for, entry.why_not_yet = entry.copies_asked_for + 1, True, _why(reply)

    def _refused(self, entry: Entry[T], reply: Reply, now: float) -> list[Action[T]]:
        if entry.state is State.IMPROVABLE:
            self._counts["duplicate"] += 1
            return []
        if entry.state is State.KEPT:
            entry.drop_reason = _why(reply)
            return self._read(entry)
        return self._lose(entry, _why(reply)) if entry.state is not State.READING else []

    # ---- without a reply ----

    def _deadline(self, entry: Entry[T], now: float) -> list[Action[T]]:
        if entry.state is State.IMPROVABLE:
            return self._settle(entry, Why("no_reply", "no higher tier answered in time"))
        return self._no_reply(entry, entry.why_not_yet or Why("no_reply", f"no reply to {entry.sends} sent"), now)

    def _no_reply(self, entry: Entry[T], why: Why, now: float) -> list[Action[T]]:
        """Nothing more comes for now: the outbox has the request from here on, or it is lost."""
        if not (entry.is_stored or self._takes(entry)):
            return self._lose(entry, why)
        content, is_first_time = entry.content, not entry.was_kept
        actions = self._keep(entry, now)
        if is_first_time and content is not None and entry.id not in self._ended:
            actions.append(Postpone(entry.id, content, why))
        return actions

    def _lose(self, entry: Entry[T], why: Why) -> list[Action[T]]:
        self._counts["lost"] += 1
        self._end(entry, "late")
        return [*self._leave_outbox(entry), Lose(entry.id, entry.content, why)]

    def _end(self, entry: Entry[T], further_replies: str) -> None:
        """further_replies: what they are counted as."""
        del self._live[entry.id]
        self._in_state[entry.state] -= 1
        self._retry.end(entry.id)
        self._ended[entry.id] = further_replies
        if len(self._ended) > ENDED:
            self._ended.popitem(last=False)

    def _move(self, entry: Entry[T], state: State) -> None:
        self._in_state[entry.state] -= 1
        self._in_state[state] += 1
        entry.state = state
        if state is State.KEPT:
            self._live.pop(entry.id, None)
        else:
            self._live[entry.id] = entry

    # ---- the outbox ----

    def _takes(self, entry: Entry[T]) -> bool:
        """Whether the outbox takes a request that it does not have."""
        return self.can_store and entry.content is not None and self._may_store(entry.content)

    def _store(self, entry: Entry[T], now: float) -> list[Action[T]]:
        assert entry.content is not None
        entry.is_stored, entry.kept_at, entry.size = True, now, self._size_of(entry.content)
        self._stored.add(entry)
        return [Store(entry.id, entry.content)]

    def _keep(self, entry: Entry[T], now: float) -> list[Action[T]]:
        """The outbox alone has it from now on, until its next try."""
        actions = [] if entry.is_stored else self._store(entry, now)
        self._retry.end(entry.id)
        if entry.was_kept:
            entry.vain_tries += 1
            entry.retry_at = now + self._retry.delay_s(entry.vain_tries)
        entry.was_kept = True
        entry.is_unclear |= entry.sends > 0  # a reply after the next send may be to a copy of this try
        entry.content, entry.sends, entry.deadline, entry.resend_at = None, 0, inf, inf
        entry.copies_asked_for, entry.why_not_yet, entry.unknown_bundle = 0, None, ()
        entry.is_asked_for = entry.is_held_back = False
        self._move(entry, State.KEPT)
        return actions

    def _give_up_old(self, now: float) -> list[Action[T]]:
        """Their contents are read first, so that their events can say what is lost."""
        actions: list[Action[T]] = []
        for entry, why in self._stored.take_drops(now):
            entry.drop_reason = Why("outbox", f"outbox: {why}")
            actions += self._read(entry)
        return actions

    def _retry_one(self, now: float, link_is_free: bool) -> list[Action[T]]:
        """Live frames come first: in the table of open requests, and on a link that has just been away for them."""
        if not self._in_state[State.KEPT] or now < max(self._retry.free_at(), self._poll_at):
            return []
        self._poll_at = now + POLL_S
        is_idle = self.open_count < max(1, self._capacity // 2) and now - self._away_at > AWAY_S
        if not (link_is_free and is_idle) or (entry := self._stored.next_retry(now)) is None:
            return []
        self._poll_at = -inf
        self._retry.start(entry.id, now)
        return self._read(entry)

    def _read(self, entry: Entry[T]) -> list[Action[T]]:
        self._move(entry, State.READING)
        return [Read(entry.id)]

    def _lost_by_disk(self, entry: Entry[T], why: str) -> list[Action[T]]:
        if entry.state in (State.KEPT, State.READING):
            self._move(entry, State.READING)
            return self._lose(entry, Why("outbox", f"outbox: {why}"))
        self._leave_outbox(entry)  # it is open: stored once more if no reply comes
        return []

    def _leave_outbox(self, entry: Entry[T]) -> list[Action[T]]:
        if not entry.is_stored:
            return []
        entry.is_stored = False
        self._stored.remove(entry)
        return [Delete(entry.id)]


def _why(reply: Reply) -> Why:
    """For logs and events: the server's words, as a terminal can show them."""
    code = reply.status.name.lower()
    return Why(code, printable(f"server {reply.server}: {code}: {reply.error}"))
