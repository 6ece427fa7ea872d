"""Our own networks as a target: reads latents and pictures, verifies drafts to the bit, answers with labels.

From a request to the engine's job: the latent's symbols, with an earlier frame of the board as reference if the board
coded against one; for a picture, the float head's. The engine itself (server/engine.py) knows nothing of requests.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.inference.bundle import Bundle
from edge_runtime.inference.sampling import sampler_of
from edge_runtime.wire import EnvelopeError, Paradigm
from edge_runtime.wire.bitstream import Header, encode
from edge_runtime.wire.envelope import seed_of
from server.engine import Job, Proof
from server.questions import Questions
from server.received import Received
from server.targets.latents import Latents
from server.targets.target import Abilities, Answer, Limits, Target


class BundleEngine(Protocol):
    """An engine of this process (server/engine.py), or replicas of it on other machines (ray_engine.py)."""

    proof: Proof
    on_step: Callable[[], None]

    @property
    def head(self) -> object | None:
        """None: it reads no pictures."""

    def answer(self, jobs: Sequence[Job]) -> list[Answer]: ...

    def symbols(self, pixels: NDArray[np.uint8]) -> NDArray[np.int8]: ...


class BundleTarget(Target[Job]):
    """For as many threads as its engine, except `load_questions`."""

    def __init__(
        self,
        bundle: Bundle,
        engine: BundleEngine,
        tier: str = "edge",
        max_batch: int = 8,
        questions: Questions | None = None,
        calls: int = 1,
    ) -> None:
        """tier: whose decoder answers, "edge" or "cloud". calls: batches at the same time."""
        self.bundle, self.engine, self.tier = bundle, engine, tier
        self.questions = questions or Questions(bundle)
        self.latents = Latents(bundle)
        self.limits = Limits(max_batch, calls)

    @property
    def abilities(self) -> Abilities:
        proof = self.engine.proof
        return Abilities(
            name="bundle",
            verified="strict" if proof.may_speculate else "none",
            bundles=(self.bundle.id,),
            pictures=self.engine.head is not None,
            drafts=proof.may_speculate,
            labels=bool(self.bundle.manifest.classes),
            sample=True,
            references=self.bundle.inter_tables is not None,
            max_tokens=self.bundle.manifest.max_tokens,
            tokenizer=self.bundle.id.hex(),
        )

    def job(self, received: Received) -> Job:
        request = received.request
        symbols, level, channels = self._symbols(received)
        options = request.options
        max_tokens = options.max_tokens if options else None
        # A board without a draft that asks for speculation gets the server's; "split" is the target alone.
        proposes = options is not None and options.propose
        is_speculative = request.draft or request.paradigm is Paradigm.SPECULATIVE or proposes
        draft = tuple(request.draft_ids) if is_speculative else None
        labels, classes = request.seen_labels, len(self.bundle.manifest.classes)
        if max(labels, default=-1) >= classes:
            raise EnvelopeError(f"label {max(labels)} of {classes}: want a class of the bundle")
        vocabulary = self.bundle.manifest.vocabulary
        if options and options.stop and (request.bundle != self.bundle.id or max(options.stop) >= vocabulary):
            raise EnvelopeError(f"stop tokens up to {max(options.stop)}: want those of bundle {self.bundle.id.hex()}")
        sampler = sampler_of(options, seed_of(options, request.id))
        known = self.questions.known
        questions = {name: known[name] for name in (options.questions if options else ()) if name in known}
        return Job(symbols, level, channels, draft, self.tier, max_tokens, classes > 0, questions, labels, sampler)

    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        unsure_below = self.bundle.manifest.unsure_below.get(self.tier, 0.0)
        return [
            answer
            if answer.error
            else replace(
                answer,
                text=self.bundle.text(list(answer.tokens)),
                unsure=(answer.confidence or 0.0) < unsure_below,
            )
            for answer in self.engine.answer(jobs)
        ]

    def on_step(self, step: Callable[[], None]) -> None:
        self.engine.on_step = step

    def request_above(self, received: Received, job: Job) -> Received:
        """The tier above has no earlier frames of the board, so the content must do without."""
        request, tables = received.request, self.bundle.tables
        if received.pixels is not None or Header.from_bytes(request.content).reference is None:
            return received
        content = encode(job.symbols, tables, job.level, job.channels * tables.groups // tables.channels)
        return replace(received, request=msgspec.structs.replace(request, content=content))

    def question_names(self) -> Collection[str]:
        return self.questions.known

    def load_questions(self) -> bool | None:
        return self.questions.load()

    def status(self) -> dict[str, Any]:
        proof = self.engine.proof
        return {
            "bundles": {self.bundle.id.hex(): self.bundle.manifest.name},
            "numerics": proof.numerics,
            "shapes": {"tail": proof.tail_sizes, "image": proof.image_sizes, "pass": proof.shapes},
            **self.questions.status(),
        }

    def _symbols(self, received: Received) -> tuple[NDArray[np.int8], int, int]:
        """The latent's symbols, their level, and how many channels of them were sent. Raises BitstreamError."""
        tables = self.bundle.tables
        if received.pixels is not None:
            return self.engine.symbols(received.pixels), tables.levels - 1, tables.channels
        return self.latents.symbols(received)
