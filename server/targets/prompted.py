"""The common part of all targets that read named prompts: the words and pictures of a question, and checked answers.

If a prompt has a schema, its answers are checked here, whatever the model promises. If an answer does not match, the
model gets it back once with the error, before the deadline of its request.
"""

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import CheckedObject, ContentKind, Usage
from edge_runtime.wire.envelope import MAX_UINT32
from server.answer_schema import AnswerError, AnswerSchema
from server.prompts import Prompt, read_prompts
from server.received import Received
from server.targets.recent_pictures import RecentPictures
from server.targets.target import Abilities, Answer, PictureJob, Target, picture_job

REPLY_S = 1.0  # before the deadline, for the reply's way to the board


class Features(Protocol):
    """Turns features of boards into image tokens for a model."""

    bundle: Bundle  # whose latents it reads

    def tokens(self, received: Received) -> Any:
        """`PictureJob.image_tokens` of a request with a latent. Raises BitstreamError and FeaturesError."""


class PromptedTarget(Target[PictureJob]):
    """Shows a model the pictures of a camera and asks it in the words of a prompt."""

    def __init__(
        self,
        prompts: Mapping[str, Prompt] | None,
        usual: str,
        max_tokens: int,
        bundle: Bundle | None = None,
        features: Features | None = None,
    ) -> None:
        """prompts: by name; None: `door` alone. usual: the name of the prompt for requests that name none.

        max_tokens: longest text of a prompt that does not say. bundle: whose vocabulary spells the drafts; None: drafts
        are not used. features: reads boards' features; None: only pictures are read.
        """
        self._prompts = read_prompts({}) if prompts is None else prompts
        self._usual, self._max_tokens, self._bundle = usual, max_tokens, bundle
        self.features = features
        self._recent = RecentPictures()
        self._shows_several = any(prompt.frames > 1 for prompt in self._prompts.values())

    @abstractmethod
    def _repair(self, job: PictureJob, text: str, wrong: str, until: float) -> Answer:
        """The answer to one more try. text: the first one. until: its deadline, seconds, time.monotonic()."""

    def _count(self, what: str) -> None:
        """Of checked answers: `repair`, `invalid`."""

    def _with_features(self, can: Abilities) -> Abilities:
        """These abilities, and the latents that `features` reads."""
        if self.features is None:
            return can
        bundle = self.features.bundle
        return replace(can, bundles=(bundle.id,), references=bundle.inter_tables is not None)

    def job(self, received: Received) -> PictureJob:
        if self.features and received.request.content_kind is ContentKind.LATENT:
            # Earlier frames are not kept: a prompt that shows several pictures is asked about this one.
            return picture_job(received, self._bundle, self.features.tokens(received))
        job, options = picture_job(received, self._bundle), received.request.options
        # To a tier above, all boards of an edge server are one: their cameras cannot be told apart.
        if not self._shows_several or (options and options.via):
            return job
        camera, frames = options.camera if options else "", self._prompt_of(job).frames
        request, board = received.request, received.arrival.board
        earlier = self._recent.add(board, camera, request.id, job.picture, job.media_type, frames)
        return replace(job, earlier=earlier)

    def _prompt_of(self, job: PictureJob) -> Prompt:
        return self._prompts[job.prompt or self._usual]

    @property
    def _longest(self) -> int:
        """Tokens of the longest text of any prompt."""
        return max(prompt.max_tokens or self._max_tokens for prompt in self._prompts.values())

    def _limit(self, job: PictureJob) -> int:
        """Of the tokens of a text."""
        limit = self._prompt_of(job).max_tokens or self._max_tokens
        return min(limit, job.max_tokens or limit)

    def _checked(self, job: PictureJob, first: Answer) -> Answer:
        """The first answer, as an object if the prompt wants one: the object alone as its text, or what was wrong."""
        schema = self._prompt_of(job).schema
        if first.error or schema is None:
            return first
        try:
            return _as_object(first, schema)
        except AnswerError as error:
            wrong = str(error)
        raw = replace(first, checked=CheckedObject(schema.name, valid=False))
        started, until = time.monotonic(), job.deadline - REPLY_S
        # The second try is likely to take as long as the first. One that has no time is made in vain.
        if started + sum(first.stages_ms.values()) / 1e3 >= until:
            self._count("invalid")
            return raw
        self._count("repair")
        second = self._repair(job, first.text, wrong, until)
        if not second.error:
            stages_ms = {**first.stages_ms, "repair": 1e3 * (time.monotonic() - started)}
            raw = replace(raw, stages_ms=stages_ms, usage=added(first.usage, second.usage))
            try:
                return _as_object(replace(raw, text=second.text, is_cut=second.is_cut), schema)
            except AnswerError:
                pass
        self._count("invalid")
        return raw


def added(one: Usage | None, other: Usage | None) -> Usage | None:
    """Tokens and cost of two calls, as far as they are known; None: neither of them said."""
    if one is None or other is None:
        return one or other
    cost = None if one.cost is None or other.cost is None else one.cost + other.cost
    inputs, outputs = one.input_tokens + other.input_tokens, one.output_tokens + other.output_tokens
    return Usage(min(inputs, MAX_UINT32), min(outputs, MAX_UINT32), cost, one.currency)


def words(prompt: Prompt, job: PictureJob) -> str:
    """The question, and when its pictures were taken if there are several."""
    if not job.earlier:
        return prompt.text
    times = ", ".join(f"{earlier.seconds:.1f} s" for earlier in job.earlier)
    return (
        f"{prompt.text}\n\nThese {len(job.earlier) + 1} pictures are of the same camera, in the order of time: {times} "
        "before the last one."
    )


def objection(wrong: str) -> str:
    """The message to a model about an answer that does not match."""
    return f"This is not what was asked for: {wrong}. Answer again, with the whole corrected JSON object alone."


def _as_object(answer: Answer, schema: AnswerSchema) -> Answer:
    """The answer with the object alone as its text. Raises AnswerError."""
    return replace(answer, text=schema.object_in(answer.text), checked=CheckedObject(schema.name, valid=True))
