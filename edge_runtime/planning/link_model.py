"""How long a request takes on its way, as the answers tell it.

A request of b bytes takes t(b) = trip * (1 + b / window), where window is the bytes that fit into a round trip. Latents
are all of nearly one size, so they tell t well and window not at all; until requests of another size have been
answered, window lies between bounds. Two answers in a row that the link as known does not explain mean that it is
another link: what was learned is forgotten, unless the new one is an old acquaintance. An answer that is overdue counts
at once, not when it arrives. Reads no clock: times are seconds of one that never steps back.
"""

import statistics
from collections import deque
from dataclasses import dataclass, replace
from math import inf, log, sqrt

RECENT = 9  # answers that are looked at, the latest five of a size are what counts
SMALL = 512  # bytes: the size at which links are compared
# Bytes that fit into a round trip: NB-IoT 2 KB, LTE 56 KB. TCP without window scaling never has more than 64 KB on the
# way (RFC 7323, section 1.1).
WINDOW_LOW, WINDOW_LIKELY, WINDOW_HIGH = 256.0, 8192.0, 65536.0
OTHER_SIZE = 4.0  # times as large: then two requests tell the window
CHANGED = 1.6  # times as long, or as short, as explained
JITTER_MS = 5.0  # differences below it change nothing
SAME_LINK = 1.3  # times: links that differ less are one
LINKS = 8  # acquaintances
LINK_AGE_S = 900.0  # then the window is to be measured again
NOISE = 0.15  # how far one answer may be off; n measurements of the window leave 1/sqrt(n) of it
MAX_MEASURED = 16


@dataclass(frozen=True, slots=True)
class Link:
    """What a request's bytes cost, in ms from send to reply without the servers' share."""

    ms: float  # seen, for
    at_bytes: float  # a request of so many
    window: float = WINDOW_LIKELY  # bytes that fit into a round trip
    low: float = WINDOW_LOW  # the window may be so small,
    high: float = WINDOW_HIGH  # or so large

    def likely_ms(self, size: float) -> float:
        """For a request of so many bytes."""
        return self._ms(size, self.window)

    def best_ms(self, size: float) -> float:
        """The least that what was seen allows."""
        return min(self._ms(size, self.low), self._ms(size, self.high))

    def worst_ms(self, size: float) -> float:
        """The most that what was seen allows."""
        return max(self._ms(size, self.low), self._ms(size, self.high))

    def _ms(self, size: float, window: float) -> float:
        return self.ms * (window + size) / (window + self.at_bytes)


@dataclass(frozen=True, slots=True)
class _Met:
    """A link that was met before."""

    at: float  # when, or when its window was measured
    ms: float  # for a request of SMALL bytes
    small: float = 1.0  # bytes of two requests, where both were seen,
    large: float = 1.0
    ratio: float = 1.0  # and how many times as long the large one took, mean of
    measured: int = 0  # so many

    def link(self, ms: float, at_bytes: float) -> Link:
        """With what is known of the window."""
        if not self.measured:
            return Link(ms, at_bytes)
        noise = 1 + NOISE / sqrt(self.measured)
        window, low, high = (self._window(ratio) for ratio in (self.ratio, self.ratio * noise, self.ratio / noise))
        return Link(ms, at_bytes, window, low, high)

    def _window(self, ratio: float) -> float:
        """Solves (window + large) / (window + small) = ratio."""
        if ratio <= 1:
            return WINDOW_HIGH
        return min(max((self.large - ratio * self.small) / (ratio - 1), WINDOW_LOW), WINDOW_HIGH)


