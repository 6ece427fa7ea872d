"""What a thin link does to a stream of bytes, as a function of times: rate, delay, jitter, a buffer, outages.

Knows no socket and no clock: times come in as seconds of any monotonic clock. A packet waits in the buffer until the
line is free, leaves at the line's rate, and then travels for the delay; nothing overtakes. Loss is not modelled: TCP
hides it from whoever reads the stream, as delay (use jitter) or as a lower rate. Nor are headers: a rate is payload.
"""

import json
import math
import random
from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from edge_runtime.errors import AiflowError

T = TypeVar("T")

MAX_KBIT = 1_000_000
MAX_MS = 60_000
MAX_BUFFER_KB = 16_384
MAX_PACKETS = 16_384  # waiting or travelling, per direction: bounds the memory of links that are both fast and long
MAX_TRACE_LINES = 100_000


class LinkError(AiflowError, ValueError):
    """A profile or a trace that no link can have."""


class Shape(NamedTuple):
    """One direction of a link."""

    rate: float  # bytes/s; 0: nothing passes, neither what waits nor what travels
    delay_s: float  # one way
    jitter_s: float  # added to the delay, uniform from 0 to this
    buffer_bytes: int  # what may wait for the line before the sender is held up


@dataclass(frozen=True)
class Profile:
    """A link, both directions. Raises LinkError for what is out of its range."""

    name: str
    up_kbit: float  # kbit/s (1000 bits), 0 to MAX_KBIT; 0: nothing passes
    down_kbit: float
    rtt_ms: float  # an idle link's round trip, half of it each way; 0 to MAX_MS
    jitter_ms: float = 0.0  # one way, only ever added; 0 to MAX_MS
    # Each way, in 1024 bytes, 1 to MAX_BUFFER_KB. The rate decides what it means: 64 KiB are 0.5 s of 1 Mbit/s and 26 s
    # of 20 kbit/s. Mobile networks do buffer seconds: Jiang et al., "Tackling Bufferbloat in 3G/4G Networks", IMC 2012.
    buffer_kb: int = 64

    def __post_init__(self) -> None:
        limits = {"up_kbit": MAX_KBIT, "down_kbit": MAX_KBIT, "rtt_ms": MAX_MS, "jitter_ms": MAX_MS}
        for field, most in limits.items():
            if not 0 <= getattr(self, field) <= most:  # false for NaN, too
                raise LinkError(f"link {self.name}: {field} = {getattr(self, field)}, want 0 to {most}")
        if not 1 <= self.buffer_kb <= MAX_BUFFER_KB:
            raise LinkError(f"link {self.name}: buffer_kb = {self.buffer_kb}, want 1 to {MAX_BUFFER_KB}")

    @property
    def is_outage(self) -> bool:
        """Nothing passes either way."""
        return self.up_kbit == self.down_kbit == 0

    @property
    def up(self) -> Shape:
        """Towards the target."""
        return self._shape(self.up_kbit)

    @property
    def down(self) -> Shape:
        """Back to who connected."""
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
    """Raises LinkError with the names that there are."""
    if name not in PROFILES:
        raise LinkError(f"no link profile {name!r}, want one of {', '.join(PROFILES)}")
    return PROFILES[name]


