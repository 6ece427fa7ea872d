"""Predicts how long a request of a given size takes on the link, from the requests that were answered.

The model: t(b) = round_trip * (1 + b / window) for a request of b bytes, where `window` is the number of bytes that fit
into one round trip. All latents have nearly the same size, so they determine t at that size but not the window. Until
requests of another size are answered, the window is only known to lie between two bounds.

After two replies in a row that the model cannot explain, it resets, or restores a known link that fits. An overdue
reply counts at once, not when it arrives. No clock is read: times are seconds of one clock that never steps back.
"""

import statistics
from collections import deque
from dataclasses import dataclass, replace
from math import inf, log, sqrt

MAX_SAMPLES = 9  # of which the latest five of each size count
REFERENCE_BYTES = 512  # links are compared by their time for a request of this size
# Bytes that fit into a round trip: NB-IoT 2 KB, LTE 56 KB. TCP without window scaling never has more than 64 KB in
# flight (RFC 7323, section 1.1).
MIN_WINDOW, LIKELY_WINDOW, MAX_WINDOW = 256.0, 8192.0, 65536.0
SIZE_RATIO = 4.0  # two requests whose sizes differ by this factor determine the window
CHANGE_RATIO = 1.6  # a reply that is slower or faster than predicted by this factor does not fit the model
JITTER_MS = 5.0  # smaller differences always fit
SAME_LINK_RATIO = 1.3  # links whose times differ by less are the same link
MAX_KNOWN_LINKS = 8
LINK_AGE_S = 900.0  # after this time a window must be measured again
NOISE = 0.15  # relative error of one measurement; n measurements of the window reduce it to NOISE / sqrt(n)
MAX_MEASUREMENTS = 16


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """Predicts milliseconds from sending a request to its reply, without the time that servers spend on it."""

    ms: float  # measured for a request of
    at_bytes: float  # this size
    window: float = LIKELY_WINDOW  # bytes that fit into a round trip
    min_window: float = MIN_WINDOW
    max_window: float = MAX_WINDOW

    def likely_ms(self, size: float) -> float:
        """For a request of `size` bytes."""
        return self._ms(size, self.window)

    def best_ms(self, size: float) -> float:
        """The least time that agrees with the measurements."""
        return min(self._ms(size, self.min_window), self._ms(size, self.max_window))

    def worst_ms(self, size: float) -> float:
        """The longest time that agrees with the measurements."""
        return max(self._ms(size, self.min_window), self._ms(size, self.max_window))

    def _ms(self, size: float, window: float) -> float:
        return self.ms * (window + size) / (window + self.at_bytes)


@dataclass(frozen=True, slots=True)
class _KnownLink:
    """A link that was in use before."""

    at: float  # when its window was last measured; if it never was, when the link was last in use
    ms: float  # for a request of REFERENCE_BYTES
    # The mean over `measurements` of how many times longer a request of large_bytes takes than one of small_bytes.
    ratio: float = 1.0
    small_bytes: float = 1.0
    large_bytes: float = 1.0
    measurements: int = 0

    def estimate(self, ms: float, at_bytes: float) -> LinkEstimate:
        """For this time at this size, with this link's window."""
        if not self.measurements:
            return LinkEstimate(ms, at_bytes)
        noise = 1 + NOISE / sqrt(self.measurements)
        return LinkEstimate(
            ms, at_bytes, self._window(self.ratio), self._window(self.ratio * noise), self._window(self.ratio / noise)
        )

    def _window(self, ratio: float) -> float:
        """Solves (window + large_bytes) / (window + small_bytes) = ratio."""
        if ratio <= 1:
            return MAX_WINDOW
        return min(max((self.large_bytes - ratio * self.small_bytes) / (ratio - 1), MIN_WINDOW), MAX_WINDOW)


