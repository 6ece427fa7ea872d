"""When to send a request again: after no reply, after "busy", and out of the outbox. Times are arguments."""

import random
from collections import deque
from math import ceil, inf

SAMPLES = 64  # reply times that the resend interval is made from: some seconds of a busy board
MAX_DOUBLINGS = 16
MAX_UNKNOWN_S = 30.0  # the longest wait for a first reply before a request is sent again
# A server that says "busy" is asked again after at least the first of these times, doubled each time up to the second,
# whatever it says: one that says 1 ms would be asked hundreds of times per second.
MIN_BUSY_S, MAX_BUSY_S = 0.05, 3.2
WINDOW = 4  # retries without a reply: a dead server costs no more than this
FIRST_RETRY_S, LAST_RETRY_S = 5.0, 600.0  # after a retry without a reply; doubled each time


class ResendTimer:
    """How long to wait for a reply before a request is sent again."""

    def __init__(self, min_s: float, rng: random.Random, unknown_share: float = 0.0) -> None:
        """unknown_share: of the time until the deadline, as long as no reply time is known."""
        self._min_s, self._rng, self._unknown_share = min_s, rng, unknown_share
        self._reply_times: deque[float] = deque(maxlen=SAMPLES)
        self.doublings = 0  # that a new request begins with

    def interval(self, doublings: int, left_s: float = 0.0) -> float:
        """Seconds: four times what nearly all replies take, doubled so often, with jitter.

        left_s: until the deadline.
        """
        times = sorted(self._reply_times)
        usual_s = 4 * times[ceil(0.95 * len(times)) - 1] if times else min(self._unknown_share * left_s, MAX_UNKNOWN_S)
        return max(self._min_s, usual_s) * 2.0 ** min(doublings, MAX_DOUBLINGS) * self._rng.uniform(1, 1.5)

    def replied(self, seconds: float | None, doublings: int) -> None:
        """A reply came; seconds: None if the request was sent more than once.

        Then nobody knows which copy was answered, so it is no measurement (Karn's rule, RFC 6298, section 3). But the
        doubled interval stays until a request is answered after a single send (RFC 6298, 5.5 to 5.7). Otherwise replies
        that always take longer than the interval would never be measured, and every request would be sent twice.
        """
        if seconds is not None:
            self._reply_times.append(seconds)
            self.doublings = 0
        else:
            self.doublings = max(self.doublings, doublings)


def busy_wait_s(retry_after_s: float, waits: int, rng: random.Random) -> float:
    """Seconds until a server that asked to come back later is asked again; waits: so far, of this request.

    Later than the server said, never earlier, and not all boards at the same moment.
    """
    least = min(MIN_BUSY_S * 2.0 ** min(waits, MAX_DOUBLINGS), MAX_BUSY_S)
    return max(retry_after_s, least) * rng.uniform(1, 1.5)


class RetryTimer:
    """When kept requests are asked again: some per second, few at a time, each one later after every vain try."""

    def __init__(self, per_s: float, rng: random.Random) -> None:
        self._distance_s, self._rng = 1 / per_s, rng
        self._free_at = -inf
        self._out: set[bytes] = set()

    def free_at(self) -> float:
        """When the next one may be asked; inf while the window is full."""
        return self._free_at if len(self._out) < WINDOW else inf

    def start(self, request_id: bytes, now: float) -> None:
        """One is asked now."""
        self._out.add(request_id)
        self._free_at = now + self._distance_s

    def end(self, request_id: bytes) -> None:
        """It has its reply, or will get none. Unknown ids are ignored."""
        self._out.discard(request_id)

    def delay_s(self, tries: int) -> float:
        """Until a request is asked again that was asked in vain so often, 1 or more.

        With jitter, because requests that failed together would otherwise come back together: Brooker, "Exponential
        Backoff and Jitter", 2015.
        """
        return min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(tries - 1, MAX_DOUBLINGS)) * self._rng.uniform(0.5, 1)
