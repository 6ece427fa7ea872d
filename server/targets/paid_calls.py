"""Calls to another server's chat completions that are counted, paid for, and paused if that server says so.

Knows nothing of prompts, pictures and drafts. A call that is made is one call: who tries again is told for how long to
wait, a random time that doubles with each try, or longer if the other server wants that.
"""

import logging
import math
import random
import statistics
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError
from edge_runtime.http_call import MAY_BE_BILLED, CallError, Endpoint
from edge_runtime.wire import Usage
from server.config import OpenAIConfig
from server.reply_cache import Key
from server.targets import chat
from server.targets.spending import Spending, next_day

logger = logging.getLogger(__name__)

REMEDIES = {
    **dict.fromkeys((301, 302, 307, 308), "write the final address into target"),
    400: "does this model take pictures, max_tokens and temperature?",
    **dict.fromkeys((401, 403), "is the key in key_file right?"),
    404: "does the address end as that server's documentation says, usually in /v1, and is `model` its model's name?",
}

RAISE_DEADLINE = "the model needs longer, raise `deadline_ms` of the board"
FIRST_WAIT_S, LAST_WAIT_S = 0.5, 8.0  # at most, before the second try and before later ones
MAX_PAUSE_S = 3600.0  # then one call is tried, whatever Retry-After said
LONG_PAUSE_S = 10.0  # a server that is paused for longer leaves its share
LONGEST_WAIT_S = LAST_WAIT_S + LONG_PAUSE_S  # of a thread; for a longer pause it would be taken for one that hangs
TRIES = 4  # of one request: of each of its copies, and of those that may have been billed, of all its copies
MAX_REQUESTS = 4096  # whose calls are remembered
DELAYED_S = 30.0  # by so much, copies of one request may be on their way for different times
GIVEN_UP = (
    f"{TRIES} calls for this request may have been billed, so no more are made: see the other server's log, and raise "
    "`timeout_s` in [openai] if they took too long"
)
SHORTEST_CALL_S = 0.05  # no model looks at a picture in less
RECENT, KNOWN = 16, 3  # calls whose times are remembered, and that make a usual time
SLOWER = 1.5  # a call that had to end is taken to need so many times as long
FIRST_TRIAL_S, LAST_TRIAL_S = 30.0, 600.0  # between two calls that are made although they usually take too long
MOST_LEFT = 0.9  # of the most time that such calls had lately
# A gateway has passed the call on and stopped waiting, so the model may answer it, as after a timeout of ours.
GATEWAY_TIMEOUTS = {504, 524}


class BilledCalls:
    """How many calls of each request may have been billed, over all its copies, until its deadline.

    All times are seconds of one clock. Not for several threads at once.
    """

    def __init__(self) -> None:
        self._calls: dict[Key, tuple[int, float]] = {}  # how many, and the deadline; the oldest first

    def add(self, key: Key, deadline: float, now: float) -> None:
        self._calls[key] = self.count(key) + 1, deadline
        self._calls = {key: each for key, each in self._calls.items() if each[1] + DELAYED_S > now}
        if len(self._calls) > MAX_REQUESTS:
            del self._calls[next(iter(self._calls))]

    def count(self, key: Key) -> int:
        return self._calls.get(key, (0, 0.0))[0]


class UsualTime:
    """How long calls of one kind take lately, and whether one more is worth its price.

    All times are seconds of one clock. Not for several threads at once.
    """

    def __init__(self) -> None:
        self._took = deque[float]([], RECENT)
        self._left = deque[float]([], RECENT)  # seconds that doubted calls had
        self._trial_at, self._trial_wait_s = -math.inf, FIRST_TRIAL_S

    def answered(self, took_s: float, was_doubted: bool) -> None:
        """was_doubted: `seconds` was more than the time that the call had: what was known is of another time."""
        if was_doubted:
            self._took.clear()
        if was_doubted or took_s < self.seconds:  # it is faster again
            self._trial_wait_s = FIRST_TRIAL_S
        self._took.append(took_s)

    def timed_out(self, after_s: float) -> None:
        """Nobody knows how long it would have taken."""
        self._took.append(max(self.seconds, SLOWER * after_s))

    @property
    def seconds(self) -> float:
        """The median; 0: too few calls are known."""
        return statistics.median(self._took) if len(self._took) >= KNOWN else 0.0

    def is_trial_due(self, now: float, left_s: float) -> bool:
        """A call may be made although it usually takes too long, since the model may be faster again.

        left_s: for this call. Late copies of requests have little, and would only prove that it is not enough.
        """
        self._left.append(left_s)
        if now < self._trial_at or left_s < MOST_LEFT * max(self._left):
            return False
        self._trial_at = now + self._trial_wait_s
        self._trial_wait_s = min(LAST_TRIAL_S, 2 * self._trial_wait_s)
        return True