class Network:
    """The link as the answers tell it."""

    def __init__(self) -> None:
        self.changes = 0.0  # of the link
        self._samples: deque[tuple[float, float]] = deque(maxlen=RECENT)  # (bytes, ms)
        # The last sample, if the link as known does not explain it: 1 too long, -1 too short, and its bytes and ms.
        self._odd: tuple[int, tuple[float, float]] | None = None
        self._met: list[_Met] = []
        self._overdue: tuple[float, Link] | None = None  # (when sent, at least)

    def answered(self, size: float, ms: float, sent_at: float, now: float) -> None:
        """A request of so many bytes took so long, without the servers' share; sent again or not: so long it took."""
        if self._overdue and sent_at >= self._overdue[0]:
            self._overdue = None
        link, sample = self._known(now), (max(size, 1.0), max(ms, 0.1))
        low, high = (link.best_ms(size) / CHANGED, link.worst_ms(size) * CHANGED) if link else (0.0, inf)
        direction = (ms > high + JITTER_MS) - (ms < low - JITTER_MS)
        before, self._odd = self._odd, (direction, sample) if direction else None
        if before and before[0] == direction:
            self.changes += 1
            self._samples.clear()
            self._samples.append(before[1])
            self._odd = None
        self._samples.append(sample)
        if self._odd is None:
            self._remember(now)

    def overdue(self, size: float, sent_at: float, ms: float, now: float) -> None:
        """A request has not been answered for so long, without the servers' likely share; or never was."""
        link = self.link(now)
        if link and ms > CHANGED * link.worst_ms(size) + 10 * JITTER_MS:
            self._overdue = sent_at, Link(ms, size)

    def link(self, now: float) -> Link | None:
        """None: no answer yet."""
        return self._overdue[1] if self._overdue else self._known(now)

    def slowest(self, now: float) -> Link | None:
        """Of the links that were met lately."""
        met = max(self._lately(now), key=lambda met: met.ms, default=None)
        return met.link(met.ms, SMALL) if met else None

    def _lately(self, now: float) -> list[_Met]:
        return [met for met in self._met if now - met.at <= LINK_AGE_S]

    def _levels(self) -> list[tuple[float, float]]:
        """Median bytes and ms of the small requests and of the large ones, as far as there are both."""
        edge = sqrt(OTHER_SIZE) * min(size for size, _ in self._samples)
        groups = [[s for s in self._samples if (s[0] > edge) == is_large][-5:] for is_large in (False, True)]
        return [(statistics.median(b for b, _ in g), statistics.median(ms for _, ms in g)) for g in groups if g]

    def _known(self, now: float) -> Link | None:
        if not self._samples:
            return None
        latest = self._samples[-1][0]
        size, ms = min(self._levels(), key=lambda level: abs(log(level[0] / latest)))  # the size in use
        met = self._acquaintance(ms, size, now)
        return met.link(ms, size) if met else Link(ms, size)

    def _acquaintance(self, ms: float, size: float, now: float) -> _Met | None:
        """The link met before that explains best that a request took so long, if one does."""
        distances = [(abs(log(ms / met.link(met.ms, SMALL).likely_ms(size))), met) for met in self._lately(now)]
        distance, met = min(distances, key=lambda pair: pair[0], default=(inf, None))
        return met if distance <= log(SAME_LINK) else None

    def _remember(self, now: float) -> None:
        levels = self._levels()
        (small, small_ms), (large, large_ms) = levels[0], levels[-1]
        old = self._acquaintance(small_ms, small, now)
        met = replace(old, at=old.at if old.measured else now) if old else _Met(now, small_ms)
        sizes = [size for size, _ in self._samples]
        # Measured anew where the size has just changed: a level that is seen for long says no more about the other.
        if large >= OTHER_SIZE * small and max(sizes[-2:]) >= OTHER_SIZE * min(sizes[-2:]):
            n = min(met.measured, MAX_MEASURED)
            ratio = (n * met.ratio + large_ms / small_ms) / (n + 1)
            met = _Met(now, met.ms, small, large, ratio, n + 1)
        met = replace(met, ms=met.link(small_ms, small).likely_ms(SMALL))
        self._met = [*[other for other in self._met if other is not old][1 - LINKS :], met]
