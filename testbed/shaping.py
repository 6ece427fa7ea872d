"""What a thin link does to a stream of bytes, as a function of time: rate, delay, jitter, a buffer, outages.

This file has no sockets and no clock: times are arguments, in seconds of any monotonic clock. A packet waits in the
buffer until the line is free, leaves at the line's rate, and then travels for the delay, in order. Loss is not
modelled: TCP turns it into delay (use jitter) or into a lower rate. Rates count payload without packet headers.
"""

import math
import random
from collections import deque
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from edge_runtime.errors import AiflowError

T = TypeVar("T")

MAX_KBIT = 1_000_000
MAX_MS = 60_000
MAX_BUFFER_KB = 16_384
MAX_PACKETS = 16_384  # waiting or travelling, per direction: bounds the memory of fast links with a long delay


class LinkError(AiflowError, ValueError):
    """A profile or a trace that is out of range."""


class Shape(NamedTuple):
    """One direction of a link."""

    rate: float  # bytes/s; 0: nothing arrives, not even what is already travelling
    delay_s: float  # one way
    jitter_s: float  # added to the delay, uniform from 0 to this
    buffer_bytes: int  # how much may wait for the line before the sender blocks


@dataclass(frozen=True)
class Profile:
    """A link in both directions. Raises LinkError for values out of range."""

    name: str
    up_kbit: float  # kbit/s (1000 bits), 0 to MAX_KBIT; 0: nothing passes
    down_kbit: float
    rtt_ms: float  # round trip of the idle link, half of it each way; 0 to MAX_MS
    jitter_ms: float = 0.0  # additional delay one way; 0 to MAX_MS
    # Each way, in KiB, 1 to MAX_BUFFER_KB. 64 KiB take 0.5 s at 1 Mbit/s and 26 s at 20 kbit/s. Mobile networks really
    # buffer that long: Jiang et al., "Tackling Bufferbloat in 3G/4G Networks", IMC 2012.
    buffer_kb: int = 64

    def __post_init__(self) -> None:
        limits = {"up_kbit": MAX_KBIT, "down_kbit": MAX_KBIT, "rtt_ms": MAX_MS, "jitter_ms": MAX_MS}
        for field, most in limits.items():
            if not 0 <= getattr(self, field) <= most:  # also refuses NaN
                raise LinkError(f"link {self.name}: {field} = {getattr(self, field)}, want 0 to {most}")
        if not 1 <= self.buffer_kb <= MAX_BUFFER_KB:
            raise LinkError(f"link {self.name}: buffer_kb = {self.buffer_kb}, want 1 to {MAX_BUFFER_KB}")

    @property
    def is_outage(self) -> bool:
        return self.up_kbit == self.down_kbit == 0

    @property
    def up(self) -> Shape:
        return self._shape(self.up_kbit)

    @property
    def down(self) -> Shape:
        return self._shape(self.down_kbit)

    def _shape(self, kbit: float) -> Shape:
        return Shape(kbit * 125, self.rtt_ms / 2000, self.jitter_ms / 1000, self.buffer_kb * 1024)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("nb-iot", 20, 20, 800),
        Profile("lte-m", 200, 200, 150),
        Profile("3g", 1_000, 1_000, 90),
        Profile("4g", 10_000, 10_000, 45, buffer_kb=256),
        Profile("wifi", 50_000, 50_000, 5, buffer_kb=256),
        Profile("outage", 0, 0, 0),
    )
}


def named(name: str) -> Profile:
    """The profile of this name. Raises LinkError with the known names."""
    if name not in PROFILES:
        raise LinkError(f"no link profile {name!r}, want one of {', '.join(PROFILES)}")
    return PROFILES[name]


class Line(Generic[T]):
    """One direction: packets go in at a time and come out at a later time, in the same order.

    Times must not go backwards from call to call.
    """

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        self._shape = shape
        self._rng = rng
        self._waiting: deque[tuple[int, T]] = deque()
        self._travelling: deque[tuple[float, T]] = deque()  # with its earliest arrival; packets keep their order
        self._started = 0.0  # when the line began to send the rest of the first waiting packet
        self._rest = 0.0  # bytes of that packet that are not sent yet
        self.buffered = 0  # bytes of all waiting packets

    def put(self, now: float, size: int, packet: T) -> None:
        """size: bytes; 0 for a signal that takes no time on the line but keeps its place in the order."""
        self._advance(now)
        if not self._waiting:
            self._started, self._rest = now, size
        self._waiting.append((size, packet))
        self.buffered += size
        self._advance(now)

    def change(self, now: float, shape: Shape) -> None:
        """Changes the link from now on. The bytes that were sent at the old rate stay sent."""
        self._advance(now)
        if self._waiting:
            self._rest = max(0.0, self._rest - (now - self._started) * self._shape.rate)
            self._started = now
        self._shape = shape

    def clear(self) -> None:
        self._waiting.clear()
        self._travelling.clear()
        self.buffered = 0

    def arrived(self, now: float) -> list[T]:
        """Removes and returns the packets that have arrived by now."""
        self._advance(now)
        packets = []
        while self._shape.rate and self._travelling and self._travelling[0][0] <= now:
            packets.append(self._travelling.popleft()[1])
        return packets

    def is_full(self, now: float) -> bool:
        """True if nothing may be put in now. One packet may exceed the buffer's size."""
        self._advance(now)
        packets = len(self._waiting) + len(self._travelling)
        return self.buffered >= self._shape.buffer_bytes or packets >= MAX_PACKETS

    def next_event(self) -> float | None:
        """When the next packet leaves or arrives (may be past after an outage). None: nothing before the next call."""
        if not self._shape.rate:
            return None
        leaves = self._started + self._rest / self._shape.rate if self._waiting else math.inf
        arrives = self._travelling[0][0] if self._travelling else math.inf
        return None if (event := min(leaves, arrives)) == math.inf else event

    def _advance(self, now: float) -> None:
        rate, delay_s, jitter_s, _ = self._shape
        while rate and self._waiting and (left := self._started + self._rest / rate) <= now:
            size, packet = self._waiting.popleft()
            self.buffered -= size
            self._travelling.append((left + delay_s + self._rng.uniform(0, jitter_s), packet))
            self._started = left
            self._rest = self._waiting[0][0] if self._waiting else 0


def parse_trace(text: str, source: str) -> list[tuple[float, Profile]]:
    """Times (seconds from the start, ascending from 0), each with the profile from then on; the last one stays.

    A line is `20<TAB>lte-m`. Empty lines and lines that begin with # are skipped. source: the file's name in errors.
    Raises LinkError with source, line and what is wanted.
    """
    trace: list[tuple[float, Profile]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            seconds, profile = _parse_line(line)
            if trace and seconds <= trace[-1][0]:
                raise LinkError(f"seconds = {seconds:g} after {trace[-1][0]:g}, want ascending times")
            if not trace and seconds != 0:
                raise LinkError(f"seconds = {seconds:g} first, want 0: times count from the start of the trace")
        except LinkError as error:
            raise LinkError(f"{source}, line {number}: {error}") from None
        trace.append((seconds, profile))
    if not trace:
        raise LinkError(f"{source}: no lines, want lines such as 0<TAB>wifi")
    return trace


def _parse_line(line: str) -> tuple[float, Profile]:
    time, _, name = line.partition("\t")
    try:
        seconds = float(time)
    except ValueError:
        raise LinkError(f"{line[:60]!r}, want seconds<TAB>profile") from None
    if not 0 <= seconds <= 1e9:
        raise LinkError(f"seconds = {seconds}, want 0 to 1e9")
    return seconds, named(name.strip())
