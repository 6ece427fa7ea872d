"""A queue between two stages of the server: bounded, shared fairly between boards by cost, and nothing stale leaves it.

Each board has a virtual time: the milliseconds of service it has had. The board with the least is served next, and a
board that was idle starts at the virtual time of the queue, so that it neither waits for its past nor saves up. What a
request costs is known only afterwards, so a typical cost is charged when it is taken and corrected when it is done.
Start-time fair queuing (Goyal et al., SIGCOMM 1996) with costs that are measured, as in Sheng et al., "Fairness in
Serving Large Language Models" (OSDI 2024).

Knows nothing of messages and models; its clock is an argument.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")

MAX_CHARGE = 100.0  # times the typical cost; a picture that takes all that it may costs less
MAX_BOARDS = 4096  # whose virtual times are kept
TYPICAL_SHARE = 0.1  # of the latest request in the moving average of costs


@dataclass(frozen=True, slots=True)
class Batch(Generic[Item]):
    """What to do next: requests to serve, and requests whose deadline has passed, to be told so."""

    items: list[Item] = field(default_factory=list)
    stale: list[Item] = field(default_factory=list)


class Batcher(Generic[Item]):
    """One queue per board. When all of them together are full, the longest loses its newest request.

    So a board that floods loses its own requests, and a board that asks rarely always gets in (longest queue drop:
    Suter et al., "Buffer management schemes for supporting TCP in gigabit routers with per-flow queueing", 1999).
    """

    def __init__(
        self, capacity: int, max_batch: int, wait_s: float, clock: Callable[[], float], per_board: int = 1
    ) -> None:
        """per_board: with several threads that take, how many of them one board may occupy."""
        self.capacity, self.max_batch, self.wait_s, self._clock = capacity, max_batch, wait_s, clock
        self._per_board = per_board
        self._queues: dict[str, deque[tuple[Item, float]]] = {}  # by board, with deadlines; none is empty
        self._count = 0
        # What the boards of requests that were taken and are not done have been charged for them.
        self._in_service: dict[str, list[float]] = {}
        self._served_ms: dict[str, float] = {}  # virtual times by board
        self._now_ms = 0.0  # the queue's own: the virtual time of the board that was taken last
        self._typical_ms = 1.0  # of a request
        self._last_was_shared = False  # the last batch had more than one request
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Requests that wait."""
        return self._count

    @property
    def is_idle(self) -> bool:
        """Nothing waits and nothing is in service."""
        with self._changed:
            return not self._count and not self._in_service

    def ahead_of(self, board: str) -> int:
        """How many of the waiting requests are served before one more of this board, if all cost the same."""
        with self._changed:
            own = len(self._queues.get(board, ()))
            return own + sum(min(len(queue), own + 1) for name, queue in self._queues.items() if name != board)

    def put(self, board: str, item: Item, deadline: float) -> Item | None:
        """Queues an item. Returns the item for which there is no room, this one or another, or None. Never waits."""
        with self._changed:
            if board not in self._queues and board not in self._in_service:
                self._served_ms[board] = max(self._served_ms.get(board, 0.0), self._now_ms)
            self._queues.setdefault(board, deque()).append((item, deadline))
            self._count += 1
            refused = None
            if self._count > self.capacity:
                # Its newest: the older ones are nearer to their turn. If two are as long, the board that asks loses.
                longest = max(self._queues, key=lambda name: (len(self._queues[name]), name == board))
                refused, _ = self._pop(longest, newest=True)
            if len(self._served_ms) > MAX_BOARDS:
                active = {*self._queues, *self._in_service}
                self._served_ms = {name: ms for name, ms in self._served_ms.items() if name in active}
            self._changed.notify()
            return refused

    def take(self, timeout_s: float) -> Batch[Item]:
        """Waits for a first item, then shortly for more, and takes at most one batch. Call `done` for each item of it.

        A board with `per_board` requests in service is not taken before one of them is done, so with several threads
        that take, the other boards find some free. A request that is alone does not wait for more if the last one was
        alone too: the requests of a single camera are, and each would wait in vain.
        """
        with self._changed:
            if not self._changed.wait_for(self._ready, timeout_s):
                return Batch()
            if self._last_was_shared or self._count > 1:
                self._changed.wait_for(lambda: self._count >= self.max_batch, self.wait_s)
            now, boards = self._clock(), self._ready()
            batch: Batch[Item] = Batch()
            while boards and len(batch.items) < self.max_batch:
                board = min(boards, key=self._served_ms.__getitem__)
                self._now_ms = max(self._now_ms, self._served_ms[board])
                item, deadline = self._pop(board)
                if deadline > now:
                    batch.items.append(item)
                    self._in_service.setdefault(board, []).append(self._typical_ms)
                    self._served_ms[board] += self._typical_ms
                else:
                    batch.stale.append(item)
                if board not in self._queues:
                    boards.remove(board)
            if batch.items:  # else another thread has taken them
                self._last_was_shared = len(batch.items) > 1
            return batch

    def done(self, board: str, cost_ms: float) -> None:
        """One request of this board that was taken to be served has been, at this cost."""
        with self._changed:
            charges = self._in_service[board]
            # One request that met a slow moment of the machine must not keep its board waiting for minutes.
            self._served_ms[board] += min(cost_ms, MAX_CHARGE * max(self._typical_ms, 1.0)) - charges.pop()
            if not charges:
                del self._in_service[board]
            self._typical_ms += TYPICAL_SHARE * (cost_ms - self._typical_ms)
            self._changed.notify_all()

    def clear(self) -> list[Item]:
        """Takes everything that waits, not to be served."""
        with self._changed:
            items = [item for queue in self._queues.values() for item, _ in queue]
            self._queues.clear()
            self._count = 0
            return items

    def _ready(self) -> list[str]:
        """Boards of which a request may be taken. Under the lock."""
        return [board for board in self._queues if len(self._in_service.get(board, ())) < self._per_board]

    def _pop(self, board: str, newest: bool = False) -> tuple[Item, float]:
        """Under the lock."""
        queue = self._queues[board]
        waiting = queue.pop() if newest else queue.popleft()
        self._count -= 1
        if not queue:
            del self._queues[board]
        return waiting
