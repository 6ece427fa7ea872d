"""The thread around a request lifecycle: messages come in through a bounded queue, actions go out to its owner."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from edge_runtime.requests.actions import Action, Counts, Why
from edge_runtime.requests.lifecycle import RequestLifecycle

logger = logging.getLogger(__name__)

T = TypeVar("T")
M = TypeVar("M")

QUEUE = 256  # messages that wait; then `offer` refuses
IDLE_S = 0.5  # the longest wait between two looks at the clock


class LifecycleThread(Generic[T, M]):
    """Owns a lifecycle. Only this thread touches it, so nothing but the queue is shared.

    receive(message, now): what a message means to the lifecycle. perform(action, now): carries an action out, and
    returns actions that follow from it. before_step(): sets what the lifecycle must know, and says whether the link is
    free for retries.
    """

    def __init__(
        self,
        name: str,
        lifecycle: RequestLifecycle[T],
        receive: Callable[[M, float], Sequence[Action[T]]],
        perform: Callable[[Action[T], float], Sequence[Action[T]]],
        before_step: Callable[[float], bool] = lambda _: True,
    ) -> None:
        self.counts = Counts()  # of the lifecycle, replaced as a whole after every step: any thread may read it
        self.errors = 0  # messages and actions that raised
        self._lifecycle, self._receive, self._perform, self._before_step = lifecycle, receive, perform, before_step
        self._inbox: queue.Queue[M | None] = queue.Queue(2 * QUEUE)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._is_closed = False

    def start(self) -> None:
        """Once."""
        self._thread.start()

    def put(self, message: M) -> None:
        """Hand over a message; waits while the queue is full. After `close` it is dropped: nobody would take it."""
        while not (self._is_closed or self._put(message)):
            pass

    def offer(self, message: M) -> bool:
        """Hand over a message without waiting; False: there is no room."""
        if self._inbox.qsize() >= QUEUE:
            return False
        try:
            self._inbox.put_nowait(message)
        except queue.Full:
            return False
        return True

    def _put(self, message: M) -> bool:
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
                self.errors += 1
                logger.exception("requests: action failed: %.200r", action)
        self.counts = self._lifecycle.counts

    def _run(self) -> None:
        while True:
            now = time.monotonic()
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
                self.follow(self._receive(message, now))
            except Exception:  # a message that cannot be handled must not end the others
                self.errors += 1
                logger.exception("requests: message failed: %.200r", message)
