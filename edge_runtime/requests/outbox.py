"""Requests that found no answer in time, asked again when the link has room.

One thread owns the spool, the store on disk: whoever keeps an item or knows its end only puts that on the thread's
queue, and a slow disk holds up nobody else. What is asked again when is decided by `Schedule`, which is pure: oldest
first, a few a second, a few at a time, and each one later after every try in vain.

    given = found + kept = answered + dropped + gaps + now

at every moment, over restarts as well: what a run leaves on disk the next one finds. At least once: an end that was
known but not yet written when the power went is forgotten, and the request asked again.
"""

import logging
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from typing import TypeVar

from edge_runtime.config import OutboxConfig
from edge_runtime.requests.store import Dropped, Kept, Spool

logger = logging.getLogger(__name__)

T = TypeVar("T")

QUEUE = 256  # items between threads: some minutes of a board whose disk hangs
WINDOW = 4  # asked again and not answered yet: a dead server costs no more than that
POLL_S = 0.5  # between two looks whether there is room to ask
IDLE_S = 60.0  # the longest wait between two looks at the clock
FIRST_RETRY_S = 5.0  # after a try in vain, then doubling
LAST_RETRY_S = 600.0


@dataclass(frozen=True, slots=True)
class Counts:
    """found + kept = answered + dropped + gaps + now. The rest explains them."""

    found: int = 0  # rows of earlier runs
    kept: int = 0  # in this run
    answered: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)  # by reason; each was given to `on_dropped`
    gaps: int = 0  # rows whose content is lost: nobody can be told which
    now: int = 0  # waiting, on disk or in memory, or in the owner's hands
    bytes: int = 0  # of those that wait
    replayed: int = 0  # given to `on_due`, again and again
    errors: int = 0  # exceptions in the owner's callbacks
    is_on_disk: bool = False
    fault: str = ""  # what is wrong with the disk, for people


class Schedule:
    """Which item is asked again when. Pure: `now` is seconds of a clock that never goes back."""

    def __init__(self, per_s: float, rng: random.Random) -> None:
        self._distance_s, self._rng = 1 / per_s, rng
        self._free_at = -inf
        self._out: set[bytes] = set()  # asked again, unanswered
        self._held: set[bytes] = set()  # the owner asks them itself for the first time
        self._not_before: dict[bytes, float] = {}

    def hold(self, request_id: bytes) -> None:
        """Not to be asked until it has failed."""
        self._held.add(request_id)

    def free_at(self) -> float:
        """When one more may be asked, as far as the rate and the window say; inf: the window is full."""
        return self._free_at if len(self._out) < WINDOW else inf

    def take(self, ids: Iterable[bytes], now: float) -> bytes | None:
        """The first of `ids` that is to be asked now; it is with the owner from here on."""
        if now < self.free_at():
            return None
        for request_id in ids:
            is_with_owner = request_id in self._out or request_id in self._held
            if not is_with_owner and self._not_before.get(request_id, -inf) <= now:
                self._out.add(request_id)
                self._free_at = now + self._distance_s
                return request_id
        return None

    def failed(self, request_id: bytes, tries: int, now: float) -> None:
        """It was asked in vain for the `tries`th time, and is asked again later."""
        self.forget(request_id)
        delay_s = min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(max(0, tries - 1), 16))
        # Spread, since what failed together would come back together: Brooker, "Exponential Backoff and Jitter", 2015.
        self._not_before[request_id] = now + delay_s * self._rng.uniform(0.5, 1)

    def forget(self, request_id: bytes) -> None:
        """It has ended."""
        self._out.discard(request_id)
        self._held.discard(request_id)
        self._not_before.pop(request_id, None)


