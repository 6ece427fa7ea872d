"""The thread around a request lifecycle: messages come in through a bounded queue, actions go out to its owner."""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from edge_runtime.logs import is_told
from edge_runtime.mqtt import Outcome
from edge_runtime.requests.actions import Action, Counts, Why
from edge_runtime.requests.lifecycle import RequestLifecycle
from edge_runtime.wire import EnvelopeError, Reply, decode_reply

logger = logging.getLogger(__name__)

T = TypeVar("T")
M = TypeVar("M")

QUEUE = 256  # messages that wait; then `_offer` refuses
IDLE_S = 0.5  # the longest wait between two looks at the clock
HANG_S = 10.0  # a thread that has not looked at the clock for so long hangs


@dataclass(frozen=True, slots=True)
class _ReplyArrived:
    payload: bytes


@dataclass(frozen=True, slots=True)
class _NotTaken:
    """The broker did not take a copy of a request, and will not."""

    id: bytes
    outcome: Outcome


class LifecycleThread(Generic[T, M]):
    """Owns a lifecycle. Only this thread touches it, so nothing but the queue is shared.

    receive(message, now): what one of the owner's messages means to the lifecycle. perform(action, now): carries an
    action out, and returns actions that follow from it. on_reply: instead of the lifecycle's. before_step(now): sets
    what the lifecycle must know, and says whether the link is free for retries.
    """

    def __init__(
        self,
        name: str,
        lifecycle: RequestLifecycle[T],
        receive: Callable[[M, float], Sequence[Action[T]]],
        perform: Callable[[Action[T], float], Sequence[Action[T]]],
        on_reply: Callable[[Reply, float], Sequence[Action[T]]] | None = None,
        before_step: Callable[[float], bool] = lambda _: True,
    ) -> None:
        self.counts = Counts()  # of the lifecycle, replaced as a whole after every step: any thread may read it
        # Replies by status, and by what became of those that were not used. broken: messages and actions that raised.
        self.replies = Counter[str]()
        self._lifecycle, self._receive, self._perform, self._before_step = lifecycle, receive, perform, before_step
        self._on_reply = on_reply or lifecycle.on_reply
        self._inbox: queue.Queue[M | _ReplyArrived | _NotTaken | None] = queue.Queue(2 * QUEUE)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._is_closed = False
        self._last_turn = 0.0  # when it last looked at the clock

    def start(self) -> None:
        """Once."""
        self._last_turn = time.monotonic()
        self._thread.start()

    def hangs(self, now: float) -> bool:
        """Requests would reach their deadline without an event. now: seconds, time.monotonic(); any thread."""
        return now - self._last_turn > HANG_S

    def put(self, message: M) -> None:
        """Hand over a message; waits while the queue is full. After `close` it is dropped: nobody would take it."""
        while not (self._is_closed or self._put(message)):
            pass

    def reply_arrived(self, payload: bytes) -> None:
        """One message on the reply topic; never waits. Without room the request is sent again, or lost."""
        self._offer(_ReplyArrived(payload))

    def copy_ended(self, request_id: bytes, outcome: Outcome) -> None:
        """The MQTT client's outcome of one copy of a request; never waits."""
        # What its queue dropped, or what expired there, is sent again or lost at its deadline, as anything unanswered.
        if outcome in (Outcome.REFUSED, Outcome.OVERSIZED):
            self._offer(_NotTaken(request_id, outcome))

    def _offer(self, message: _ReplyArrived | _NotTaken) -> None:
        if self._inbox.qsize() >= QUEUE:
            self.replies["overflow"] += 1
        else:
            self._put(message)

    def _put(self, message: M | _ReplyArrived | _NotTaken) -> bool:
        try:
            self._inbox.put(message, timeout=IDLE_S)
        except queue.Full:
            return False
        return True

    def close(self, why: Why) -> None:
        """Handles what has been handed over, then ends every request."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join()
        self._is_closed = True
        self._before_step(time.monotonic())
        self.follow(self._lifecycle.close(why, time.monotonic()))

    def follow(self, actions: Sequence[Action[T]]) -> None:
        """Carries out actions and those that follow from them. On this thread, or behind its end."""
        todo = list(actions)
        while todo:
            action = todo.pop(0)
            try:
                todo[:0] = self._perform(action, time.monotonic())
            except Exception:  # whatever one request holds, the others must still end
                self.replies["broken"] += 1
                logger.exception("requests: action failed: %.200r", action)
        self.counts = self._lifecycle.counts

    def _run(self) -> None:
        while True:
            self._last_turn = now = time.monotonic()
            link_is_free = self._before_step(now)
            self.follow(self._lifecycle.on_time(now, link_is_free=link_is_free))
            wait_s = min(IDLE_S, max(0.0, self._lifecycle.next_at() - time.monotonic()))
            try:
                message = self._inbox.get(timeout=wait_s)
            except queue.Empty:
                continue
            if message is None:
                break
            try:
                self._before_step(now := time.monotonic())
                self.follow(self._handle(message, now))
            except Exception:  # a message that cannot be handled must not end the others
                self.replies["broken"] += 1
                logger.exception("requests: message failed: %.200r", message)

    def _handle(self, message: M | _ReplyArrived | _NotTaken, now: float) -> Sequence[Action[T]]:
        match message:
            case _ReplyArrived(payload):
                return self._reply(payload, now)
            case _NotTaken(request_id, outcome):
                return self._lifecycle.on_not_taken(request_id, Why("not_taken", f"broker: {outcome.value}"))
            case _:
                return self._receive(message, now)

    def _reply(self, payload: bytes, now: float) -> Sequence[Action[T]]:
        try:
            reply = decode_reply(payload)
        except EnvelopeError as error:
            self.replies["unreadable"] += 1
            if is_told(count := self.replies["unreadable"]):
                logger.warning("%s: reply unreadable count=%d error=%s", self._thread.name, count, error)
            return ()
        self.replies[reply.status.name.lower()] += 1
        return self._on_reply(reply, now)
