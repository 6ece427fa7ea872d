"""Another server as the target, over the chat completions of OpenAI's API: vLLM, llama.cpp, Ollama, or a hosted one.

It gets the picture as the board sent it and a prompt, and answers with a text. Nothing verifies the text: it is what
that server says. API: https://platform.openai.com/docs/api-reference/chat/create

With `prediction = true` it gets the board's draft as a predicted output, which saves it time where it is right:
https://platform.openai.com/docs/guides/predicted-outputs. A server that refuses a draft gets no more of them.

A call that fails for a while is made again within the request's deadline, after a random time that doubles with each
try. A failure that a further try cannot mend (any other status, a response that is none) is an error at once.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edge_runtime.errors import AiflowError
from edge_runtime.http_call import PERMANENT, TEMPORARY, CallError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import Usage
from edge_runtime.wire.envelope import MAX_UINT32
from server.config import OpenAIConfig
from server.prompts import Prompt
from server.targets import chat
from server.targets.draft_style import DraftStyle
from server.targets.paid_calls import LAST_WAIT_S, PaidCalls
from server.targets.prompted import PromptedTarget
from server.targets.target import Abilities, Answer, Limits, PictureJob

logger = logging.getLogger(__name__)

TRIES = 4  # of one request
BUSY_RETRY_MS = 1000  # for a board, if nobody says how long
REPLY_S = 1.0  # before the deadline, for the reply's way to the board
MARGIN_S = 5.0  # that a call may take beyond its timeout before it counts as hanging


class DraftError(AiflowError):
    """The other server did not do with a draft what its API promises."""


class OpenAITarget(PromptedTarget):
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
        super().__init__(prompts, config.prompt, config.max_tokens, bundle)
        self.config, self._url, self._style = config, url, DraftStyle()
        # Nobody wants a draft of a JSON object. False: the other server does not take drafts, either.
        self._takes_drafts = config.prediction and self._prompts[config.prompt].schema is None
        # More than its tries: two calls with a draft, one to repair an answer.
        call_s = (TRIES + 3) * (config.timeout_s + LAST_WAIT_S) + MARGIN_S
        self.limits = Limits(batch=1, calls=config.calls, call_s=call_s, silent_s=call_s)
        self.calls = PaidCalls(url, config, config.estimate(self._prompts.values()), wall_clock, chance)

    @property
    def abilities(self) -> Abilities:
        return Abilities(
            name=f"{self.kind}:{self._url}",
            verified="none",
            drafts=self._takes_drafts and self._bundle is not None,
            prompts=tuple(sorted(self._prompts)),
        )

    def answer(self, jobs: Sequence[PictureJob]) -> list[Answer]:
        return [self._answer(job) for job in jobs]

    def why_closed(self, now: float) -> str:
        return self.calls.why_closed(now)

    def status(self) -> dict[str, Any]:
        bundles = {self._bundle.id.hex(): self._bundle.manifest.name} if self._bundle else {}
        return {"bundles": bundles, "usage": self.calls.status()}

    def close(self) -> None:
        self.calls.close()

    # ---- one request ----

    def _answer(self, job: PictureJob) -> Answer:
        prompt = self._prompt_of(job)
        asked = chat.messages(prompt, job)
        draft = self._style.apply(job.draft) if self._takes_drafts and prompt.schema is None else ""
        answer = self._try_draft(asked, prompt, job, draft) if draft else None
        answer = answer or self._plain(asked, prompt, job)
        if prompt.schema is None and not answer.error:
            self._style.learn(answer.text)
        return self._checked(job, answer)

    def _try_draft(self, asked: list[chat.Message], prompt: Prompt, job: PictureJob, draft: str) -> Answer | None:
        """The answer by way of the draft; None: ask without one."""
        try:
            return self._with_draft(asked, prompt, job, draft)
        except CallError as error:
            self.calls.count(error.kind)
            wait_s = self.calls.wait_s(error, 1)
            if error.kind in PERMANENT:  # without a draft it may work
                if job.image_tokens is None:  # else these may be what is refused: the next call shows it
                    self._refuse_drafts("draft_refused", error)
            elif error.kind not in TEMPORARY:
                return Answer(error=str(error), retry_after_ms=max(BUSY_RETRY_MS, math.ceil(1e3 * wait_s)))
        except DraftError as error:
            self._refuse_drafts("draft_unread", error)
        return None

    def _refuse_drafts(self, what: str, error: AiflowError) -> None:
        self.calls.count(what)
        self._takes_drafts = False
        logger.warning(
            "no more drafts for the other server until this one starts again target=%s why=%s", self._url, error
        )

    def _with_draft(self, asked: list[chat.Message], prompt: Prompt, job: PictureJob, draft: str) -> Answer | None:
        """The answer by way of the draft; None: there is none. Raises CallError and DraftError."""
        started = time.monotonic()
        body = self._body(asked, job, prediction={"type": "content", "content": draft})
        completion, usage = self.calls.ask(body, job.deadline)
        return self._answer_of(completion, usage, started)

    def _plain(self, asked: list[chat.Message], prompt: Prompt, job: PictureJob) -> Answer:
        """The answer without a draft."""
        return self._ask(self._body(asked, job), job)

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

    def _refused(self, error: CallError, job: PictureJob) -> Answer:
        """The answer after a failure that no further try can mend."""
        return Answer(error=str(error))

    def _ask(self, body: bytes, job: PictureJob) -> Answer:
        """The first text, after as many tries as it takes."""
        started, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                completion, usage = self.calls.ask(body, job.deadline)
            except CallError as error:
                self.calls.count(error.kind)
                wait_s = self.calls.wait_s(error, tries)
                if error.kind in PERMANENT:
                    return self._refused(error, job)
                if error.kind not in TEMPORARY or tries == TRIES or not self.calls.wait(wait_s, job.deadline):
                    return Answer(error=str(error), retry_after_ms=max(BUSY_RETRY_MS, math.ceil(1e3 * wait_s)))
                self.calls.count("retried")
            else:
                return self._answer_of(completion, usage, started)

    def _repair(self, job: PictureJob, text: str, wrong: str, until: float) -> Answer:
        """One call, within the same budget."""
        started = time.monotonic()
        body = self._body(chat.repair(chat.messages(self._prompt_of(job), job), text, wrong), job)
        try:
            return self._answer_of(*self.calls.ask(body, until), started)
        except CallError as error:
            self.calls.count(error.kind)
            return Answer(error=str(error))

    def _count(self, what: str) -> None:
        self.calls.count(what)

    def _body(self, asked: Sequence[chat.Message], job: PictureJob, **more: Any) -> bytes:
        return chat.body(self.config.model, asked, self._prompt_of(job), self._limit(job), **more)
