"""A model of Hugging Face transformers as a target, in the server's process: pictures and prompts in, texts out.

A draft is verified in the pass that reads the prompt. Then the text goes on with proposals from the rest of the draft,
from the prompt, and from what this model has written before. The text is the one of `generate` with `do_sample=False`,
with any draft. A start test decides whether drafts are used (`prove`).

Knows nothing of messages, queues and deadlines.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from edge_runtime.errors import AiflowError
from server.targets.huggingface_decoding import GreedyDecoding, NotFiniteError, Propose
from server.targets.huggingface_drafts import DraftTokenizer
from server.targets.huggingface_loading import Loaded, TargetError, load
from server.targets.huggingface_prompts import PromptError, model_inputs
from server.targets.huggingface_tower import Tower
from server.targets.phrases import START, PhraseMemory, Proposer
from server.verify import new_text

logger = logging.getLogger(__name__)

MAX_TOKENS = 1024  # of a text
PHRASES = 20_000  # keys of the phrase memory, about 10 MB: hundreds of texts of 20 tokens
PROBE_TOKENS = 16  # of a text of the start test
PROBE_PROMPTS = ("Describe this in one sentence.", "What is unusual here?")
SAFETY = 16  # times the deviation that the start test saw, to bound the deviations that it did not see

FAILURES = (AiflowError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)  # of one job


@dataclass(frozen=True)
class Job:
    """What the target needs for one text."""

    prompt: str
    pixels: NDArray[np.uint8] | None = None  # RGB, [H, W, 3]; None for a language model and with image tokens
    draft: str | None = None  # any text. None: the target writes alone, without proposals of its own either
    max_tokens: int = 64  # longest text, end token included; 1 to MAX_TOKENS
    image_tokens: torch.Tensor | None = None  # what the language model reads in the place of a picture, [N, D]


@dataclass(frozen=True)
class Answer:
    """One text and how it was written. If that failed: an `error`, and no text."""

    text: str
    tokens: tuple[int, ...] = ()  # of the model's own vocabulary, without the end token
    accepted: int = 0  # proposed tokens that the target chose as well
    proposed: int = 0  # tokens of the draft that were usable
    accepted_again: int = 0  # of the proposals that replaced the draft, tokens that the target chose as well
    passes: int = 0  # forward passes of the text decoder, the prompt's included
    confidence: float = 0.0  # geometric mean of the probabilities of its tokens, end token included
    error: str = ""


@dataclass(frozen=True)
class Proof:
    """What the start test found on this device, with these weights and this thread count."""

    strict: bool = False  # texts are the same with drafts and without, and drafts are used
    reason: str = "the start test has not run"  # why drafts are ignored; empty if they are used
    reads_draft_with_prompt: bool = False  # in one pass; else the prompt has a pass of its own
    # In float32, a text with two best scores closer than this is written again without proposals.
    near_tie: float = 0.0
    numerics: str = ""  # short id of the bits; servers with different ones may answer differently


class HuggingFaceTarget:
    """One model. For one thread."""

    def __init__(self, loaded: Loaded) -> None:
        """Runs the start test. Raises TargetError if the model does not work at all."""
        self.loaded = loaded
        self.drafts = DraftTokenizer(loaded.tokenizer, loaded.model.config)
        self.phrases = PhraseMemory(PHRASES)
        self.tower: Tower | None = None  # puts image tokens in the place of a picture
        self.rewritten = 0  # texts that were written again without proposals
        self.proof = Proof()
        self.proof = prove(self)
        logger.log(
            logging.INFO if self.proof.strict else logging.WARNING,
            "target loaded model=%s architecture=%s strict=%s numerics=%s reason=%s",
            *(loaded.name, loaded.architecture, self.proof.strict, self.proof.numerics, self.proof.reason),
        )

    @classmethod
    def load(
        cls, name: str, dtype: str = "float32", device: str = "cpu", threads: int = 1, offline: bool = True
    ) -> "HuggingFaceTarget":
        """From a folder or a name on the hub, see `huggingface_loading.load`. Raises TargetError."""
        return cls(load(name, dtype, device, threads, offline))

    @property
    def takes_pictures(self) -> bool:
        """The model describes pictures; otherwise it takes prompts alone."""
        return self.loaded.processor is not None

    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        """The texts of any number of jobs, in their order, one after the other. One that fails does not hurt others."""
        return [self._answer(job) for job in jobs]

    def _answer(self, job: Job) -> Answer:
        try:
            inputs = self.inputs(job)
            draft = self.drafts.tokens(job.draft) if job.draft is not None and self.proof.strict else None
            written = self._write(inputs, draft, job.max_tokens)
        except FAILURES as error:  # of foreign code on a foreign picture: they end this job, not the server
            return Answer("", error=f"target {self.loaded.name}: {error}")
        text = written.text
        self.drafts.learn(text.without_end)
        self.phrases.learn((START, *text.without_end))
        return Answer(
            self.drafts.text(text.without_end),
            text.without_end,
            text.accepted,
            text.proposed,
            text.accepted_again,
            text.passes,
            math.exp(written.log_probability / len(text.tokens)),
        )

    def inputs(self, job: Job) -> dict[str, Any]:
        """The model's inputs for a job. Raises PromptError."""
        if not 1 <= job.max_tokens <= MAX_TOKENS:
            raise PromptError(f"max_tokens = {job.max_tokens}: want 1 to {MAX_TOKENS}")
        if job.image_tokens is None:
            inputs = model_inputs(self.loaded, job.prompt, job.pixels)
        elif self.tower:
            inputs = self.tower.inputs(job.prompt, job.image_tokens)
        else:
            raise PromptError("image tokens come from a tail, and this target has none: set `tail` in [hf]")
        positions = getattr(self.loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if not (length := inputs["input_ids"].shape[1]):
            raise PromptError(f"{self.loaded.architecture} has no tokens for this prompt: want one in its language")
        if isinstance(positions, int) and length + job.max_tokens > positions:
            raise PromptError(
                f"prompt and picture have {length} tokens and the text up to {job.max_tokens}, but "
                f"{self.loaded.architecture} reads {positions} at most: want a shorter prompt or text"
            )
        return inputs

    def _write(self, inputs: dict[str, Any], draft: tuple[int, ...] | None, limit: int) -> GreedyDecoding:
        if draft is None:
            return self.decode(inputs, limit)
        own = PhraseMemory(PHRASES)
        own.learn([token for token in inputs["input_ids"][0].tolist() if token not in self.drafts.special])
        proposer, wasted = Proposer(draft, own, self.phrases), 0
        try:
            written = self.decode(inputs, limit, draft, proposer, self.proof.reads_draft_with_prompt)
            if not written.widest or written.margin > self.proof.near_tie:
                return written
            # The order of sums depends on how many tokens a pass reads. Here it may have decided between two tokens.
            wasted = written.text.passes
        except NotFiniteError as error:  # a draft can make a model in float16 overflow where its own text does not
            wasted = error.passes
        self.rewritten += 1
        alone = self.decode(inputs, limit)
        alone.text = replace(alone.text, passes=alone.text.passes + wasted)
        return alone

    def decode(
        self,
        inputs: dict[str, Any],
        limit: int,
        draft: Sequence[int] = (),
        proposer: Propose | None = None,
        reads_draft_with_prompt: bool = True,
        **settings: Any,
    ) -> GreedyDecoding:
        """One text of at most `limit` tokens, with this draft. settings: more arguments of `generate`."""
        text = new_text(draft, self.drafts.vocabulary, limit, special=self.drafts.special)
        decoding = GreedyDecoding(text, proposer, reads_draft_with_prompt)
        self.loaded.model.generate(
            **inputs,
            custom_generate=decoding,
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            cache_implementation="dynamic",
            **settings,
        )
        return decoding


def prove(target: HuggingFaceTarget) -> Proof:
    """The start test: texts without a draft, then with right and wrong ones. Raises TargetError if none can be written.

    Libraries choose the order of sums by shape, so the bits of a token may depend on how many tokens a pass reads. In
    float32 they differ in the last places, and texts only where two tokens are almost equally likely.
    """
    random = np.random.default_rng(0)
    jobs = [
        Job(prompt, random.integers(0, 256, (224, 224, 3), dtype=np.uint8) if target.takes_pictures else None)
        for prompt in PROBE_PROMPTS
    ]
    loaded = target.loaded
    try:
        asked = [target.inputs(Job(job.prompt, job.pixels, max_tokens=PROBE_TOKENS)) for job in jobs]
        decode = partial(target.decode, limit=PROBE_TOKENS, min_new_tokens=PROBE_TOKENS)
        alone = [decode(inputs) for inputs in asked]
    except FAILURES as error:
        raise TargetError(f"{loaded.name}: {loaded.architecture} fails at a first text: {error}") from error
    for written in alone:
        target.drafts.learn(written.text.without_end)
    threads = torch.get_num_threads()
    seen = [(written.text.tokens, written.log_probability) for written in alone]
    setting = (torch.__version__, transformers.__version__, loaded.model.device.type, loaded.model.dtype, threads, seen)
    numerics = hashlib.sha256(repr(setting).encode()).hexdigest()[:8]
    if not all(written.can_roll_back for written in alone):
        return Proof(reason=f"the cache of {loaded.architecture} cannot be rolled back", numerics=numerics)
    for with_prompt in (True, False):
        again = partial(decode, reads_draft_with_prompt=with_prompt)
        deviation = max(
            _deviation(written, partial(again, inputs, draft=draft))
            for inputs, written in zip(asked, alone, strict=True)
            for draft in _probe_drafts(written.text.tokens, target.drafts)
        )
        if deviation < math.inf:
            near_tie = SAFETY * max(deviation, 1e-6) if loaded.model.dtype == torch.float32 else 0.0
            return Proof(True, "", with_prompt, near_tie, numerics)
    return Proof(reason=f"texts of {loaded.architecture} differ with drafts", numerics=numerics)


def _deviation(alone: GreedyDecoding, decode: Callable[[], GreedyDecoding]) -> float:
    """By how much the text's log-probability differs if it is written so; infinite if the text does, or if it fails."""
    try:
        again = decode()
    except FAILURES as error:
        logger.info("a text with a draft failed in the start test: %s", error)
        return math.inf
    if again.text.tokens != alone.text.tokens:
        return math.inf
    return abs(again.log_probability - alone.log_probability)


def _probe_drafts(tokens: tuple[int, ...], drafts: DraftTokenizer) -> list[tuple[int, ...]]:
    """The text itself, the text with every fifth token replaced, and the text from its second token on."""
    usable = [token for token in range(drafts.vocabulary) if token not in drafts.special]
    wrong = tuple(usable[(token + 1) % len(usable)] if i % 5 == 4 else token for i, token in enumerate(tokens))
    return [tokens, wrong, tokens[1:]]
