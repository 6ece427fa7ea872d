"""A model of Hugging Face transformers, in the server's process: pictures and prompts in, texts out.

A draft is verified in the pass that reads the prompt. Then the text goes on with proposals from the rest of the draft,
from the prompt, from what this model has written before, and from a smaller model (`huggingface_assistant.py`). The
text is the one of `generate` with `do_sample=False`, with any draft and in any batch. A start test decides whether
drafts and batches are used (`prove`).

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

from server.targets.huggingface_assistant import Assistant, AssistedText
from server.targets.huggingface_decoding import FAILURES, GreedyDecoding, Propose, Row
from server.targets.huggingface_drafts import DraftTokenizer
from server.targets.huggingface_loading import Loaded, TargetError, load
from server.targets.huggingface_prompts import Job, PromptError, model_inputs
from server.targets.huggingface_tower import Tower
from server.targets.phrases import START, PhraseMemory, Proposer
from server.targets.target import Answer
from server.verify import new_text

logger = logging.getLogger(__name__)

MAX_TOKENS = 1024  # of a text
PHRASES = 20_000  # keys of the phrase memory, about 10 MB: hundreds of texts of 20 tokens
PROBE_TOKENS = 16  # of a text of the start test
PROBE_PROMPTS = ("Describe this in one sentence.", "What is unusual here?", "Describe this in one sentence.")
SAFETY = 16  # times the deviation that the start test saw, to bound the deviations that it did not see

Inputs = dict[str, Any]  # of `generate`: tensors by name


@dataclass(frozen=True)
class Proof:
    """The result of the start test on this device, with these weights and this thread count."""

    strict: bool = False  # texts are the same with drafts and without, and drafts are used
    reason: str = "the start test has not run"  # why drafts are ignored; empty if they are used
    reads_draft_with_prompt: bool = False  # in one pass; else the prompt has a pass of its own
    # In float32, a text with two best scores closer than this is written again without proposals.
    near_tie: float = 0.0
    batches: bool = False  # texts are the same if several are written in one pass
    numerics: str = ""  # short id of the bits; servers with different ones may answer differently


class HuggingFaceModel:
    """One model. For one thread."""

    calls = 1  # of `answer` at the same time
    silent_s = 300.0  # of one pass: a large model reads several pictures on a CPU within it

    def __init__(self, loaded: Loaded) -> None:
        """Runs the start test. Raises TargetError if the model does not work at all."""
        self.loaded = loaded
        self.drafts = DraftTokenizer(loaded.tokenizer, loaded.model.config)
        self.phrases = PhraseMemory(PHRASES)
        self.tower: Tower | None = None  # puts image tokens in the place of a picture
        self.assistant: Assistant | None = None  # proposes if phrases do not
        self.rewritten = 0  # texts that were written again, alone and without proposals
        self.on_step: Callable[[], None] = lambda: None  # called after each pass
        self.proof = Proof()
        self.proof = prove(self)
        logger.log(
            logging.INFO if self.proof.strict else logging.WARNING,
            "target loaded model=%s architecture=%s strict=%s batches=%s numerics=%s reason=%s",
            *(loaded.name, loaded.architecture, self.proof.strict, self.proof.batches),
            *(self.proof.numerics, self.proof.reason),
        )

    @classmethod
    def load(
        cls, name: str, dtype: str = "float32", device: str = "cpu", threads: int = 1, offline: bool = True
    ) -> "HuggingFaceModel":
        """From a folder or a name on the hub, see `huggingface_loading.load`. Raises TargetError."""
        return cls(load(name, dtype, device, threads, offline))

    def add_assistant(
        self, name: str, dtype: str = "float32", device: str = "cpu", threads: int = 1, offline: bool = True
    ) -> None:
        """Lets a smaller language model propose, see `huggingface_loading.load`. Raises TargetError."""
        self.assistant = Assistant(load(name, dtype, device, threads, offline), self.loaded, self.drafts.special)

    @property
    def name(self) -> str:
        """A folder, or a name on the hub."""
        return self.loaded.name

    @property
    def takes_pictures(self) -> bool:
        """The model describes pictures; otherwise it takes prompts alone."""
        return self.loaded.processor is not None

    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        """The texts of any number of jobs, in their order, with tokens of the model's own vocabulary.

        One that fails does not hurt the others.

        Jobs with inputs of equal shapes are written in the same passes, if the start test allows it.
        """
        answers: dict[int, Answer] = {}
        groups: dict[Any, list[tuple[int, Inputs]]] = {}
        for i, job in enumerate(jobs):
            try:
                inputs = self.inputs(job)
            except FAILURES as error:
                answers[i] = self._failed(error)
                continue
            shapes = frozenset((name, value.shape) for name, value in inputs.items())
            groups.setdefault((shapes, job.max_tokens) if self.proof.batches else i, []).append((i, inputs))
        for group in groups.values():
            places, asked = [i for i, _ in group], [inputs for _, inputs in group]
            written = self._write([jobs[i] for i in places], asked)
            answers.update(zip(places, written, strict=True))
        return [answers[i] for i in range(len(jobs))]

    def _write(self, jobs: Sequence[Job], asked: Sequence[Inputs]) -> list[Answer]:
        """The answers to jobs of one limit, with inputs of equal shapes."""
        assisted = None
        # Not in a batch: the assistant would have passes of its own for each row, and the slowest row decides.
        if self.assistant and len(jobs) == 1:
            assisted = AssistedText(self.assistant, asked[0]["input_ids"][0].tolist(), jobs[0].max_tokens)
        try:
            before = [self._row(*each, assisted) for each in zip(jobs, asked, strict=True)]
            rows = self.decode(together(asked), before).rows
        except FAILURES as error:
            if len(jobs) == 1:
                return [self._failed(error)]
            logger.warning("texts are written one by one, since together they failed rows=%d why=%s", len(jobs), error)
            return [self._write([job], [inputs])[0] for job, inputs in zip(jobs, asked, strict=True)]
        if assisted:
            assisted.settle(rows[0].text.tokens)
        return [self._answer(*each, len(jobs)) for each in zip(jobs, asked, rows, strict=True)]

    def _row(self, job: Job, inputs: Inputs, assisted: AssistedText | None) -> Row:
        """A text before its first pass."""
        if job.draft is None or not self.proof.strict:
            return self.row(job.max_tokens)
        draft, own = self.drafts.tokens(job.draft), PhraseMemory(PHRASES)
        own.learn([token for token in inputs["input_ids"][0].tolist() if token not in self.drafts.special])
        return self.row(job.max_tokens, draft, Proposer(draft, own, self.phrases, assisted))

    def _answer(self, job: Job, inputs: Inputs, row: Row, rows: int) -> Answer:
        """Of a row that was written with so many rows, itself included."""
        # The order of sums depends on how many tokens a pass reads. Here it may have decided between two tokens. And a
        # draft can make a model in float16 overflow where its own text does not.
        is_reference = rows == 1 and not row.widest
        if not is_reference and (row.error or row.margin <= self.proof.near_tie):
            self.rewritten += 1
            passes = row.text.passes
            try:
                (row,) = self.decode(inputs, [self.row(job.max_tokens)]).rows
            except FAILURES as error:
                return self._failed(error)
            row.text = replace(row.text, passes=row.text.passes + passes)
        if row.error:
            return self._failed(row.error)
        text = row.text
        if job.is_prose:
            self.drafts.learn(text.without_end)
        self.phrases.learn((START, *text.without_end))
        return Answer(
            text.without_end,
            text.accepted,
            text.proposed,
            text.accepted_again,
            text.passes,
            math.exp(row.log_probability / len(text.tokens)),
            text=self.drafts.text(text.without_end),
            is_cut=text.is_cut,
        )

    def _failed(self, error: BaseException) -> Answer:
        return Answer(error=f"target {self.loaded.name}: {error}")

    def check(self, job: Job) -> None:
        """Raises PromptError if the model cannot read this job."""
        self.inputs(job)

    def assistant_status(self) -> dict[str, Any] | None:
        """The assistant's counts; None: there is none."""
        return self.assistant.status() if self.assistant else None

    def close(self) -> None:
        """There is nothing to end."""

    def inputs(self, job: Job) -> Inputs:
        """The model's inputs for a job. Raises PromptError."""
        if not 1 <= job.max_tokens <= MAX_TOKENS:
            raise PromptError(f"max_tokens = {job.max_tokens}: want 1 to {MAX_TOKENS}")
        if job.image_tokens is None:
            inputs = model_inputs(self.loaded, job)
        elif self.tower:
            inputs = self.tower.inputs(job)
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

    def row(self, limit: int, draft: Sequence[int] = (), proposer: Propose | None = None) -> Row:
        """A text of at most `limit` tokens before its first pass."""
        return Row(new_text(draft, self.drafts.vocabulary, limit, special=self.drafts.special), proposer)

    def decode(
        self, inputs: Inputs, rows: Sequence[Row], reads_draft_with_prompt: bool | None = None, **settings: Any
    ) -> GreedyDecoding:
        """Writes the rows, which have one limit. reads_draft_with_prompt: None: as proven. settings: of `generate`."""
        with_prompt = self.proof.reads_draft_with_prompt if reads_draft_with_prompt is None else reads_draft_with_prompt
        decoding = GreedyDecoding(rows, with_prompt, self.on_step)
        self.loaded.model.generate(
            **(self.tower.placed(inputs) if self.tower else inputs),
            custom_generate=decoding,
            max_new_tokens=rows[0].text.limit,
            do_sample=False,
            num_beams=1,
            cache_implementation="dynamic",
            **settings,
        )
        return decoding


