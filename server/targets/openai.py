"""Another server as the target, over the chat completions of OpenAI's API: vLLM, llama.cpp, Ollama, or a hosted one.

It gets the picture as the board sent it and a prompt, and answers with a text. It sees no draft, so nothing verifies
the text: it is what that server says. API: https://platform.openai.com/docs/api-reference/chat/create

A call that fails for a while is made again within the request's deadline, after a random time that doubles with each
try. What does not get better (any other status, a response that is none) is an error at once.

If the prompt has a schema, the answer is checked here, whatever the other server promises. An answer that does not
match goes back once with what is wrong, within the same deadline and budget.
"""

import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError
from edge_runtime.http_call import MAY_BE_BILLED, PERMANENT, TEMPORARY, CallError, Endpoint
from edge_runtime.wire import CheckedObject, Usage
from edge_runtime.wire.envelope import MAX_UINT32
from server.accepted import Accepted
from server.answer_schema import AnswerError, AnswerSchema
from server.config import OpenAIConfig
from server.prompts import Prompt, read_prompts
from server.targets import chat
from server.targets.spending import Spending, next_day
from server.targets.target import Abilities, Answer, Limits, PictureJob, Target, picture_job

logger = logging.getLogger(__name__)

REMEDIES = {
    **dict.fromkeys((301, 302, 307, 308), "write the final address into target"),
    400: "does this model take pictures, max_tokens and temperature?",
    **dict.fromkeys((401, 403), "is the key in key_file right?"),
    404: "does the address end as that server's documentation says, usually in /v1, and is `model` its model's name?",
}

TRIES = 4  # of one request
FIRST_WAIT_S, LAST_WAIT_S = 0.5, 8.0  # at most, before the second try and before later ones
MAX_PAUSE_S = 3600.0  # then one call is tried, whatever Retry-After said
LONG_PAUSE_S = 10.0  # a server that is paused for longer leaves its share
BUSY_RETRY_MS = 1000  # for a board, if nobody says how long
REPLY_S = 1.0  # before the deadline, for the reply's way to the board
MARGIN_S = 5.0  # that a call may take beyond its timeout before it counts as hanging


