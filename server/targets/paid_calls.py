"""Calls to another server's chat completions that are counted, paid for, and paused if that server says so.

Knows nothing of prompts, pictures and drafts. A call that is made is one call: who tries again is told for how long to
wait, a random time that doubles with each try, or longer if the other server wants that.
"""

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError
from edge_runtime.http_call import MAY_BE_BILLED, CallError, Endpoint
from edge_runtime.wire import Usage
from server.config import OpenAIConfig
from server.targets import chat
from server.targets.spending import Spending, next_day

REMEDIES = {
    **dict.fromkeys((301, 302, 307, 308), "write the final address into target"),
    400: "does this model take pictures, max_tokens and temperature?",
    **dict.fromkeys((401, 403), "is the key in key_file right?"),
    404: "does the address end as that server's documentation says, usually in /v1, and is `model` its model's name?",
}

FIRST_WAIT_S, LAST_WAIT_S = 0.5, 8.0  # at most, before the second try and before later ones
MAX_PAUSE_S = 3600.0  # then one call is tried, whatever Retry-After said
LONG_PAUSE_S = 10.0  # a server that is paused for longer leaves its share
LONGEST_WAIT_S = LAST_WAIT_S + LONG_PAUSE_S  # of a thread; for a longer pause it would be taken for one that hangs


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
        self._lock = threading.Lock()  # over the next three
        self._calls: Counter[str] = Counter()  # by what became of them
        self._tokens: Counter[str] = Counter()
        self._paused_until = -math.inf  # seconds, time.monotonic(): until then the other server wants no call

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

    def ask(self, body: bytes, deadline: float, may_be_empty: bool = False) -> tuple[chat.Completion, Usage | None]:
        """A response, and what it used if the other server says so. may_be_empty: see `chat.read`. Raises CallError."""
        pause_s = self._paused_until - time.monotonic()
        if not self.wait(pause_s, deadline):
            if self.stop.is_set():
                raise CallError("stopped", "this server stops")
            raise CallError("paused", "the other server limits the rate of calls")
        set_aside = self._spending.begin(self._wall_clock())
        if set_aside is None:
            raise CallError("over_budget", "the budget of the day is spent: another server may answer")
        cost = set_aside  # until it is known
        try:
            completion = chat.read(self._call(deadline, "/chat/completions", body), may_be_empty)
            if counts := completion.counts:
                cost = self._config.cost(counts.prompt_tokens, counts.completion_tokens)
        except CallError as error:
            cost = cost if error.kind in MAY_BE_BILLED else 0.0
            raise
        finally:
            self._spending.end(set_aside, cost, self._wall_clock())
        return completion, self._usage(completion, cost)

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
            return None
        with self._lock:
            self._tokens["input"] += counts.prompt_tokens
            self._tokens["output"] += counts.completion_tokens
            if accepted or rejected:
                self._tokens["prediction_accepted"] += accepted
                self._tokens["prediction_rejected"] += rejected
        if not (self._config.input_price or self._config.output_price):
            return Usage(counts.prompt_tokens, counts.completion_tokens)
        return Usage(counts.prompt_tokens, counts.completion_tokens, cost, self._config.currency)

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
