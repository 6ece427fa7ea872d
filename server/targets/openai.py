"""Another server as the target, over the chat completions of OpenAI's API: vLLM, llama.cpp, Ollama, or a hosted one.

It gets the picture as the board sent it and a prompt, and answers with a text. Nothing verifies the text: it is what
that server says. API: https://platform.openai.com/docs/api-reference/chat/create

With `prediction = true` it gets the board's draft as a predicted output, which saves it time where it is right:
https://platform.openai.com/docs/guides/predicted-outputs. A server that refuses a draft gets none for a while.

A call that fails for a while is made again within the request's deadline, after a random time that doubles with each
try. A failure that a further try cannot mend (any other status, a response that is none) is an error at once. After
TRIES calls that may have been billed, the request has failed, whatever copies of it come: each copy would be paid anew.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from edge_runtime.errors import AiflowError
from edge_runtime.http_call import PERMANENT, TEMPORARY, CallError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.logs import is_told, printable
from edge_runtime.wire import Usage
from edge_runtime.wire.envelope import MAX_UINT32
from server.config import OpenAIConfig
from server.prompts import Prompt
from server.targets import chat
from server.targets.acceptance import Acceptance
from server.targets.draft_style import DraftStyle
from server.targets.paid_calls import GIVEN_UP, LONGEST_WAIT_S, TRIES, PaidCalls
from server.targets.prompted import REPLY_S, PromptedTarget
from server.targets.target import Abilities, Answer, Limits, PictureJob

logger = logging.getLogger(__name__)

BUSY_RETRY_MS = 1000  # for a board, if nobody says how long
UNAUTHORIZED = 401  # the key is wrong; 403 may be about the draft alone
MAX_WHY = 256  # characters, of a reason in the status
MARGIN_S = 5.0  # that a call may take beyond its timeout before it counts as hanging


class DraftError(AiflowError):
    """The other server did not do with a draft what its API promises."""


def draft_fault(error: AiflowError) -> str:
    """As what a draft counts that was of no use."""
    return "draft_unread" if isinstance(error, DraftError) else "draft_refused"


class OpenAITarget(PromptedTarget):
    """`answer` may be called on `config.calls` threads at once; one slow call delays no other."""

    kind = "openai"

    def __init__(
        self,
        url: str,
        config: OpenAIConfig,
        wall_clock: Callable[[], float] = time.time,
        prompts: Mapping[str, Prompt] | None = None,
        bundle: Bundle | None = None,
    ) -> None:
        """url, config, prompts: checked before, see `Config.check_target`. wall_clock: seconds, Unix time.

        prompts: by name; None: `door` alone. bundle: whose vocabulary spells the drafts; None: drafts are not used.
        Raises ConfigError for a spent_file that cannot be used.
        """
        super().__init__(prompts, config.prompt, config.max_tokens, bundle)
        self.config, self._url, self._style = config, url, DraftStyle()
        # Nobody wants a draft of a JSON object.
        self._may_send_drafts = bundle is not None and self._prompts[config.prompt].schema is None
        self._drafts = Acceptance(is_taken=config.prediction and self._may_send_drafts)
        # More than its tries: two calls with a draft, one to repair an answer.
        call_s = (TRIES + 3) * (config.timeout_s + LONGEST_WAIT_S) + MARGIN_S
        self.limits = Limits(batch=1, calls=config.calls, call_s=call_s, silent_s=call_s)
        self.calls = PaidCalls(url, config, config.estimate(self._prompts.values()), wall_clock)

    @property
    def abilities(self) -> Abilities:
        takes_drafts, why = self._takes_drafts, self._drafts.in_words()
        return Abilities(
            name=f"{self.kind}:{self._url}",
            verified="none",
            drafts=takes_drafts,
            prompts=tuple(sorted(self._prompts)),
            max_tokens=self._longest,
            refused={"drafts": why} if why and not takes_drafts else {},
        )

    @property
    def _takes_drafts(self) -> bool:
        """A draft that was refused a while ago is tried again with the next request."""
        drafts = self._drafts
        return drafts.is_taken or (bool(drafts.why) and drafts.due <= time.monotonic())

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
        prompt, whole = self._prompt_of(job), job
        job = replace(job, deadline=job.deadline - REPLY_S)  # of its calls
        asked = chat.messages(prompt, job)
        # A draft is a call of its own for some servers, and its answer may come too late as well.
        may_draft = self._takes_drafts and prompt.schema is None and not self._is_slow(job)
        draft = self._style.apply(job.draft) if may_draft else ""
        answer, refusal = self._try_draft(asked, prompt, job, draft) if draft else (None, None)
        answer = answer or self._plain(asked, prompt, job)
        if refusal and not answer.error:  # else it may be the request that is refused, whatever its draft
            self._draft_failed(refusal)
        if prompt.schema is None and not answer.error:
            self._style.learn(answer.text)
        return self._checked(whole, answer)

    def _try_draft(
        self, asked: list[chat.Message], prompt: Prompt, job: PictureJob, draft: str
    ) -> tuple[Answer | None, AiflowError | None]:
        """The answer by way of the draft; None: ask without one. Also what may say that drafts are not taken."""
        try:
            answer = self._with_draft(asked, prompt, job, draft)
        except CallError as error:
            self.calls.count(error.kind)
            wait_s = self.calls.wait_s(error, 1)
            if error.status == UNAUTHORIZED:  # whatever the request is
                return self._refused(error, job), None
            if error.kind in PERMANENT:  # without a draft it may work
                return None, error
            if error.kind in TEMPORARY:
                return None, None
            return self._unanswered(error, job, wait_s), None
        except DraftError as error:
            return None, error
        return answer, None

    def _is_slow(self, job: PictureJob) -> bool:
        return self.calls.is_slow(job.deadline, job.prompt or self._usual)

    def _draft_failed(self, error: AiflowError) -> None:
        """A request was answered only without its draft."""
        self._refuse_drafts(error)

    def _refuse_drafts(self, error: AiflowError) -> None:
        self.calls.count(draft_fault(error))
        self._refuse(self._drafts, "the other server gets no drafts", error)

    def _refuse(self, acceptance: Acceptance, words: str, error: AiflowError, may_crash: bool = False) -> None:
        """words: for the log, what follows."""
        if acceptance.refused(printable(str(error), MAX_WHY), time.monotonic(), may_crash):
            logger.warning("%s target=%s why=%s", words, self._url, acceptance.in_words())

    def _with_draft(self, asked: list[chat.Message], prompt: Prompt, job: PictureJob, draft: str) -> Answer | None:
        """The answer by way of the draft; None: there is none. Raises CallError and DraftError."""
        started = time.monotonic()
        body = self._body(asked, job, prediction={"type": "content", "content": draft})
        completion, usage = self.calls.ask(body, job.deadline, key=job.key, usual=job.prompt or self._usual)
        if not self._drafts.is_taken:
            self._drafts.taken(time.monotonic())
        return self._answer_of(completion, usage, started)

    def _plain(self, asked: list[chat.Message], prompt: Prompt, job: PictureJob) -> Answer:
        """The answer without a draft."""
        return self._ask(self._body(asked, job), job)

    def _answer_of(self, completion: chat.Completion, usage: Usage | None, started: float, begun: str = "") -> Answer:
        """begun: the beginning of the text, which the completion continues."""
        text = (begun + completion.text).strip()
        kept = chat.fitted(text)
        if is_cut := completion.is_cut or kept != text:
            self._count_cut()
        accepted, rejected = completion.prediction
        return Answer(
            text=kept,
            accepted=accepted,
            proposed=min(accepted + rejected, MAX_UINT32),
            confidence=None,
            stages_ms={"call": 1e3 * (time.monotonic() - started)},
            usage=usage,
            is_cut=is_cut,
        )

    def _count_cut(self) -> None:
        if is_told(count := self.calls.count("cut")):
            logger.warning("answers are cut at max_tokens or the longest reply target=%s count=%d", self._url, count)

    def _refused(self, error: CallError, job: PictureJob) -> Answer:
        """The answer after a failure that no further try can mend."""
        return Answer(error=str(error))

    def _unanswered(self, error: CallError, job: PictureJob, wait_s: float, before: str = "") -> Answer:
        """The answer after the last try of this copy of a request. before: why an earlier try failed."""
        why = f"{before}; then {error}" if before and error.kind == "too_late" else str(error)
        if not self.calls.is_given_up(job.key):
            return Answer(error=why, retry_after_ms=max(BUSY_RETRY_MS, math.ceil(1e3 * wait_s)))
        if error.kind == "given_up":
            return Answer(error=why)
        self.calls.count("given_up")
        return Answer(error=f"{why}; {GIVEN_UP}")

    def _ask(self, body: bytes, job: PictureJob) -> Answer:
        """The first text, after as many tries as it takes."""
        started, tries, before = time.monotonic(), 0, ""
        while True:
            tries += 1
            try:
                completion, usage = self.calls.ask(body, job.deadline, key=job.key, usual=job.prompt or self._usual)
            except CallError as error:
                self.calls.count(error.kind)
                wait_s = self.calls.wait_s(error, tries)
                if error.kind in PERMANENT:
                    return self._refused(error, job)
                is_last = error.kind not in TEMPORARY or tries == TRIES or self.calls.is_given_up(job.key)
                if is_last or not self.calls.wait(wait_s, job.deadline):
                    return self._unanswered(error, job, wait_s, before)
                before = str(error)
                self.calls.count("retried")
            else:
                return self._answer_of(completion, usage, started)

    def _repair(self, job: PictureJob, text: str, wrong: str, until: float) -> Answer:
        """One call, within the same budget."""
        started = time.monotonic()
        body = self._body(chat.repair(chat.messages(self._prompt_of(job), job), text, wrong), job)
        try:
            return self._answer_of(*self.calls.ask(body, until, key=job.key), started)
        except CallError as error:
            self.calls.count(error.kind)
            return Answer(error=str(error))

    def _count(self, what: str) -> None:
        self.calls.count(what)

    def _body(self, asked: Sequence[chat.Message], job: PictureJob, **more: Any) -> bytes:
        return chat.body(self.config.model, asked, self._prompt_of(job), self._limit(job), **more)
