"""Another server as the target, over the chat completions of OpenAI's API: vLLM, llama.cpp, Ollama, or a hosted one.

It gets the picture as the board sent it and a prompt, and answers with a text. Nothing verifies the text: it is what
that server says. API: https://platform.openai.com/docs/api-reference/chat/create

With `prediction = true` it gets the board's draft as a predicted output, which saves it time where it is right:
https://platform.openai.com/docs/guides/predicted-outputs. A server that refuses a draft gets no more of them.

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

from edge_runtime.errors import AiflowError, ConfigError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import CheckedObject, Usage
from edge_runtime.wire.envelope import MAX_UINT32
from server.accepted import Accepted
from server.answer_schema import AnswerError, AnswerSchema
from server.config import OpenAIConfig
from server.prompts import Prompt, read_prompts
from server.targets import chat
from server.targets.draft_style import DraftStyle
from server.targets.http_call import MAY_BE_BILLED, PERMANENT, TEMPORARY, CallError, Endpoint
from server.targets.recent_pictures import RecentPictures
from server.targets.spending import Spending, next_day
from server.targets.target import Abilities, Answer, Limits, PictureJob, Target, picture_job

logger = logging.getLogger(__name__)

TRIES = 4  # of one request
FIRST_WAIT_S, LAST_WAIT_S = 0.5, 8.0  # at most, before the second try and before later ones
MAX_PAUSE_S = 3600.0  # then one call is tried, whatever Retry-After said
LONG_PAUSE_S = 10.0  # a server that is paused for longer leaves its share
BUSY_RETRY_MS = 1000  # for a board, if nobody says how long
REPLY_S = 1.0  # before the deadline, for the reply's way to the board
MARGIN_S = 5.0  # that a call may take beyond its timeout before it counts as hanging


class DraftError(AiflowError):
    """The other server did not do with a draft what its API promises."""


class OpenAITarget(Target[PictureJob]):
    """`answer` may be called on `config.calls` threads at once; one slow call delays no other."""

    kind = "openai"

    def __init__(
        self,
        url: str,
        config: OpenAIConfig,
        wall_clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
        prompts: Mapping[str, Prompt] | None = None,
        bundle: Bundle | None = None,
    ) -> None:
        """url, config, prompts: checked before, see `Config.check_target`. wall_clock: seconds, Unix time.

        chance: uniform in [0, 1). prompts: by name; None: `door` alone. bundle: whose vocabulary spells the drafts;
        None: drafts are not used. Raises ConfigError for a spent_file that cannot be used.
        """
        self.config, self._url, self._wall_clock, self._chance = config, url, wall_clock, chance
        self._prompts = read_prompts({}) if prompts is None else prompts
        self._bundle, self._style, self._recent = bundle, DraftStyle(), RecentPictures()
        self._shows_several = any(prompt.frames > 1 for prompt in self._prompts.values())
        # Nobody wants a draft of a JSON object. False: the other server does not take drafts, either.
        self._takes_drafts = config.prediction and self._prompts[config.prompt].schema is None
        # More than its tries: two calls with a draft, one to repair an answer.
        call_s = (TRIES + 3) * (config.timeout_s + LAST_WAIT_S) + MARGIN_S
        self.limits = Limits(batch=1, calls=config.calls, call_s=call_s, silent_s=call_s)
        self._endpoint = Endpoint(url, config.ca_file)
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
        return Abilities(
            name=f"{self.kind}:{self._url}",
            verified="none",
            drafts=self._takes_drafts and self._bundle is not None,
            prompts=tuple(sorted(self._prompts)),
        )

    def job(self, accepted: Accepted) -> PictureJob:
        job, options = picture_job(accepted, self._bundle), accepted.request.options
        # To a tier above, all boards of an edge server are one: their cameras cannot be told apart.
        if not self._shows_several or (options and options.via):
            return job
        camera, frames = options.camera if options else "", self._prompt_of(job).frames
        request, board = accepted.request, accepted.arrival.board
        earlier = self._recent.add(board, camera, request.id, job.picture, job.media_type, frames)
        return replace(job, earlier=earlier)

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
            "bundles": {self._bundle.id.hex(): self._bundle.manifest.name} if self._bundle else {},
            "usage": {
                "model": self.config.model,
                "calls": calls,
                "tokens": tokens,
                "cost": self._spending.total,
                "cost_today": self._spending.today(self._wall_clock()),
                "budget_per_day": self.config.budget_per_day,
                "currency": self.config.currency,
            },
        }

    def close(self) -> None:
        self._stop.set()
        self._endpoint.close()

    # ---- one request ----

    def _answer(self, job: PictureJob) -> Answer:
        prompt = self._prompt_of(job)
        asked = chat.messages(prompt, job)
        draft = self._style.apply(job.draft) if self._takes_drafts and prompt.schema is None else ""
        answer = self._try_draft(asked, prompt, job, draft) if draft else None
        answer = answer or self._plain(asked, prompt, job)
        if answer.error or prompt.schema is None:
            self._style.learn(answer.text)
            return answer
        try:
            return _as_object(answer, prompt.schema)
        except AnswerError as error:
            body = self._body(chat.repair(asked, answer.text, str(error)), prompt, job)
            return self._repaired(answer, prompt.schema, body, job.deadline)

    def _try_draft(self, asked: list[chat.Message], prompt: Prompt, job: PictureJob, draft: str) -> Answer | None:
        """The answer by way of the draft; None: ask without one."""
        try:
            return self._with_draft(asked, prompt, job, draft)
        except CallError as error:
            self._count(error.kind)
            wait_s = self._wait_s(error, 1)
            if error.kind in PERMANENT:  # without a draft it may work
                self._refuse_drafts("draft_refused", error)
            elif error.kind not in TEMPORARY:
                return Answer(error=str(error), retry_after_ms=max(BUSY_RETRY_MS, math.ceil(1e3 * wait_s)))
        except DraftError as error:
            self._refuse_drafts("draft_unread", error)
        return None

    def _refuse_drafts(self, what: str, error: AiflowError) -> None:
        self._count(what)
        self._takes_drafts = False
        logger.warning("no more drafts for the other server until this one starts again target=%s why=%s", what, error)

    def _with_draft(self, asked: list[chat.Message], prompt: Prompt, job: PictureJob, draft: str) -> Answer | None:
        """The answer by way of the draft; None: there is none. Raises CallError and DraftError."""
        started = time.monotonic()
        body = self._body(asked, prompt, job, prediction={"type": "content", "content": draft})
        completion, usage = self._paid_call(body, job.deadline)
        return self._answer_of(completion, usage, started)

    def _plain(self, asked: list[chat.Message], prompt: Prompt, job: PictureJob) -> Answer:
        """The answer without a draft."""
        return self._ask(self._body(asked, prompt, job), job.deadline)

    def _answer_of(self, completion: chat.Completion, usage: Usage | None, started: float) -> Answer:
        accepted, rejected = completion.prediction
        return Answer(
            text=completion.text.strip(),
            accepted=accepted,
            proposed=min(accepted + rejected, MAX_UINT32),
            confidence=None,
            stages_ms={"call": 1e3 * (time.monotonic() - started)},
            usage=usage,
        )

    def _ask(self, body: bytes, deadline: float) -> Answer:
        """The first text, after as many tries as it takes."""
        started, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                completion, usage = self._paid_call(body, deadline)
            except CallError as error:
                self._count(error.kind)
                wait_s = self._wait_s(error, tries)
                if error.kind in PERMANENT:
                    return Answer(error=str(error))
                if error.kind not in TEMPORARY or tries == TRIES or not self._wait(wait_s, deadline):
                    return Answer(error=str(error), retry_after_ms=max(BUSY_RETRY_MS, math.ceil(1e3 * wait_s)))
                self._count("retried")
            else:
                return self._answer_of(completion, usage, started)

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
            completion, usage = self._paid_call(body, until)
        except CallError as error:
            self._count(error.kind)
            self._count("invalid")
            return raw
        stages_ms = {**first.stages_ms, "repair": 1e3 * (time.monotonic() - started)}
        raw = replace(raw, stages_ms=stages_ms, usage=added(first.usage, usage))
        try:
            return _as_object(replace(raw, text=completion.text.strip()), schema)
        except AnswerError:
            self._count("invalid")
            return raw

    def _prompt_of(self, job: PictureJob) -> Prompt:
        return self._prompts[job.prompt or self.config.prompt]

    def _limit(self, prompt: Prompt, job: PictureJob) -> int:
        """Of the tokens of a text."""
        limit = prompt.max_tokens or self.config.max_tokens
        return min(limit, job.max_tokens or limit)

    def _body(self, asked: Sequence[chat.Message], prompt: Prompt, job: PictureJob, **more: Any) -> bytes:
        return chat.body(self.config.model, asked, prompt, self._limit(prompt, job), **more)

    def _wait(self, seconds: float, deadline: float) -> bool:
        """False: not so long, since the deadline is sooner, or this server stops."""
        return time.monotonic() + seconds < deadline and not self._stop.wait(max(0.0, seconds))

    def _paid_call(
        self, body: bytes, deadline: float, may_be_empty: bool = False
    ) -> tuple[chat.Completion, Usage | None]:
        """A response, and what it used if the other server says so. may_be_empty: see `chat.read`. Raises CallError."""
        pause_s = self._paused_until - time.monotonic()
        if not self._wait(pause_s, deadline):
            raise CallError("paused", "the other server limits the rate of calls")
        set_aside = self._spending.begin(self._wall_clock())
        if set_aside is None:
            raise CallError("over_budget", "the budget of the day is spent: another server may answer")
        cost = set_aside  # until it is known
        try:
            completion = chat.read(self._call(body, deadline), may_be_empty)
            if counts := completion.counts:
                cost = self.config.cost(counts.prompt_tokens, counts.completion_tokens)
        except CallError as error:
            cost = cost if error.kind in MAY_BE_BILLED else 0.0
            raise
        finally:
            self._spending.end(set_aside, cost, self._wall_clock())
        return completion, self._usage(completion, cost)

    def _call(self, body: bytes, deadline: float) -> bytes:
        """Raises CallError."""
        try:
            key = self.config.key()  # read each time: it may be replaced while the server runs
        except ConfigError as error:
            raise CallError("no_connection", str(error)) from error
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout_s = max(0.001, min(self.config.timeout_s, deadline - time.monotonic()))
        return self._endpoint.post("/chat/completions", body, headers, timeout_s)

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

    def _usage(self, completion: chat.Completion, cost: float) -> Usage | None:
        """Counts an answer, and says what it used."""
        self._count("answered")
        counts, (accepted, rejected) = completion.counts, completion.prediction
        if counts is None:
            self._count("usage_unknown")
            return None
        with self._lock:
            self._tokens["input"] += counts.prompt_tokens
            self._tokens["output"] += counts.completion_tokens
            if accepted or rejected:
                self._tokens["prediction_accepted"] += accepted
                self._tokens["prediction_rejected"] += rejected
        if not (self.config.input_price or self.config.output_price):
            return Usage(counts.prompt_tokens, counts.completion_tokens)
        return Usage(counts.prompt_tokens, counts.completion_tokens, cost, self.config.currency)

    def _count(self, what: str) -> None:
        with self._lock:
            self._calls[what] += 1


def _as_object(answer: Answer, schema: AnswerSchema) -> Answer:
    """The answer with the object alone as its text. Raises AnswerError."""
    return replace(answer, text=schema.object_in(answer.text), checked=CheckedObject(schema.name, valid=True))


def added(one: Usage | None, other: Usage | None) -> Usage | None:
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
