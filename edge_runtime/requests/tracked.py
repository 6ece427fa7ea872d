"""A request of a board, and what is known of its frame: values for tracker.py."""

import time
from dataclasses import dataclass
from math import inf

import msgspec

from edge_runtime.wire import ContentKind, Event, Request, encode_event, encode_request

ROW_BYTES = 64  # of a row beside payload and event


@dataclass(frozen=True, slots=True)
class NewRequest:
    """The request that the path of a frame hands over."""

    request: Request
    payload: (
        bytes  # the encoded request, as it is first sent: its content may have a reference, that of `request` has none
    )
    event: Event  # what the frame's next event starts from
    captured: float  # seconds, time.monotonic()
    deadline: float  # the same clock; without an answer until then, it is lost, or the outbox keeps it
    keep: bool = False  # the link is away: into the outbox at once, not sent
    compact: bytes = b""  # the same request with features instead of its picture, for the outbox


@dataclass(slots=True)
class Tracked:
    """A request and what is known of its frame."""

    request: Request
    payload: bytes  # as it is sent next
    event: Event  # the frame's latest
    captured: float  # seconds, time.monotonic()
    # The same clock: until then, outbox and event of the loss wait for the frame's draft, and the outbox for features.
    draft_until: float = -inf
    compact: bytes = b""  # the same request with features instead of its picture, for the outbox
    is_paid: bool = False  # its bytes are taken from the budget
    sent_at: float | None = None  # seconds, time.monotonic(): first, in this try
    answer: Event | None = None  # that the latest reply is, which a higher tier may improve
    is_retry: bool = False  # out of the outbox
    # Bytes of whole payloads, resends included. `offered` is written by the thread of the requests, the others by that
    # of the MQTT client.
    offered: int = 0  # to the client
    ended: int = 0  # of these, whatever became of them
    delivered: int = 0  # of these, what the broker has acknowledged

    @property
    def may_be_stored(self) -> bool:
        """The outbox takes features only: they show nobody."""
        return bool(self.compact) or self.request.content_kind is ContentKind.LATENT

    def copy_ended(self, size: int, is_delivered: bool) -> None:
        """The client has delivered or given up a copy of `size` bytes."""
        self.delivered += is_delivered * size
        self.ended += size

    def bytes_up(self, is_online: bool) -> int:
        """The bytes that the broker has, or is being sent. Without a connection, nothing is being sent."""
        return self.delivered + (self.offered - self.ended if is_online else 0)


@dataclass(frozen=True, slots=True)
class Row:
    """A request as the outbox stores it."""

    id: bytes  # 8 bytes
    captured: float  # wall clock, seconds since 1970
    kept: float  # the same clock, when it was given to the outbox
    payload: bytes  # the encoded request
    event: bytes  # the frame's event so far, JSON

    @property
    def size(self) -> int:
        """Bytes that count against the limit."""
        return len(self.payload) + len(self.event) + ROW_BYTES


def row_of(tracked: Tracked) -> Row:
    """The part of a request that the outbox stores."""
    captured = tracked.event.captured.timestamp()
    kept = captured + time.monotonic() - tracked.captured  # a wall clock that jumped would make it years old
    payload = tracked.compact or encode_request(tracked.request)  # without a reference: a server soon forgets it
    event = msgspec.structs.replace(tracked.event, bytes_up=tracked.delivered)
    return Row(tracked.request.id, captured, kept, payload, encode_event(event))