class LinkModel:
    """Learns from answered and overdue requests."""

    def __init__(self) -> None:
        self.changes = 0.0  # times that another link was detected
        self._samples: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)  # (bytes, ms)
        # The latest sample if it does not fit: 1 too slow or -1 too fast, and the sample.
        self._misfit: tuple[int, tuple[float, float]] | None = None
        self._known: list[_KnownLink] = []
        self._overdue: tuple[float, LinkEstimate] | None = None  # (when sent, the least that the link takes)

    def answered(self, size: float, ms: float, sent_at: float, now: float) -> None:
        """A request of `size` bytes was answered. ms: from its first sending, without the servers' time."""
        self.not_overdue(sent_at)
        estimate, sample = self._estimate(now), (max(size, 1.0), max(ms, 0.1))
        low, high = 0.0, inf
        if estimate:
            low, high = estimate.best_ms(size) / CHANGE_RATIO, estimate.worst_ms(size) * CHANGE_RATIO
        direction = (ms > high + JITTER_MS) - (ms < low - JITTER_MS)
        previous, self._misfit = self._misfit, (direction, sample) if direction else None
        if previous and previous[0] == direction:
            self.changes += 1
            self._samples.clear()
            self._samples.append(previous[1])
            self._misfit = None
        self._samples.append(sample)
        if self._misfit is None:
            self._remember(now)

    def not_overdue(self, sent_at: float) -> None:
        """A request that was sent then was answered, so none of the earlier ones shows how slow the link is."""
        if self._overdue and sent_at >= self._overdue[0]:
            self._overdue = None

    def overdue(self, size: float, sent_at: float, ms: float, now: float) -> None:
        """A request has had no reply for this long, without the time that servers usually take."""
        estimate = self.estimate(now)
        if estimate and ms > CHANGE_RATIO * estimate.worst_ms(size) + 10 * JITTER_MS:
            self._overdue = sent_at, LinkEstimate(ms, size)

    def estimate(self, now: float) -> LinkEstimate | None:
        """None before the first reply."""
        return self._overdue[1] if self._overdue else self._estimate(now)

    def slowest(self, now: float) -> LinkEstimate | None:
        """The slowest of the links that were in use lately."""
        link = max(self._known_lately(now), key=lambda known: known.ms, default=None)
        return link.estimate(link.ms, REFERENCE_BYTES) if link else None

    def _known_lately(self, now: float) -> list[_KnownLink]:
        return [known for known in self._known if now - known.at <= LINK_AGE_S]

    def _medians_by_size(self) -> list[tuple[float, float]]:
        """Median (bytes, ms) of the small requests and of the large ones, if there are both."""
        limit = sqrt(SIZE_RATIO) * min(size for size, _ in self._samples)
        groups = [[s for s in self._samples if (s[0] > limit) == is_large][-5:] for is_large in (False, True)]
        return [(statistics.median(b for b, _ in g), statistics.median(ms for _, ms in g)) for g in groups if g]

    def _estimate(self, now: float) -> LinkEstimate | None:
        if not self._samples:
            return None
        latest = self._samples[-1][0]
        size, ms = min(self._medians_by_size(), key=lambda median: abs(log(median[0] / latest)))  # the size in use
        link = self._matching_link(ms, size, now)
        return link.estimate(ms, size) if link else LinkEstimate(ms, size)

    def _matching_link(self, ms: float, size: float, now: float) -> _KnownLink | None:
        """The known link whose prediction for this size is nearest to this time, if it is near enough."""
        links = self._known_lately(now)
        distances = [abs(log(ms / link.estimate(link.ms, REFERENCE_BYTES).likely_ms(size))) for link in links]
        distance, link = min(zip(distances, links, strict=True), key=lambda pair: pair[0], default=(inf, None))
        return link if distance <= log(SAME_LINK_RATIO) else None

    def _remember(self, now: float) -> None:
        """Adds what the samples say to the known link that they match, or to a new one."""
        medians = self._medians_by_size()
        (small, small_ms), (large, large_ms) = medians[0], medians[-1]
        old = self._matching_link(small_ms, small, now)
        link = replace(old, at=old.at if old.measurements else now) if old else _KnownLink(now, small_ms)
        sizes = [size for size, _ in self._samples]
        # Measure the window only when the size has just changed: later samples of one size add nothing to it.
        if large >= SIZE_RATIO * small and max(sizes[-2:]) >= SIZE_RATIO * min(sizes[-2:]):
            n = min(link.measurements, MAX_MEASUREMENTS)
            ratio = (n * link.ratio + large_ms / small_ms) / (n + 1)
            link = _KnownLink(now, link.ms, ratio, small, large, n + 1)
        link = replace(link, ms=link.estimate(small_ms, small).likely_ms(REFERENCE_BYTES))
        self._known = [*[known for known in self._known if known is not old][1 - MAX_KNOWN_LINKS :], link]