class OpenAITarget(Target[PictureJob]):
    """`answer` may be called on `config.calls` threads at once; one slow call delays no other."""

    def __init__(
        self,
        url: str,
        config: OpenAIConfig,
        wall_clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
        prompts: Mapping[str, Prompt] | None = None,
    ) -> None:
        """url, config, prompts: checked before, see `Config.check_target`. wall_clock: seconds, Unix time.

        chance: uniform in [0, 1). prompts: by name; None: `door` alone. Raises ConfigError for a spent_file that cannot
        be used.
        """
        self.config, self._url, self._wall_clock, self._chance = config, url, wall_clock, chance
        self._prompts = read_prompts({}) if prompts is None else prompts
        call_s = (TRIES + 1) * (config.timeout_s + LAST_WAIT_S) + MARGIN_S  # one more, to repair an answer
        self.limits = Limits(batch=1, calls=config.calls, call_s=call_s, silent_s=call_s)
        self._endpoint = Endpoint(url, config.ca_file, REMEDIES)
        file = Path(config.spent_file) if config.spent_file else None
        estimate = config.estimate(self._prompts.values())
        self._spending = Spending(config.budget_per_day, estimate, file)
        self._stop = threading.Event()
        self._lock = threading.Lock()  # over the next three
        self._calls: Counter[str] = Counter()  # by what became of them
        self._tokens: Counter[str] = Counter()
        self._paused_until = -math.inf  # seconds, time.monotonic(): until then the other server wants no call

    @property
    def abilities(self) -> Abilities:
        return Abilities(name=f"openai:{self._url}", verified="none", prompts=tuple(sorted(self._prompts)))

    def job(self, accepted: Accepted) -> PictureJob:
        return picture_job(accepted)

    def answer(self, jobs: Sequence[PictureJob]) -> list[Answer]:
        return [self._answer(job) for job in jobs]

    def why_closed(self, now: float) -> str:
        if self._spending.is_spent(wall := self._wall_clock()):
            return f"the budget of the day is spent, the next day begins at {next_day(wall)}"
        if self._paused_until - now > LONG_PAUSE_S:
            return "the other server limits the rate of calls"
        return ""

    def status(self) -> dict[str, Any]:
        with self._lock:
            calls, tokens = dict(self._calls), dict(self._tokens)
        return {
            "usage": {
                "model": self.config.model,
                "calls": calls,
                "tokens": tokens,
                "cost": self._spending.total,
                "cost_today": self._spending.today(self._wall_clock()),
                "budget_per_day": self.config.budget_per_day,
                "currency": self.config.currency,
            }
        }

    def close(self) -> None:
        self._stop.set()
        self._endpoint.close()

    # ---- one request ----

    def _answer(self, job: PictureJob) -> Answer:
        prompt = self._prompts[job.prompt or self.config.prompt]
        asked = chat.messages(prompt, job)
        answer = self._ask(self._body(asked, prompt, job), job.deadline)
        if answer.error or prompt.schema is None:
            return answer
        try:
            return _as_object(answer, prompt.schema)
        except AnswerError as error:
            body = self._body(chat.repair(asked, answer.text, str(error)), prompt, job)
            return self._repaired(answer, prompt.schema, body, job.deadline)

    def _ask(self, body: bytes, deadline: float) -> Answer:
        """The first text, after as many tries as it takes."""
        started, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                text, usage = self._paid_call(body, deadline)
            except CallError as error:
                self._count(error.kind)
                wait_s = self._wait_s(error, tries)
                if error.kind in PERMANENT:
                    return Answer(error=str(error))
                if error.kind not in TEMPORARY or tries == TRIES or not self._wait(wait_s, deadline):
                    return Answer(error=str(error), retry_after_ms=max(BUSY_RETRY_MS, math.ceil(1e3 * wait_s)))
                self._count("retried")
            else:
                stages_ms = {"call": 1e3 * (time.monotonic() - started)}
                return Answer(text=text, confidence=None, stages_ms=stages_ms, usage=usage)

    def _repaired(self, first: Answer, schema: AnswerSchema, body: bytes, deadline: float) -> Answer:
        """The answer to one more call, or the first text as it is. body: of that call."""
        raw = replace(first, checked=CheckedObject(schema.name, valid=False))
        started, until = time.monotonic(), deadline - REPLY_S
        # The second call is likely to take as long as the first. One that has no time is paid for in vain.
        if started + first.stages_ms["call"] / 1e3 >= until:
            self._count("invalid")
            return raw
        self._count("repair")
        try:
            text, usage = self._paid_call(body, until)
        except CallError as error:
            self._count(error.kind)
            self._count("invalid")
            return raw
        stages_ms = {**first.stages_ms, "repair": 1e3 * (time.monotonic() - started)}
        raw = replace(raw, stages_ms=stages_ms, usage=_sum(first.usage, usage))
        try:
            return _as_object(replace(raw, text=text), schema)
        except AnswerError:
            self._count("invalid")
            return raw

    def _body(self, asked: Sequence[chat.Message], prompt: Prompt, job: PictureJob) -> bytes:
        limit = prompt.max_tokens or self.config.max_tokens
        return chat.body(self.config.model, asked, prompt, min(limit, job.max_tokens or limit))

    def _wait(self, seconds: float, deadline: float) -> bool:
        """False: not so long, since the deadline is sooner, or this server stops."""
        return time.monotonic() + seconds < deadline and not self._stop.wait(max(0.0, seconds))

    def _paid_call(self, body: bytes, deadline: float) -> tuple[str, Usage | None]:
        """The text, and what it used if the other server says so. Raises CallError."""
        pause_s = self._paused_until - time.monotonic()
        if not self._wait(pause_s, deadline):
            raise CallError("paused", "the other server limits the rate of calls")
        set_aside = self._spending.begin(self._wall_clock())
        if set_aside is None:
            raise CallError("over_budget", "the budget of the day is spent: another server may answer")
        cost = set_aside  # until it is known
        try:
            text, counts = self._call(body, deadline)
            if counts:
                cost = self.config.cost(counts.prompt_tokens, counts.completion_tokens)
        except CallError as error:
            cost = cost if error.kind in MAY_BE_BILLED else 0.0
            raise
        finally:
            self._spending.end(set_aside, cost, self._wall_clock())
        return text, self._usage(counts, cost)

    def _call(self, body: bytes, deadline: float) -> tuple[str, chat.TokenCounts | None]:
        """The text, and its tokens if the other server counts them. Raises CallError."""
        try:
            key = self.config.key()  # read each time: it may be replaced while the server runs
        except ConfigError as error:
            raise CallError("no_connection", str(error)) from error
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout_s = max(0.001, min(self.config.timeout_s, deadline - time.monotonic()))
        return chat.read(self._endpoint.post("/chat/completions", body, headers, timeout_s))

    def _wait_s(self, error: CallError, tries: int) -> float:
        """Before the next try. If the other server says how long, all calls wait."""
        # Over the whole interval, since after an outage all calls return together. Brooker, "Exponential Backoff and
        # Jitter", 2015.
        wait_s: float = self._chance() * min(LAST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1))
        now, told_s = time.monotonic(), retry_after_s(error.retry_after, self._wall_clock())
        with self._lock:
            if told_s:
                self._paused_until = max(self._paused_until, now + told_s)
            return wait_s + max(0.0, self._paused_until - now)

    def _usage(self, counts: chat.TokenCounts | None, cost: float) -> Usage | None:
        """Counts an answer, and says what it used."""
        self._count("answered")
        if counts is None:
            self._count("usage_unknown")
            return None
        with self._lock:
            self._tokens["input"] += counts.prompt_tokens
            self._tokens["output"] += counts.completion_tokens
        if not (self.config.input_price or self.config.output_price):
            return Usage(counts.prompt_tokens, counts.completion_tokens)
        return Usage(counts.prompt_tokens, counts.completion_tokens, cost, self.config.currency)

    def _count(self, what: str) -> None:
        with self._lock:
            self._calls[what] += 1


def _as_object(answer: Answer, schema: AnswerSchema) -> Answer:
    """The answer with the object alone as its text. Raises AnswerError."""
    return replace(answer, text=schema.object_in(answer.text), checked=CheckedObject(schema.name, valid=True))


def _sum(one: Usage | None, other: Usage | None) -> Usage | None:
    """What two calls used; None: one of them did not say."""
    if one is None or other is None:
        return None
    cost = None if one.cost is None or other.cost is None else one.cost + other.cost
    inputs, outputs = one.input_tokens + other.input_tokens, one.output_tokens + other.output_tokens
    return Usage(min(inputs, MAX_UINT32), min(outputs, MAX_UINT32), cost, one.currency)


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