class Line(Generic[T]):
    """One direction: packets go in with a time and come out with a later one, in the same order.

    Times must not run backwards from call to call.
    """

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        self._shape = shape
        self._rng = rng
        self._waiting: deque[tuple[int, T]] = deque()
        self._travelling: deque[tuple[float, T]] = deque()  # with the earliest arrival: behind who is ahead
        self._started = 0.0  # when the line began with the rest of the first packet that waits
        self._rest = 0.0  # bytes of that packet that have not left
        self._buffered = 0  # bytes of all packets that wait

    def put(self, now: float, size: int, packet: T) -> None:
        """size: bytes; 0 for a signal that costs no time on the line but keeps its place."""
        self._advance(now)
        if not self._waiting:
            self._started, self._rest = now, size
        self._waiting.append((size, packet))
        self._buffered += size
        self._advance(now)

    def change(self, now: float, shape: Shape) -> None:
        """From now on; what half of a packet took under the old rate, it has taken."""
        self._advance(now)
        if self._waiting:
            self._rest = max(0.0, self._rest - (now - self._started) * self._shape.rate)
            self._started = now
        self._shape = shape

    def clear(self) -> None:
        """Forget what waits and what travels."""
        self._waiting.clear()
        self._travelling.clear()
        self._buffered = 0

    def arrived(self, now: float) -> list[T]:
        """What is at the far end by now and was not asked for yet."""
        self._advance(now)
        packets = []
        while self._shape.rate and self._travelling and self._travelling[0][0] <= now:
            packets.append(self._travelling.popleft()[1])
        return packets

    def is_full(self, now: float) -> bool:
        """True: put nothing in now; a packet that was too large for the rest of the buffer is in it all the same."""
        self._advance(now)
        packets = len(self._waiting) + len(self._travelling)
        return self._buffered >= self._shape.buffer_bytes or packets >= MAX_PACKETS

    @property
    def buffered(self) -> int:
        """Bytes that waited for the line when it was last asked or told something."""
        return self._buffered

    def next_event(self) -> float | None:
        """When a packet leaves or arrives next (past, after an outage); None: not before `put` or `change`."""
        if not self._shape.rate:
            return None
        leaves = self._started + self._rest / self._shape.rate if self._waiting else math.inf
        arrives = self._travelling[0][0] if self._travelling else math.inf
        return None if (event := min(leaves, arrives)) == math.inf else event

    def _advance(self, now: float) -> None:
        rate, delay_s, jitter_s, _ = self._shape
        while rate and self._waiting and (left := self._started + self._rest / rate) <= now:
            size, packet = self._waiting.popleft()
            self._buffered -= size
            self._travelling.append((left + delay_s + self._rng.uniform(0, jitter_s), packet))
            self._started = left
            self._rest = self._waiting[0][0] if self._waiting else 0


def parse_trace(text: str, source: str) -> list[tuple[float, Profile]]:
    """Moments (seconds from the start, ascending from 0) and the profile that holds from each; the last one stays.

    One moment a line, `20<TAB>lte-m` or `{"seconds": 20, "profile": "lte-m"}`; empty lines and lines that begin with #
    are skipped. source: the name for errors. Raises LinkError with source, line and what is wanted.
    """
    trace: list[tuple[float, Profile]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if number > MAX_TRACE_LINES:
            raise LinkError(f"{source}: more than {MAX_TRACE_LINES} lines, want fewer: cut the trace")
        if not line.strip() or line.startswith("#"):
            continue
        try:
            seconds, profile = _moment(line)
            if trace and seconds <= trace[-1][0]:
                raise LinkError(f"seconds = {seconds:g} after {trace[-1][0]:g}, want ascending times")
            if not trace and seconds != 0:
                raise LinkError(f"seconds = {seconds:g} first, want 0: they count from the start of the trace")
        except LinkError as error:
            raise LinkError(f"{source}, line {number}: {error}") from None
        trace.append((seconds, profile))
    if not trace:
        raise LinkError(f"{source}: no line, want lines such as 0<TAB>wifi")
    return trace


def _moment(line: str) -> tuple[float, Profile]:
    wanted = LinkError(f'{line[:60]!r}, want seconds<TAB>profile or {{"seconds": 20, "profile": "lte-m"}}')
    if not line.lstrip().startswith("{"):
        seconds, _, name = line.partition("\t")
        try:
            return _seconds(float(seconds)), named(name.strip())
        except ValueError as error:
            raise error if isinstance(error, LinkError) else wanted from None
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise wanted from None
    match record:
        case {"seconds": int() | float() as at, "profile": str() as name, **rest} if not rest:
            return _seconds(at), named(name)
    raise wanted


def _seconds(value: float) -> float:
    if not 0 <= value <= 1e9:
        raise LinkError(f"seconds = {value}, want 0 to 1e9")
    return float(value)
