"""A model of Hugging Face as what answers a server's requests: from a request's picture to the model's job and back."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.picture_checks import decode_picture
from server.config import HuggingFaceConfig
from server.prompts import Prompt
from server.targets.huggingface_model import MAX_TOKENS, Proof
from server.targets.huggingface_prompts import Job, PromptError
from server.targets.prompted import Features, PromptedTarget, objection, words
from server.targets.target import Abilities, Answer, Limits, PictureJob, Verified

BLANK = np.zeros((224, 224, 3), np.uint8)


class Model(Protocol):
    """A model of this process (huggingface_model.py), or replicas of it on other machines (ray_model.py)."""

    proof: Proof
    on_step: Callable[[], None]
    calls: int  # of `answer` at the same time
    silent_s: float  # for so long it may work without a step

    @property
    def name(self) -> str: ...

    @property
    def takes_pictures(self) -> bool: ...

    def check(self, job: Job) -> None:
        """Raises PromptError if the model cannot read this job."""

    def answer(self, jobs: Sequence[Job]) -> list[Answer]: ...

    def assistant_status(self) -> dict[str, Any] | None: ...

    def close(self) -> None: ...


class HuggingFaceTarget(PromptedTarget):
    """For as many threads as its model, except `status`, which is for any."""

    def __init__(
        self,
        model: Model,
        config: HuggingFaceConfig,
        bundle: Bundle | None = None,
        prompts: Mapping[str, Prompt] | None = None,
        max_batch: int = 1,
        features: Features | None = None,
    ) -> None:
        """bundle, prompts, features: see PromptedTarget. max_batch: requests in one pass, if the start test allows it.

        Raises ConfigError, also for a prompt that this model cannot read.
        """
        super().__init__(prompts, config.prompt, config.max_tokens, bundle, features)
        if not model.takes_pictures:
            raise ConfigError(f"{model.name} takes no pictures: want an image-text-to-text model")
        self.model = model
        self.limits = Limits(max_batch if model.proof.batches else 1, model.calls, silent_s=model.silent_s)
        for name, prompt in self._prompts.items():
            self._try(name, prompt)

    def _try(self, name: str, prompt: Prompt) -> None:
        """Raises ConfigError for a prompt that can never be answered."""
        limit = min(prompt.max_tokens or self._max_tokens, MAX_TOKENS)
        job = Job(
            prompt.text,
            BLANK,
            system=prompt.system,
            max_tokens=limit,
            earlier=(BLANK,) * (prompt.frames - 1),
            is_prose=False,
        )
        try:
            self.model.check(job)
        except PromptError as error:
            raise ConfigError(f"prompt {name}: {error}") from error
        if prompt.frames > 1:  # some processors take them, and then the model does not
            (answer,) = self.model.answer([replace(job, max_tokens=1)])
            if answer.error:
                raise ConfigError(f"prompt {name}: {prompt.frames} pictures in one question: {answer.error}")

    @property
    def abilities(self) -> Abilities:
        uses_drafts = self.model.proof.strict
        # The start test found equal texts. That is less than the bundle's proof, which is to the bit.
        verified: Verified = "server" if uses_drafts else "none"
        # Nobody wants a draft of a JSON object.
        takes_drafts = uses_drafts and self._bundle is not None and self._prompts[self._usual].schema is None
        name, prompts = f"hf:{self.model.name}", tuple(sorted(self._prompts))
        longest = min(self._longest, MAX_TOKENS)
        can = Abilities(name, verified, drafts=takes_drafts, prompts=prompts, max_tokens=longest)
        return self._with_features(can)

    def answer(self, jobs: Sequence[PictureJob]) -> list[Answer]:
        first = self._written([self.asked(job) for job in jobs])
        return [self._checked(job, answer) for job, answer in zip(jobs, first, strict=True)]

    def on_step(self, step: Callable[[], None]) -> None:
        self.model.on_step = step

    def status(self) -> dict[str, Any]:
        bundles = {self._bundle.id.hex(): self._bundle.manifest.name} if self._bundle else {}
        numerics, assistant = self.model.proof.numerics, self.model.assistant_status()
        return {"numerics": numerics, "bundles": bundles, "assistant": assistant}

    def close(self) -> None:
        self.model.close()

    def asked(self, job: PictureJob, draft: str | None = None, repair: tuple[str, str] | None = None) -> Job:
        prompt = self._prompt_of(job)
        if draft is None:
            draft = job.draft if prompt.schema is None else ""
        return Job(
            words(prompt, job),
            # Decoded once before, within limits; here in their own size and proportions.
            decode_picture(job.picture) if job.image_tokens is None else None,
            draft,
            min(self._limit(job), MAX_TOKENS),
            prompt.system,
            tuple(decode_picture(earlier.picture) for earlier in job.earlier),
            repair,
            is_prose=prompt.schema is None,
            image_tokens=job.image_tokens,
        )

    def _repair(self, job: PictureJob, text: str, wrong: str, until: float) -> Answer:
        # The corrected text is likely to be much like the first.
        return self._written([self.asked(job, draft=text, repair=(text, objection(wrong)))])[0]

    def _written(self, jobs: Sequence[Job]) -> list[Answer]:
        started = time.monotonic()
        answers = self.model.answer(jobs)
        passes_ms = 1e3 * (time.monotonic() - started)  # the first pass reads the pictures
        # Tokens of another vocabulary than the boards' are left out.
        return [replace(answer, tokens=(), stages_ms={"passes": passes_ms}) for answer in answers]
