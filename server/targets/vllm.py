"""A vLLM server as the target: it also verifies drafts, in the pass that reads the prompt.

Its chat completions have fields that OpenAI's lack (vLLM's documentation, "OpenAI-Compatible Server"). The draft is the
beginning of the assistant's message (`continue_final_message`). `prompt_logprobs` says for each of its tokens whether
it is the one that the model would have written (rank 1). The draft is accepted up to the first token that is not. Then
the model continues from there, unless the text ends.

Whether a server does that with pictures is not read from its version: a probe writes a text and has it verified.
Nothing is known for good: the probe is repeated after it failed, after vLLM was away, and for another model. Requests
that fail in a way that speaks against it only bring the next probe forward, since they may be at fault themselves.

With a tail of `aiflow distil` it also answers features: their image tokens are sent in place of a picture
(image_embeds.py). vLLM's documentation warns that its engine may crash if their shape is wrong. So a second probe first
asks which model is loaded and how many tokens a picture has, and only then sends image tokens.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import cv2
import msgspec
import numpy as np

from edge_runtime.errors import AiflowError
from edge_runtime.http_call import PERMANENT, CallError
from edge_runtime.wire import Usage
from server.prompts import Prompt
from server.targets import chat
from server.targets.acceptance import Acceptance
from server.targets.openai import BUSY_RETRY_MS, DraftError, OpenAITarget, draft_fault
from server.targets.prompted import added
from server.targets.target import Abilities, Answer, FeaturesError, PictureJob

if TYPE_CHECKING:
    from server.targets.image_embeds import ImageEmbeds

logger = logging.getLogger(__name__)

CONTINUE: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
CHECK_S = 30.0  # how often the list of models is read, which costs nothing
PROBE_TOKENS = 16  # of its text
PROBE_PIXELS = np.linspace(0, 255, 224 * 224 * 3).astype(np.uint8).reshape(224, 224, 3)
WRONG_DRAFT = "zebra zebra zebra zebra"
BAD_REQUEST = 400  # how vLLM refuses a part that it does not take


class _Model(msgspec.Struct):
    """Without `created`, which is the time of the answer."""

    id: str
    root: str | None = None  # name or folder that it was loaded from
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Logprob(msgspec.Struct):
    rank: int  # 1: the likeliest token
    decoded_token: str


_Positions = list[dict[str, _Logprob] | None]  # of each token of the prompt: by id, the token itself and the likeliest


class _CrashError(FeaturesError):
    """After this question, the other server's engine may have ended, or hang."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The model's verdict on a draft."""

    tokens: tuple[int, ...]  # the draft in the model's vocabulary
    ends: tuple[int, ...]  # for each token, how many characters of the draft there are with it
    accepted: int  # the first so many tokens are the model's own choice


def verdict(completion: chat.Completion, draft: str) -> Verdict:
    """From a response to a prompt that ends with the draft. Raises DraftError if it does not say what it should."""
    try:
        ids = msgspec.convert(completion.prompt_token_ids, list[int])
        positions = msgspec.convert(completion.prompt_logprobs, _Positions, strict=False)
    except msgspec.ValidationError as error:
        raise DraftError(f"no prompt_token_ids and prompt_logprobs as vLLM has them: {error}") from error
    if len(ids) != len(positions):
        raise DraftError(f"{len(positions)} prompt_logprobs for {len(ids)} tokens of the prompt")
    # The prompt is a template, a picture and the draft. So the draft's tokens are found from the end.
    left, found = len(draft), list[tuple[int, int, int]]()  # id, end in the draft, rank
    for token, position in zip(reversed(ids), reversed(positions), strict=True):
        if not left:
            break
        said = (position or {}).get(str(token))
        if said is None:
            raise DraftError("a token of the draft without its rank")
        piece = said.decoded_token
        if not draft.endswith(piece, 0, left):  # some vocabularies spell a token without the space before it
            left = len(draft[:left].rstrip())
        if not draft.endswith(piece, 0, left):
            piece = piece.lstrip()  # the first one may begin with a space that is not the draft's
            if len(piece) != left or not draft.startswith(piece):
                raise DraftError("the end of the prompt does not spell the draft")
        found.append((token, left, said.rank))
        left -= len(piece)
    if left:
        raise DraftError("the prompt is shorter than the draft")
    found.reverse()
    accepted = next((n for n, (_, _, rank) in enumerate(found) if rank != 1), len(found))
    return Verdict(tuple(token for token, _, _ in found), tuple(end for _, end, _ in found), accepted)


class VllmTarget(OpenAITarget):
    """Probes the other server on a thread of its own, if it may get drafts or features: at once, and when it is due."""

    kind = "vllm"

    def __init__(self, *args: Any, features: "ImageEmbeds | None" = None, **kwargs: Any) -> None:
        """As OpenAITarget. features: encodes boards' features; None: only pictures are read."""
        super().__init__(*args, **kwargs)
        self.features: ImageEmbeds | None = features
        self._drafts, self._latents = Acceptance(), Acceptance()
        self._probes: list[tuple[Acceptance, Callable[[], bool]]] = [(self._drafts, self.probe)] * self._may_send_drafts
        self._probes += [(self._latents, self.probe_features)] * (features is not None)
        self._served: list[_Model] | None = None  # of this target's name, as last seen
        self._lost_connections, self._was_away = 0, False  # as last seen
        self._is_due = threading.Event()  # a probe is, or this server stops
        if self._probes:
            threading.Thread(target=self._probe_until_closed, name="probe", daemon=True).start()

    @property
    def abilities(self) -> Abilities:
        can = super().abilities
        features = {"features": why} if (why := self._latents.in_words()) else {}
        can = replace(can, verified="server" if can.drafts else "none", refused={**can.refused, **features})
        return self._with_features(can) if self._latents.is_taken else can

    @property
    def _takes_drafts(self) -> bool:
        return self._drafts.is_taken

    def close(self) -> None:
        super().close()
        self._is_due.set()

    # ---- the probes ----

    def _probe_until_closed(self) -> None:
        while not self.calls.stop.is_set():
            self.probe_due()
            self._is_due.wait(CHECK_S)
            self._is_due.clear()

    def probe_due(self) -> None:
        """Makes the probes that are due: all of them if vLLM was away meanwhile.

        First forgets what was known, if vLLM is away now or serves another model.
        """
        lost = self._lost()  # before the probes: vLLM may be restarted while one is made
        try:
            served = self._models(time.monotonic() + self.config.timeout_s)
        except CallError as error:
            if error.kind == "no_connection":
                self._forget(str(error))
            if error.kind not in PERMANENT:
                self._was_away = True  # a proxy in front of it says 502 or 503
                return  # it would not answer a probe either
        except FeaturesError:
            pass  # the probe of features says so
        else:
            if self._served not in (None, served):
                self._forget("another model is served", other_model=True)
            self._served = served
        if self._was_away or lost > self._lost_connections:
            for acceptance, _ in self._probes:
                acceptance.was_away()
        self._was_away, self._lost_connections = False, lost
        for acceptance, probe in self._probes:
            if acceptance.due <= time.monotonic():
                probe()

    def _lost(self) -> int:
        """How often a call has found nobody there."""
        return int(self.calls.status()["calls"].get("no_connection", 0))

    def _forget(self, why: str, other_model: bool = False) -> None:
        for acceptance, _ in self._probes:
            acceptance.forget(why, other_model)

    def _doubt(self, acceptance: Acceptance) -> None:
        """A request failed in a way that speaks against what is known."""
        acceptance.doubted(now := time.monotonic())
        if acceptance.due <= now:
            self._is_due.set()

    def probe(self) -> bool:
        """Whether drafts are verified: a text of the model's own is accepted, and another one is not."""
        picture = cv2.imencode(".jpg", PROBE_PIXELS)[1].tobytes()
        job = PictureJob(picture, "image/jpeg", PROBE_PIXELS, time.monotonic() + self.config.timeout_s)
        job, prompt = replace(job, max_tokens=PROBE_TOKENS), self._prompts[self.config.prompt]
        asked = chat.messages(prompt, job)
        with self._probing(self._drafts, "drafts are verified by the other server", self._refuse_drafts):
            own, _ = self.calls.ask(self._body(asked, job), job.deadline)
            right = self._read_draft(asked, prompt, job, own.text.strip())[0]
            wrong = self._read_draft(asked, prompt, job, WRONG_DRAFT)[0]
            accepted, of = right.accepted, len(right.tokens)
            if accepted < of or wrong.accepted == len(wrong.tokens):
                why = f"{accepted} of {of} tokens of its own text accepted, and {wrong.accepted} of a wrong one"
                raise DraftError(why)
            self._style.learn(own.text.strip())
        return self._takes_drafts

    def probe_features(self) -> bool:
        """Whether vLLM reads image tokens as it reads a picture."""
        assert self.features is not None
        record = self.features.record
        picture = cv2.imencode(".jpg", cv2.resize(PROBE_PIXELS, (record.pixels, record.pixels)))[1].tobytes()
        job = PictureJob(picture, "image/jpeg", PROBE_PIXELS, time.monotonic() + self.config.timeout_s)
        with self._probing(self._latents, "features are taken by the other server", self._refuse_features):
            self._check_model(record.target, job.deadline)
            seen = self._read_prompt(job)
            if (run := max((len(list(same)) for _, same in groupby(seen)), default=0)) != record.tokens:
                raise FeaturesError(
                    f"the tail makes {record.tokens} tokens, but a picture of {record.pixels} x {record.pixels} has "
                    f"{run} in vLLM: want the same preprocessor_config.json, or run `aiflow distil` again"
                )
            read = self._read_mean(job, self.features)
            if read != seen:
                raise FeaturesError(
                    f"a prompt has {len(read)} tokens with image tokens, and {len(seen)} other ones with a picture"
                )
        return self._latents.is_taken

    @contextmanager
    def _probing(self, acceptance: Acceptance, words: str, refuse: Callable[[AiflowError], None]) -> Iterator[None]:
        """What the probe in the `with` block says of an ability. words: for the log, if it is news that vLLM has it."""
        try:
            yield
        except CallError as error:
            self.calls.count(error.kind)
            if error.kind in PERMANENT:
                refuse(error)
            else:
                acceptance.unknown(time.monotonic())
        except (DraftError, FeaturesError) as error:
            refuse(error)
        else:
            if not acceptance.is_taken:
                logger.info("%s target=%s", words, self._url)
            acceptance.taken(time.monotonic())

    def _refuse_features(self, error: AiflowError) -> None:
        self.calls.count("features_refused")
        self._refuse(self._latents, "the other server gets pictures only", error, isinstance(error, _CrashError))

    def _models(self, deadline: float) -> list[_Model]:
        """What is served under this target's name. Raises CallError and FeaturesError."""
        try:
            known = msgspec.json.decode(self.calls.models(deadline), type=_Models).data
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise FeaturesError(f"its list of models cannot be read: {error}") from error
        return [model for model in known if model.id == self.config.model]

    def _check_model(self, wanted: str, deadline: float) -> None:
        """Raises FeaturesError if it serves another model than the one that the tail was made for, and CallError."""
        roots = [model.root or model.id for model in self._models(deadline)]
        if not any(PurePath(root).name == PurePath(wanted).name for root in roots):
            raise FeaturesError(
                f"the tail was made for {wanted}, but vLLM's {self.config.model} is {', '.join(roots) or 'not known'}: "
                "want the same name or folder name, or run `aiflow distil` for that model"
            )

    def _read_mean(self, job: PictureJob, embeds: "ImageEmbeds") -> list[int]:
        """The tokens of a prompt with image tokens. Raises CallError if a later try may work, and FeaturesError."""
        deadline = time.monotonic() + self.config.timeout_s  # whatever time the picture took
        try:
            return self._read_prompt(replace(job, image_tokens=embeds.mean(), deadline=deadline))
        except CallError as error:
            # After these, the engine may have crashed, or hang. Another try could do that again. But if it has taken
            # image tokens before, a timeout only says that it is busy.
            crashes = {"cut_off", "server_error"} if self._latents.is_taken else {"cut_off", "server_error", "timeout"}
            if error.kind not in PERMANENT | crashes:
                raise
            self.calls.count(error.kind)
            kind = FeaturesError if error.kind in PERMANENT else _CrashError
            raise kind(
                f"it does not take image tokens of {embeds.record.width} numbers ({error}): start vLLM with "
                "--enable-mm-embeds and a model of this width that takes image_embeds"
            ) from error

    def _read_prompt(self, job: PictureJob) -> list[int]:
        """The tokens of the usual prompt and a picture. Raises CallError and FeaturesError."""
        prompt = self._prompts[self.config.prompt]
        body = chat.body(self.config.model, chat.messages(prompt, job), prompt, 1, return_token_ids=True)
        completion, _ = self.calls.ask(body, job.deadline, may_be_empty=True)
        try:
            return msgspec.convert(completion.prompt_token_ids, list[int])
        except msgspec.ValidationError as error:
            raise FeaturesError(f"its response has no prompt_token_ids like vLLM's: {error}") from error

    # ---- one request ----

    def _refused(self, error: CallError, job: PictureJob) -> Answer:
        if job.image_tokens is None or error.status != BAD_REQUEST:
            return super()._refused(error, job)
        self.calls.count("features_refused")
        self._doubt(self._latents)
        # The board may send a picture, or another server may answer.
        return Answer(error=str(error), retry_after_ms=BUSY_RETRY_MS)

    def _draft_failed(self, error: AiflowError) -> None:
        self.calls.count(draft_fault(error))
        self._doubt(self._drafts)

    def _plain(self, asked: list[chat.Message], prompt: Prompt, job: PictureJob) -> Answer:
        answer = super()._plain(asked, prompt, job)
        return answer if answer.error else _with_passes(answer, answer.usage, answer.stages_ms["call"])

    def _with_draft(self, asked: list[chat.Message], prompt: Prompt, job: PictureJob, draft: str) -> Answer | None:
        if not draft.isascii():  # a token may be a part of a character, which nothing spells
            return None
        started, limit = time.monotonic(), self._limit(job)
        found, completion, usage = self._read_draft(asked, prompt, job, draft)
        accepted = min(found.accepted, limit)
        text = draft[: found.ends[accepted - 1]] if accepted else ""
        read = Answer(text=text, accepted=accepted, proposed=len(found.tokens), confidence=None, usage=usage)
        has_ended = accepted == len(found.tokens) and completion.ends_here
        if has_ended or accepted == limit:
            if accepted == limit:
                self._count_cut()
            took_ms = 1e3 * (time.monotonic() - started)
            return replace(read, passes=1, stages_ms={"passes": took_ms}, is_cut=accepted == limit)
        if not accepted:
            answer = self._plain(asked, prompt, job)
        else:
            answer = self._continued(asked, prompt, job, text, found.tokens[:accepted], limit)
        if answer.error:
            return answer
        total = replace(read, text=answer.text, usage=added(usage, answer.usage), is_cut=answer.is_cut)
        return _with_passes(total, answer.usage, 1e3 * (time.monotonic() - started), before=1)

    def _read_draft(
        self, asked: list[chat.Message], prompt: Prompt, job: PictureJob, draft: str
    ) -> tuple[Verdict, chat.Completion, Usage | None]:
        """One pass over the draft; it writes one token more. Raises CallError and DraftError."""
        body = chat.body(self.config.model, _begun(asked, draft), prompt, 1, prompt_logprobs=1, **CONTINUE)
        completion, usage = self.calls.ask(body, job.deadline, may_be_empty=True, key=job.key)
        return verdict(completion, draft), completion, usage

    def _continued(
        self, asked: list[chat.Message], prompt: Prompt, job: PictureJob, text: str, tokens: Sequence[int], limit: int
    ) -> Answer:
        """The whole text, from its beginning on. Raises CallError."""
        started = time.monotonic()
        body = chat.body(self.config.model, _begun(asked, text), prompt, limit - len(tokens), **CONTINUE)
        completion, usage = self.calls.ask(body, job.deadline, may_be_empty=True, key=job.key)
        ids = completion.prompt_token_ids
        # A beginning may be cut into other tokens than the model chose, and then the text would not be its own.
        if not isinstance(ids, list) or ids[-len(tokens) :] != list(tokens):
            self.calls.count("draft_recut")
            return self._plain(asked, prompt, job)
        return self._answer_of(completion, usage, started, begun=text)


def _begun(asked: Sequence[chat.Message], text: str) -> list[chat.Message]:
    """The answer begins with this text."""
    return [*asked, {"role": "assistant", "content": text}]


def _with_passes(answer: Answer, usage: Usage | None, took_ms: float, before: int = 0) -> Answer:
    """A pass per token that was written. Without counts of tokens, there are none of passes."""
    passes = before + usage.output_tokens if usage else 0
    return replace(answer, passes=passes, stages_ms={"passes": took_ms})
