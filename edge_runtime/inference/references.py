"""Which earlier frame a new one may be coded against: the latest of its camera that the server says it has.

Requests and replies are lost, doubled and late, and servers forget. So only a reply makes a frame a reference, and
whatever goes wrong costs bytes, never a wrong answer: the server verifies each reference, and asks for a frame alone if
it does not have it. No clock is read: times are seconds of one clock that never steps back.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.wire import Reply, Status
from edge_runtime.wire.bitstream import KEPT_FRAMES, Reference

WAITING = 64  # frames without a reply yet that are remembered, 3 KB each
QUEUE = 256  # replies between two frames; then the oldest is dropped, and its frame is no reference
SERVERS = 8  # replies that must come from one server: servers of a pool do not share references
MAX_LOSSES, PAUSE_S = 2, 60.0  # after so many lost references in a row, none is used for this time


@dataclass(frozen=True, slots=True, eq=False)
class SentFrame:
    """A frame as it was sent."""

    id: bytes  # of its request
    camera: str
    symbols: NDArray[np.int8]  # [C, H, W]
    level: int
    groups: int
    captured: float  # seconds
    has_reference: bool = False
    number: int = 0  # of all frames that the board has sent


class _Heard(NamedTuple):
    """What a reply says."""

    id: bytes
    is_lost: bool  # the reference, so that the frame is sent alone
    is_reference: bool
    server: str  # that the request came to first


class ReferenceFrames:
    """The references of a board's cameras. For the frame path, except `heard` and `disconnected`."""

    def __init__(self, refresh_s: float = 0.0) -> None:
        """refresh_s: each camera sends a frame alone after at most this time; 0: always."""
        self._refresh_s, self._number, self._losses = refresh_s, 0, 0
        self._inbox: deque[_Heard | None] = deque(maxlen=QUEUE)
        self._waiting: OrderedDict[bytes, SentFrame] = OrderedDict()  # by request
        self._latest: dict[str, SentFrame] = {}  # by camera: those that the server has
        self._alone_at: dict[str, float] = {}  # by camera: when a frame was last sent alone
        self._servers: deque[str] = deque(maxlen=SERVERS)
        self._told_until = b""  # lost references of frames up to this one are known already
        self._paused_until = 0.0

    # ---- any thread ----

    def heard(self, reply: Reply) -> None:
        """A reply, maybe not for the first time."""
        if reply.status in (Status.OK, Status.REFERENCE_LOST):
            is_lost = reply.status is Status.REFERENCE_LOST
            server = reply.hops[0].server if reply.hops else reply.server
            self._inbox.append(_Heard(reply.id, is_lost, reply.is_reference, server))

    def disconnected(self) -> None:
        """After this, another server may answer."""
        self._inbox.append(None)

    # ---- the frame path ----

    def find(self, camera: str, level: int, groups: int, now: float) -> Reference | None:
        """What the camera's next frame may be coded against. None: it is coded alone."""
        while self._inbox:
            self._apply(self._inbox.popleft(), now)
        frame = self._latest.get(camera)
        if frame is None or now < self._paused_until or len(set(self._servers)) > 1:
            return None
        is_kept = self._number - frame.number < KEPT_FRAMES
        is_fresh = now - self._alone_at[camera] < self._refresh_s
        if not (is_kept and is_fresh and (frame.level, frame.groups) == (level, groups)):
            return None
        return Reference(int.from_bytes(frame.id[-2:], "big"), frame.symbols)

    def sent(self, frame: SentFrame) -> None:
        """A frame's request is on its way."""
        self._number += 1
        if not frame.has_reference:
            self._alone_at[frame.camera] = frame.captured
        if self._refresh_s:
            self._waiting[frame.id] = replace(frame, number=self._number)
        if len(self._waiting) > WAITING:
            self._waiting.popitem(last=False)

    def _apply(self, heard: _Heard | None, now: float) -> None:
        if heard is None:
            self._latest.clear()
            self._waiting.clear()
        elif (frame := self._waiting.get(heard.id)) is None:
            return
        elif heard.is_lost:
            self._reference_lost(frame, now)
        else:
            del self._waiting[frame.id]
            self._servers.append(heard.server)
            if frame.has_reference:
                self._losses = 0
            known = self._latest.get(frame.camera)
            if heard.is_reference and (known is None or known.number < frame.number):
                self._latest[frame.camera] = frame

    def _reference_lost(self, frame: SentFrame, now: float) -> None:
        if not frame.has_reference:
            return
        self._waiting[frame.id] = replace(frame, has_reference=False)  # it is sent alone now
        if frame.id <= self._told_until:  # frames that were on their way when the first one was told
            return
        self._latest.clear()
        self._told_until = max(self._waiting)
        self._losses += 1
        if self._losses == MAX_LOSSES:
            self._losses, self._paused_until = 0, now + PAUSE_S
