"""The thread around a request lifecycle: events come in through a bounded queue, actions go out to its owner."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeAlias, TypeVar

from edge_runtime.requests.actions import Action, Why
from edge_runtime.requests.lifecycle import RequestLifecycle

logger = logging.getLogger(__name__)

T = TypeVar("T")
# Something that happened: called on the thread with the time, and returns the actions that follow.
Happened: TypeAlias = Callable[[float], Sequence[Action[T]]]

QUEUE = 256  # events that wait; then `offer` refuses
IDLE_S = 0.5  # the longest wait between two looks at the clock


class LifecycleThread(Generic[T]):
    """Owns a lifecycle. Only this thread touches it, so nothing but the queue is shared.

    perform(action, now): carries an action out, and returns actions that follow from it. before_step(now): sets what
    the lifecycle must know, and says whether the link is free for retries.
    """

    def __init__(
        self,
        name: str,
        lifecycle: RequestLifecycle[T],
        perform: Callable[[Action[T], float], Sequence[Action[T]]],
        before_step: Callable[[float], bool] = lambda _: True,
    ) -> None:
        self.counts = lifecycle.counts  # replaced as a whole after every step: any thread may read it
        self.errors = 0  # events and actions that raised
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
                happened = self._inbox.get(timeout=wait_s)
            except queue.Empty:
                continue
            if happened is None:
                break
            try:
                self._before_step(now := time.monotonic())
                self.follow(happened(now))
            except Exception:  # an event that cannot be handled must not end the others
                self.errors += 1
                logger.exception("requests: event failed: %.200r", happened)