def together(asked: Sequence[Inputs]) -> Inputs:
    """Inputs of equal shapes as those of one batch: rows, pictures and patches come one after the other."""
    return {name: torch.cat([inputs[name] for inputs in asked]) for name in asked[0]}


def prove(model: HuggingFaceModel) -> Proof:
    """The start test: texts without a draft, then with right and wrong ones, alone and in one batch.

    Raises TargetError if none can be written.

    Libraries choose the order of sums by shape, so the bits of a token may depend on how many tokens a pass reads. In
    float32 they differ in the last places, and texts only if two tokens are almost equally likely.
    """
    loaded, random = model.loaded, np.random.default_rng(0)
    pictures = [random.integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(2)]
    jobs = [
        Job(prompt, picture if model.takes_pictures else None, max_tokens=PROBE_TOKENS)
        for prompt, picture in zip(PROBE_PROMPTS, (*pictures, pictures[1]), strict=True)
    ]
    decode, row = partial(model.decode, min_new_tokens=PROBE_TOKENS), partial(model.row, PROBE_TOKENS)
    try:
        asked = [model.inputs(job) for job in jobs]
        written = [decode(inputs, [row()]) for inputs in asked]
        alone = [decoding.rows[0] for decoding in written]
        if error := next((each.error for each in alone if each.error), None):
            raise error
    except FAILURES as error:
        raise TargetError(f"{loaded.name}: {loaded.architecture} fails at a first text: {error}") from error
    for each in alone:
        model.drafts.learn(each.text.without_end)
    threads = torch.get_num_threads()
    seen = [(each.text.tokens, each.log_probability) for each in alone]
    setting = (torch.__version__, transformers.__version__, loaded.model.device.type, loaded.model.dtype, threads, seen)
    numerics = hashlib.sha256(repr(setting).encode()).hexdigest()[:8]
    drafts = [_probe_drafts(each.text.tokens, model.drafts) for each in alone]
    reason, with_prompt, deviation = f"texts of {loaded.architecture} differ with drafts", True, math.inf
    if not all(decoding.can_roll_back for decoding in written):
        reason = f"the cache of {loaded.architecture} cannot be rolled back"
    else:
        for with_prompt in (True, False):
            again = partial(decode, reads_draft_with_prompt=with_prompt)
            deviation = max(
                _deviation([each], partial(again, inputs, [row(draft)]))
                for inputs, each, tried in zip(asked, alone, drafts, strict=True)
                for draft in tried
            )
            if deviation < math.inf:
                break
    strict = deviation < math.inf
    # Twice two pictures; of each row something else is accepted.
    rows = [(0, ()), (0, drafts[0][0]), (2, drafts[2][1]), (2, drafts[2][2])]
    batch = [row(draft if strict else ()) for _, draft in rows]
    inputs = together([asked[i] for i, _ in rows])
    shared = _deviation([alone[i] for i, _ in rows], partial(decode, inputs, batch, with_prompt))
    # Penalties for words of the prompt know the prompts of the whole batch, and are asked about one row.
    settings = loaded.model.generation_config
    batches = shared < math.inf and not settings.encoder_no_repeat_ngram_size
    batches = batches and settings.encoder_repetition_penalty in (None, 1.0)
    seen_apart = max(1e-6, *(each for each in (deviation, shared) if each < math.inf), 0.0)
    near_tie = SAFETY * seen_apart if loaded.model.dtype == torch.float32 and (strict or batches) else 0.0
    return Proof(strict, "" if strict else reason, strict and with_prompt, near_tie, batches, numerics)


def _deviation(alone: Sequence[Row], decode: Callable[[], GreedyDecoding]) -> float:
    """The difference of the log-probabilities if the texts are written so; infinite if a text differs or fails."""
    try:
        again = decode().rows
    except FAILURES as error:
        logger.info("texts with drafts or together failed in the start test: %s", error)
        return math.inf
    pairs = list(zip(alone, again, strict=True))
    if any(b.error or a.text.tokens != b.text.tokens for a, b in pairs):
        return math.inf
    return max(abs(a.log_probability - b.log_probability) for a, b in pairs)


def _probe_drafts(tokens: tuple[int, ...], drafts: DraftTokenizer) -> list[tuple[int, ...]]:
    """The text itself, the text with every fifth token replaced, and the text from its second token on."""
    usable = [token for token in range(drafts.vocabulary) if token not in drafts.special]
    wrong = tuple(usable[(token + 1) % len(usable)] if i % 5 == 4 else token for i, token in enumerate(tokens))
    return [tokens, wrong, tokens[1:]]
