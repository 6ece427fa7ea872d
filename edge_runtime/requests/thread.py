"""The thread around a request lifecycle: events come in through a bounded queue, actions go out to its owner."""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeAlias, TypeVar

from edge_runtime.logs import is_told
from edge_runtime.mqtt import Outcome
from edge_runtime.requests.actions import Action, Why
from edge_runtime.requests.lifecycle import RequestLifecycle
from edge_runtime.wire import EnvelopeError, Reply, decode_reply

logger = logging.getLogger(__name__)

T = TypeVar("T")
# Something that happened: called on the thread with the time, and returns the actions that follow.
Happened: TypeAlias = Callable[[float], Sequence[Action[T]]]

QUEUE = 256  # events that wait; then `offer` refuses
IDLE_S = 0.5  # the longest wait between two looks at the clock


class LifecycleThread(Generic[T]):
    """Owns a lifecycle. Only this thread touches it, so nothing but the queue is shared.

    perform(action, now): carries an action out, and returns actions that follow from it. before_step(now): sets what
    the lifecycle must know, and says whether the link is free for retries. on_reply: instead of the lifecycle's.
    """

    def __init__(
        self,
        name: str,
        lifecycle: RequestLifecycle[T],
        perform: Callable[[Action[T], float], Sequence[Action[T]]],
        before_step: Callable[[float], bool] = lambda _: True,
        on_reply: Callable[[Reply, float], Sequence[Action[T]]] | None = None,
    ) -> None:
        self.counts = lifecycle.counts  # replaced as a whole after every step: any thread may read it
        # Replies by status, and by what became of those that were not used. broken: events and actions that raised.
        self.replies = Counter[str]()
        self._on_reply = on_reply or lifecycle.on_reply
        self._lifecycle, self._perform, self._before_step = lifecycle, perform, before_step
        self._inbox: queue.Queue[Happened[T] | None] = queue.Queue(2 * QUEUE)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, happened: Happened[T]) -> None:
        """Waits while the queue is full."""
        self._inbox.put(happened)

    def offer(self, happened: Happened[T]) -> bool:
        """Never waits; False: there is no room."""
        if self._inbox.qsize() >= QUEUE:
            return False
        try:
            self._inbox.put_nowait(happened)
        except queue.Full:
            return False
        return True

    def reply_arrived(self, payload: bytes) -> None:
        """One message on the reply topic; never waits. Without room the request is sent again, or lost."""
        if not self.offer(partial(self._reply, payload)):
            self.replies["overflow"] += 1

    def was_sent(self, request_id: bytes, outcome: Outcome) -> None:
        """The MQTT client's outcome of a request. What it dropped is sent again, or lost at its deadline."""
        if outcome in (Outcome.REFUSED, Outcome.OVERSIZED):
            why = Why("not_taken", f"broker: {outcome.value}")
            if not self.offer(lambda _: self._lifecycle.on_refused(request_id, why)):
                self.replies["overflow"] += 1

    def close(self, why: Why) -> None:
        """Handles what has been handed over, then ends every request."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join()
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

    def _run(self) -> None:
        while True:
            now = time.monotonic()
            link_is_free = self._before_step(now)
            self.follow(self._lifecycle.on_time(now, link_is_free=link_is_free))
            wait_s = min(IDLE_S, max(0.0, self._lifecycle.next_at() - time.monotonic()))
            try:
                happened = self._inbox.get(timeout=wait_s)
            except queue.Empty:
                continue
            if happened is None:
                break
            try:
                self._before_step(now := time.monotonic())
                self.follow(happened(now))
            except Exception:  # an event that cannot be handled must not end the others
                self.replies["broken"] += 1
                logger.exception("requests: event failed: %.200r", happened)
