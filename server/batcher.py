"""The queue between the network and the engine: bounded, fair across boards, and nothing stale leaves it.

Knows nothing of messages and models; its clock is an argument.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Waiting(Generic[Item]):
    """One request in the queue."""

    board: str
    item: Item
    deadline: float  # on the batcher's clock; past it nobody waits for the answer


@dataclass(frozen=True, slots=True)
class Batch(Generic[Item]):
    """What to do next: requests to serve, and those whose deadline has passed, to be told so."""

    items: list[Item] = field(default_factory=list)
    stale: list[Item] = field(default_factory=list)


class Batcher(Generic[Item]):
    """One queue a board, served in turn. When all are full together, the longest gives way.

    So a board that floods loses its own requests, and one that asks now and then always gets in (longest queue drop:
    Suter et al., "Buffer management schemes for supporting TCP in gigabit routers with per-flow queueing", 1999).
    """

    def __init__(self, capacity: int, max_batch: int, wait_s: float, clock: Callable[[], float]) -> None:
        self.capacity, self.max_batch, self.wait_s, self._clock = capacity, max_batch, wait_s, clock
        self._boards: OrderedDict[str, deque[Waiting[Item]]] = OrderedDict()  # the next to be served first; none empty
        self._count = 0
        self._came_together = False  # the requests of the last batch
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return self._count

    def ahead_of(self, board: str) -> int:
        """How many that wait now are served before one more of this board, at most."""
        with self._changed:
            own = len(self._boards.get(board, ()))
            return own + sum(min(len(queue), own + 1) for name, queue in self._boards.items() if name != board)

    def put(self, board: str, item: Item, deadline: float) -> Item | None:
        """Queues an item; returns the one for which there is no room, this or another, or None. Never waits."""
        with self._changed:
            self._boards.setdefault(board, deque()).append(Waiting(board, item, deadline))
            self._count += 1
            refused = None
            if self._count > self.capacity:
                # Its newest: the older ones have waited for their turn already. On a tie the newcomer gives way.
                longest = max(reversed(self._boards), key=lambda name: (len(self._boards[name]), name == board))
                refused = self._pop(longest, newest=True)
            self._changed.notify()
            return refused

    def take(self, timeout_s: float) -> Batch[Item]:
        """Waits for a first item, then shortly for more, and takes at most one batch, one a board in turn.

        Not for more where the last one came alone: one camera's requests do, and would all be held up in vain.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._count > 0, timeout_s):
                return Batch()
            if self._came_together or self._count > 1:
                self._changed.wait_for(lambda: self._count >= self.max_batch, self.wait_s)
            self._came_together = self._count > 1
            now = self._clock()
            batch: Batch[Item] = Batch()
            while self._count and len(batch.items) < self.max_batch:
                board = next(iter(self._boards))
                waiting = self._boards[board][0]
                (batch.items if waiting.deadline > now else batch.stale).append(self._pop(board))
            return batch

    def _pop(self, board: str, newest: bool = False) -> Item:
        """Under the lock. The board goes to the end of the round."""
        queue = self._boards[board]
        waiting = queue.pop() if newest else queue.popleft()
        self._count -= 1
        if not queue:
            del self._boards[board]
        elif not newest:
            self._boards.move_to_end(board)
        return waiting.item