class Outbox:
    """Items on disk and the thread that asks them again; `with` starts and ends it.

    All methods may be called from any thread, and none waits for the disk or the network. The callbacks run on the
    outbox's thread: they should only pass on what they get. End the owner's threads before the outbox.
    """

    def __init__(
        self,
        settings: OutboxConfig,
        *,
        on_due: Callable[[Kept, float], None],
        on_dropped: Callable[[list[Kept], str], None],
        may_replay: Callable[[], bool],
        on_kept: Callable[[tuple[bytes, ...]], None] = lambda _: None,
    ) -> None:
        """
        on_due(item, age_s): ask it again, then call `done` or `failed`; age_s: since capture, as far as it is known.
        on_dropped(items, reason): they have ended as lost.
        may_replay(): whether the link has room beside the live requests; asked before each item.
        on_kept(ids): these are on disk now, and outlive a power cut.
        """
        self._settings, self._on_due, self._on_dropped = settings, on_due, on_dropped
        self._may_replay, self._on_kept = may_replay, on_kept
        self._schedule = Schedule(settings.replay_per_s, random.Random())
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._is_open = False
        self._lent: dict[bytes, Kept] = {}  # with the owner, who says how they end
        self._orphans: dict[bytes, Dropped] = {}  # dropped meanwhile: lost only if they fail there
        self._counter: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._poll_at = -inf
        self._is_urgent = False  # something is to be written at the next step
        self.counts = Counts()  # a new value after every step of the thread

    def __enter__(self) -> "Outbox":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Once."""
        self._is_open = True
        self._thread.start()

    def close(self) -> None:
        """What is kept stays on disk for the next run; what no disk took is dropped."""
        self._is_open = False
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def keep(self, item: Kept, *, held: bool = False) -> bool:
        """Take an item over; a second one with its id changes nothing.

        held: not asked again before `failed`, and written without delay: somebody waits for `on_kept`.

        False: not taken, since the outbox is closed or its disk hangs; the caller says that it is lost.
        """
        if not self._is_open or self._inbox.qsize() >= QUEUE:
            return False
        self._inbox.put(partial(self._keep, item, held))
        return True

    def done(self, request_id: bytes) -> None:
        """It has its answer, or its end for another reason; unknown ids are ignored."""
        self._inbox.put(partial(self._done, request_id))

    def failed(self, request_id: bytes) -> None:
        """It found no answer this time: ask again later; unknown ids are ignored."""
        self._inbox.put(partial(self._failed, request_id))

    def _run(self) -> None:
        try:
            self._spool = Spool(
                Path(self._settings.file),
                self._settings.max_bytes,
                self._settings.max_age_s,
                now=time.monotonic(),
                wall=time.time(),
            )
            self._step()
            while self._listen():
                self._step()
            self._close()
        finally:
            self._is_open = False

    def _listen(self) -> bool:
        """Waits for what the owner says, or for the time of the next step. False: the outbox is to end."""
        try:
            message = self._inbox.get(timeout=self._wait_s(time.monotonic()))
            while message is not None:
                message()
                if self._spool.commit_at() == -inf:  # a group is full
                    return True
                message = self._inbox.get_nowait()
        except queue.Empty:
            return True
        return False

    def _close(self) -> None:
        self._spool.close(time.monotonic())
        self._report()
        for request_id in list(self._orphans):
            self._failed(request_id)
        self._publish()

    def _wait_s(self, now: float) -> float:
        replay_at = max(self._schedule.free_at(), self._poll_at) if len(self._spool) else inf
        return min(IDLE_S, max(0.0, min(self._spool.commit_at(), self._spool.expire_at(), replay_at) - now))

    def _step(self) -> None:
        now = time.monotonic()
        if self._spool.expire_at() <= now:
            self._spool.expire(now)
        if self._is_urgent or self._spool.commit_at() <= now:
            self._is_urgent = False
            if ids := self._spool.commit(now):
                self._call(self._on_kept, ids)
        self._report()
        self._replay(now)
        self._publish()

    def _replay(self, now: float) -> None:
        if not len(self._spool) or now < max(self._schedule.free_at(), self._poll_at):
            return
        request_id = self._schedule.take(self._spool.ids(), now) if self._call(self._may_replay) else None
        if request_id is None:
            self._poll_at = now + POLL_S
            return
        item = self._spool.load(request_id)
        if item is None:  # unreadable, now or for ever
            self._schedule.forget(request_id)
            return
        self._lent[request_id] = item
        self._counter["replayed"] += 1
        errors = self._counter["errors"]
        age_s = max(0.0, item.kept - item.captured) + self._spool.age_s(request_id, now)
        self._call(self._on_due, item, age_s)
        if self._counter["errors"] > errors:
            self._failed(request_id)

    def _keep(self, item: Kept, held: bool) -> None:
        request_id = item.request_id
        if request_id in self._lent or not self._spool.keep(item, time.monotonic()):
            return
        self._counter["kept"] += 1
        self._poll_at = -inf
        if held:
            self._lent[request_id] = item
            self._schedule.hold(request_id)
            self._is_urgent = True

    def _done(self, request_id: bytes) -> None:
        self._report()  # while it is known who has what
        self._schedule.forget(request_id)
        was_lent, was_dropped = self._lent.pop(request_id, None), self._orphans.pop(request_id, None)
        self._is_urgent |= was_lent is not None  # its event is out: asked again after a kill, it would come twice
        if self._spool.done(request_id, time.monotonic()) or was_dropped:
            self._counter["answered"] += 1
        elif was_lent:
            self._counter["answered"] += 1
            self._counter["regained"] += 1

    def _failed(self, request_id: bytes) -> None:
        self._report()  # while it is known who has what
        self._schedule.forget(request_id)
        item, dropped = self._lent.pop(request_id, None), self._orphans.pop(request_id, None)
        if dropped:
            self._end([dropped.item], dropped.reason)
        elif tries := self._spool.tried(request_id):
            self._schedule.failed(request_id, tries, time.monotonic())
        elif item:
            self._counter["regained"] += 1
            self._end([item], "lost from a damaged disk")

    def _report(self) -> None:
        """Items that the store gave up have ended, unless the owner still waits for an answer to them."""
        by_reason: dict[str, list[Kept]] = {}
        for dropped in self._spool.take_dropped():
            if dropped.item.request_id in self._lent:
                self._orphans[dropped.item.request_id] = dropped
            else:
                self._schedule.forget(dropped.item.request_id)
                by_reason.setdefault(dropped.reason, []).append(dropped.item)
        for reason, items in by_reason.items():
            self._end(items, reason)

    def _end(self, items: list[Kept], reason: str) -> None:
        logger.info("outbox dropped count=%d reason=%s", len(items), reason)
        self._reasons[reason] += len(items)
        self._call(self._on_dropped, items, reason)

    def _call(self, callback: Callable[..., T], *arguments: object) -> T | None:
        """The owner's mistake must not end the thread."""
        try:
            return callback(*arguments)
        except Exception:
            self._counter["errors"] += 1
            logger.exception("outbox callback raised")
            return None

    def _publish(self) -> None:
        spool = self._spool
        self.counts = Counts(
            found=spool.found,
            kept=self._counter["kept"],
            answered=self._counter["answered"],
            dropped=dict(self._reasons),
            gaps=spool.gaps - self._counter["regained"],  # the owner had what the disk lost
            now=len(spool) + len(self._orphans),
            bytes=spool.bytes,
            replayed=self._counter["replayed"],
            errors=self._counter["errors"],
            is_on_disk=spool.is_on_disk,
            fault=spool.fault,
        )