class PaidCalls:
    """For any thread."""

    def __init__(
        self,
        url: str,
        config: OpenAIConfig,
        estimate: float,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """estimate: of a call's cost, before there was one. The others: see OpenAITarget. Raises ConfigError."""
        self._config, self._wall_clock = config, wall_clock
        self.endpoint = Endpoint(url, config.ca_file, REMEDIES)
        file = Path(config.spent_file) if config.spent_file else None
        self._spending = Spending(config.budget_per_day, estimate, file)
        self.stop = threading.Event()
        self._lock = threading.Lock()  # over all below
        self._calls: Counter[str] = Counter()  # by what became of them
        self._tokens: Counter[str] = Counter()
        self._paused_until = -math.inf  # seconds, time.monotonic(): until then the other server wants no call
        self._billed = BilledCalls()
        self._usual: defaultdict[str, UsualTime] = defaultdict(UsualTime)  # by what is asked
        self._told: set[str] = set()  # what was wrong with token counts

    def why_closed(self, now: float) -> str:
        """Why no call is made for a while, see `Target.why_closed`."""
        if self._spending.is_spent(wall := self._wall_clock()):
            return f"the budget of the day is spent, the next day begins at {next_day(wall)}"
        if self._paused_until - now > LONG_PAUSE_S:
            return "the other server limits the rate of calls"
        return ""

    def status(self) -> dict[str, Any]:
        """Calls, tokens and cost so far, for the server's status."""
        with self._lock:
            calls, tokens = dict(self._calls), dict(self._tokens)
        return {
            "model": self._config.model,
            "calls": calls,
            "tokens": tokens,
            "cost": self._spending.total,
            "cost_today": self._spending.today(self._wall_clock()),
            "budget_per_day": self._config.budget_per_day,
            "currency": self._config.currency,
        }

    def close(self) -> None:
        """Ends the calls that are being made, and all later ones."""
        self.stop.set()
        self.endpoint.close()

    def wait(self, seconds: float, deadline: float) -> bool:
        """False: not so long, since the deadline is sooner, the pause is long, or this server stops."""
        is_short = seconds <= LONGEST_WAIT_S and time.monotonic() + seconds < deadline
        return is_short and not self.stop.wait(max(0.0, seconds))

    def is_given_up(self, key: Key | None) -> bool:
        """No more calls are made for this request, since too many of them may have been billed."""
        with self._lock:
            return key is not None and self._billed.count(key) >= TRIES

    def ask(
        self, body: bytes, deadline: float, may_be_empty: bool = False, key: Key | None = None, usual: str | None = None
    ) -> tuple[chat.Completion, Usage | None]:
        """A response, and what it used if the other server says so. Raises CallError.

        may_be_empty: see `chat.read`. key: of the request that the call is for; None: of none. usual: a name that all
        calls have which take about as long; None: it is not known.
        """
        if self.is_given_up(key):
            raise CallError("given_up", GIVEN_UP)
        pause_s = self._paused_until - time.monotonic()
        if not self.wait(pause_s, deadline):
            if self.stop.is_set():
                raise CallError("stopped", "this server stops")
            raise CallError("paused", "the other server limits the rate of calls")
        set_aside, is_doubted = self._begin(deadline, usual)
        cost: float | None = None  # until it is known
        is_free = False
        started = time.monotonic()
        try:
            completion = chat.read(self._call(deadline, "/chat/completions", body), may_be_empty)
            took_s = time.monotonic() - started
            if counts := completion.counts:
                cost = self._config.cost(counts.prompt_tokens, counts.completion_tokens)
        except CallError as error:
            is_free = error.kind not in MAY_BE_BILLED and error.status not in GATEWAY_TIMEOUTS
            if error.kind != "timeout":
                raise
            if usual is not None:
                with self._lock:
                    self._usual[usual].timed_out(time.monotonic() - started)
            if key is None or time.monotonic() < deadline:
                raise
            raise CallError("timeout", f"{error}, all that its deadline leaves: {RAISE_DEADLINE}") from error
        finally:
            self._spending.end(set_aside, 0.0 if is_free else cost, self._wall_clock())
            if key is not None and not is_free:
                with self._lock:
                    self._billed.add(key, deadline, time.monotonic())
        if usual is not None:
            with self._lock:
                self._usual[usual].answered(took_s, is_doubted)
        return completion, self._usage(completion, set_aside if cost is None else cost)

    def _begin(self, deadline: float, usual: str | None) -> tuple[float, bool]:
        """What is set aside for a call, and whether it is likely to take too long. Raises CallError if none is made."""
        set_aside = self._spending.begin(self._wall_clock())
        if set_aside is None:
            raise CallError("over_budget", "the budget of the day is spent: another server may answer")
        try:
            return set_aside, self._check_time(deadline, usual)
        except CallError:
            self._spending.end(set_aside, 0.0, self._wall_clock())
            raise

    def _check_time(self, deadline: float, usual: str | None) -> bool:
        """Whether a call is likely to take too long, but is made to find out. Raises CallError if it is not made."""
        now = time.monotonic()
        left_s = deadline - now
        if left_s < SHORTEST_CALL_S:
            raise CallError("too_late", f"{max(0.0, left_s):.1f} s are left for a call: {RAISE_DEADLINE}")
        with self._lock:
            if usual is None or (usual_s := self._usual[usual].seconds) <= left_s:
                return False
            if self._usual[usual].is_trial_due(now, left_s):
                return True
        raise CallError(
            "too_late", f"a call takes {usual_s:.1f} s lately, and {left_s:.1f} s are left: {RAISE_DEADLINE}"
        )

    def is_slow(self, deadline: float, usual: str) -> bool:
        """A call is likely to take longer than the time that is left."""
        with self._lock:
            return self._usual[usual].seconds > deadline - time.monotonic()

    def models(self, deadline: float) -> bytes:
        """The other server's list of its models, which costs nothing. Raises CallError."""
        return self._call(deadline, "/models")

    def _call(self, deadline: float, path: str, body: bytes | None = None) -> bytes:
        """Raises CallError."""
        try:
            key = self._config.key()  # read each time: it may be replaced while the server runs
        except ConfigError as error:
            raise CallError("no_connection", str(error)) from error
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout_s = max(0.001, min(self._config.timeout_s, deadline - time.monotonic()))
        if body is None:
            return self.endpoint.get(path, headers, timeout_s)
        return self.endpoint.post(path, body, headers, timeout_s)

    def wait_s(self, error: CallError, tries: int) -> float:
        """Before the next try. If the other server says how long, all calls wait."""
        # Over the whole interval, since after an outage all calls return together. Brooker, "Exponential Backoff and
        # Jitter", 2015.
        wait_s: float = random.random() * min(LAST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1))
        now, told_s = time.monotonic(), retry_after_s(error.retry_after, self._wall_clock())
        with self._lock:
            if told_s:
                self._paused_until = max(self._paused_until, now + told_s)
            return wait_s + max(0.0, self._paused_until - now)

    def _usage(self, completion: chat.Completion, cost: float) -> Usage | None:
        """Counts an answer, and says what it used."""
        self.count("answered")
        counts, (accepted, rejected) = completion.counts, completion.prediction
        if counts is None:
            self.count("usage_unknown")
            self._tell_once(completion.why_uncounted)
            return None
        with self._lock:
            self._tokens["input"] += counts.prompt_tokens
            self._tokens["output"] += counts.completion_tokens
            if accepted or rejected:
                self._tokens["prediction_accepted"] += accepted
                self._tokens["prediction_rejected"] += rejected
        if not self._config.is_priced:
            return Usage(counts.prompt_tokens, counts.completion_tokens)
        return Usage(counts.prompt_tokens, counts.completion_tokens, cost, self._config.currency)

    def _tell_once(self, why: str) -> None:
        with self._lock:
            is_new = why not in self._told
            self._told.add(why)
        if is_new and self._config.is_priced:
            logger.warning("a call without token counts costs the estimate model=%s why=%s", self._config.model, why)

    def count(self, what: str) -> int:
        """How many there were."""
        with self._lock:
            self._calls[what] += 1
            return self._calls[what]


def retry_after_s(header: str | None, now: float) -> float:
    """The header Retry-After (RFC 9110, 10.2.3: seconds or a date) in seconds from now (Unix time), at most an hour.

    0: there is none, or it makes no sense.
    """
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(0.0, seconds), MAX_PAUSE_S) if math.isfinite(seconds) else 0.0
