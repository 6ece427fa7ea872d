"""What a request's lifecycle asks its caller to do, and what it counts: values only."""

from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from edge_runtime.wire import Reply

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Why:
    """Why a request ended, or was postponed."""

    # For counters: no_reply, busy, unknown_bundle, stale, bad_request, failed, reference_lost (what a server said),
    # full (too many wait already), not_taken (by the broker), no_bytes (in the budget), outbox, stopping.
    code: str
    text: str  # for people


@dataclass(frozen=True, slots=True)
class Send(Generic[T]):
    """Send the request, or send it again. If it cannot leave now, call `on_unsent`."""

    id: bytes
    content: T
    waited_s: float  # since the content was handed over
    left_s: float  # until the deadline
    is_resend: bool  # it left before, in this try. Then send it without a reference to an earlier frame
    is_asked_for: bool = False  # by a server's reply: so a server is there, and has seen the copy before


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """A reply came. If it is not final, a higher tier may still improve it."""

    id: bytes
    content: T
    reply: Reply
    is_first: bool  # of this request's replies
    round_trip_s: float | None  # None: unknown, since the request was sent more than once, or replied to before
    is_unclear: bool = False  # its time says nothing: a resend could not leave, or an earlier try was sent


@dataclass(frozen=True, slots=True)
class Settle(Generic[T]):
    """No better reply comes: the latest one is final after all."""

    id: bytes
    content: T
    why: Why


@dataclass(frozen=True, slots=True)
class Postpone(Generic[T]):
    """No reply in time: the request has gone to the outbox and is asked again later. Once per request."""

    id: bytes
    content: T
    why: Why


@dataclass(frozen=True, slots=True)
class Lose(Generic[T]):
    """The request has ended without an answer."""

    id: bytes
    content: T | None  # None: it was in the outbox only, and the disk has lost it
    why: Why


@dataclass(frozen=True, slots=True)
class Store(Generic[T]):
    """Write the request to the outbox, and call `on_stored` when it is on disk."""

    id: bytes
    content: T


@dataclass(frozen=True, slots=True)
class Read:
    """Read a request from the outbox, then call `on_read`."""

    id: bytes


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a request that has ended from the outbox."""

    id: bytes


Action: TypeAlias = Send[T] | Answer[T] | Settle[T] | Postpone[T] | Lose[T] | Store[T] | Read | Delete


@dataclass(frozen=True, slots=True)
class Found:
    """A request that an earlier run left in the outbox."""

    id: bytes
    size: int  # bytes
    age_s: float  # since it was kept


@dataclass(frozen=True, slots=True)
class Counts:
    """accepted + found = answered + lost + open + kept. The rest explains them."""

    accepted: int = 0  # requests that were submitted
    found: int = 0  # requests that an earlier run left in the outbox
    answered: int = 0
    lost: int = 0
    open: int = 0  # wait for a reply now
    kept: int = 0  # wait in the outbox now
    improvable: int = 0  # of the answered ones: a higher tier may answer once more
    resent: int = 0
    retried: int = 0  # asked again out of the outbox
    busy: int = 0  # replies that asked to come back later
    duplicate: int = 0  # replies to what was answered before
    late: int = 0  # replies to what was lost before
    unknown: int = 0  # replies to nothing that is remembered
    repeated: int = 0  # replies that are not final and bring no new text
