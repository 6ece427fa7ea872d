"""The target networks of a bundle on one device: symbols and drafts in, texts out.

Libraries choose the order of sums by shape, so a token's bits may depend on what else is computed with it (He et al.,
"Defeating Nondeterminism in LLM Inference", 2025). The reference is one row alone in passes of [1, BLOCK] tokens over a
static cache, one token of each pass being real. Other shapes are used only if `numerics.prove` found the same bits, so
a text is the same to the bit with any draft and any neighbours. If bits depend on how a text is cut into blocks, drafts
are ignored. Decoding with and without a draft is one code path.

Knows nothing of messages, queues and deadlines.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_runtime.inference.bundle import BOS, BundleError
from edge_runtime.inference.sampling import Sampler
from edge_runtime.wire.labels import MAX_LABELS
from models.family import LATENT, Classifier, Head, Memory, Tail, TextDecoder, arrived_groups
from models.labels import label_words, with_seen
from models.lookahead import Lookahead
from models.questions import Evidence, Question
from server.targets.target import Answer
from server.verify import ENDS, SPECIAL, Text, new_text, next_block, propose_again, verify

Shape = tuple[int, int]  # of a pass: rows, tokens per row

BLOCK = 16  # tokens that a pass reads per row at most: the draft of a whole caption
WIDTHS = (4, 8, BLOCK)  # tokens per row, if proven: for many rows with little to verify, fewer are faster
SIZES = (1, 4, 8)  # batch sizes, if proven
LONE_BLOCK = 8  # tokens of the block if one row is left: measured best of 4 to 8, 10, 12 and 16
SHARED_BLOCK = 4  # tokens of a block if several rows are left: measured best of 4, 8 and 16 at batch 8
MAX_SYMBOL = 127


@dataclass(frozen=True)
class Job:
    """What the engine needs for one text."""

    symbols: NDArray[np.int8]  # [64, 7, 7]; zero where they have not arrived
    level: int = -1  # of the symbols; -1: the finest
    channels: int = LATENT[0]  # that have arrived, the first ones
    # Any integers: what cannot be used is cut. None: the target writes alone, without proposals of the server either.
    draft: tuple[int, ...] | None = None
    tier: str = "edge"
    max_tokens: int | None = None  # longest text, end token included; at most the bundle's
    wants_label: bool = False
    questions: Mapping[str, Question] = field(default_factory=dict)  # to answer, by name
    labels: Mapping[int, float] = field(default_factory=dict)  # that the board has seen: class to probability
    sampler: Sampler | None = None  # chooses the tokens; None: always the likeliest one


@dataclass(frozen=True)
class Proof:
    """What the start test found on this device, see numerics.prove: what has the same bits as one row alone."""

    tail_sizes: tuple[int, ...] = (1,)  # batch sizes of the tail
    image_sizes: tuple[int, ...] = (1,)  # batch sizes of the image encoder
    shapes: tuple[Shape, ...] = ((1, BLOCK),)  # of the decoder's passes
    may_speculate: bool = False  # bits do not depend on how a text is cut into blocks
    numerics: str = ""  # short id of the bits; servers with different ones may answer differently

    @property
    def block(self) -> int:
        """Tokens per row that a pass reads at most."""
        return max(width for _, width in self.shapes)

    @property
    def rows(self) -> int:
        """Rows that a pass of that width has at most."""
        return max(size for size, width in self.shapes if width == self.block)


class Engine:
    """The tail that all targets share, and one text decoder per tier. Any number of threads may call `answer`.

    A `proof` must come from `numerics.prove` on the same device and thread count. Without one, every row runs alone and
    drafts are ignored.
    """

    def __init__(
        self,
        tail: Tail,
        decoders: dict[str, TextDecoder],
        classifier: Classifier | None = None,
        classes: tuple[str, ...] = (),
        head: Head | None = None,
        lookaheads: Mapping[str, Lookahead] | None = None,
        label_words: Sequence[tuple[int, ...]] = (),
        label_temperature: float = 1.0,
        device: str = "cpu",
    ) -> None:
        """lookaheads: by tier. Without one, nothing is proposed after a draft that has ended or gone wrong.

        label_words: the token ids of each class's name, for decoders that see them.
        """
        self.tail, self.decoders, self.classifier, self.classes, self.head = tail, decoders, classifier, classes, head
        self.lookaheads = lookaheads or {}
        self.label_words, self.label_temperature = list(label_words), label_temperature
        self.device, self.threads = torch.device(device), torch.get_num_threads()
        self.proof = Proof()
        self.on_step: Callable[[], None] = lambda: None  # called after each pass of a decoder

    @torch.inference_mode()
    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        """The texts of any number of jobs, in their order."""
        started = time.perf_counter()
        features = self.features(jobs)
        tail_ms = 1e3 * (time.perf_counter() - started)
        answers: dict[int, Answer] = {}
        for tier in dict.fromkeys(job.tier for job in jobs):
            rows = [i for i, job in enumerate(jobs) if job.tier == tier]
            for batch in (rows[i : i + self.proof.rows] for i in range(0, len(rows), self.proof.rows)):
                written = self._decode(tier, [jobs[i] for i in batch], features[batch], tail_ms)
                answers.update(zip(batch, written, strict=True))
        return [answers[i] for i in range(len(jobs))]

    @torch.inference_mode()
    def features(self, jobs: Sequence[Job], sizes: Sequence[int] = ()) -> Tensor:
        """The tail, in batches of these sizes, by default the proven ones: float [B, N, 1280] of the jobs' symbols."""
        torch.set_num_threads(self.threads)  # OpenMP has a count for each thread that calls it
        symbols = torch.from_numpy(np.stack([job.symbols for job in jobs]).astype(np.float32))
        level = torch.tensor([job.level % self.tail.levels for job in jobs])
        arrived = arrived_groups(torch.tensor([job.channels for job in jobs]))
        sizes, parts = sizes or self.proof.tail_sizes, list[Tensor]()
        for rows in zip(*(padded_batches(x.to(self.device), sizes) for x in (symbols, level, arrived)), strict=True):
            # Channels last: a sixth faster on a CPU, and convolutions are meant to run so on a GPU.
            parts.append(self.tail(rows[0].contiguous(memory_format=torch.channels_last), *rows[1:]))
        return torch.cat(parts)[: len(jobs)]

    def _decode(self, tier: str, jobs: Sequence[Job], features: Tensor, tail_ms: float) -> list[Answer]:
        decoder = self.decoders[tier]
        shape = decoder.shape
        drafts = [job.draft if self.proof.may_speculate else None for job in jobs]
        texts = []
        for job, draft in zip(jobs, drafts, strict=True):
            limit = min(job.max_tokens or shape.max_tokens, shape.max_tokens)
            ends = job.sampler.ends if job.sampler else ENDS
            texts.append(new_text(draft or (), shape.vocabulary, limit, ends, SPECIAL | ends))
        started = time.perf_counter()
        is_asked = shape.label_words or any(job.wants_label or job.questions for job in jobs)
        labels = self.label_logits(features) if self.classifier and is_asked else [torch.empty(0)] * len(jobs)
        words = self.words_seen(decoder, labels, jobs)
        memory = encode_image(decoder, features, self.proof.image_sizes, words)
        encoded = time.perf_counter()
        speculative = [i for i, draft in enumerate(drafts) if draft is not None]
        batch = DecodingBatch(
            decoder,
            memory,
            texts,
            self.proof.shapes,
            self.lookaheads.get(tier),
            speculative,
            {i: job.sampler for i, job in enumerate(jobs) if job.sampler},
        )
        while batch.unfinished:
            batch.step()
            self.on_step()
        done = time.perf_counter()
        stages = {"tail": tail_ms, "image": 1e3 * (encoded - started), "passes": 1e3 * (done - encoded)}
        answers = []
        for i, (job, text, log_probability) in enumerate(zip(jobs, batch.texts, batch.log_probabilities, strict=True)):
            if not math.isfinite(log_probability):
                answers.append(Answer((), error=f"target {tier} computed no finite numbers", stages_ms=stages))
                continue
            confidence = math.exp(log_probability / len(text.tokens))
            shares = self.label_shares(labels[i], job.labels)
            scores = self.likeliest(shares) if job.wants_label else {}
            asked: dict[str, dict[str, float]] = {}
            if job.questions:
                known = _evidence(features[i], shares, job)
                asked = {name: question.answer(known) for name, question in job.questions.items()}
            counts = text.accepted, text.proposed, text.accepted_again, text.passes
            answers.append(
                Answer(text.without_end, *counts, confidence, scores, asked, stages_ms=stages, is_cut=text.is_cut)
            )
        return answers

    @torch.inference_mode()
    def evidence(self, jobs: Sequence[Job]) -> list[Evidence]:
        """What questions read of each job."""
        features = self.features(jobs)
        logits = self.label_logits(features) if self.classifier else [torch.empty(0)] * len(jobs)
        return [
            _evidence(row, self.label_shares(each, job.labels), job)
            for row, each, job in zip(features, logits, jobs, strict=True)
        ]

    @torch.inference_mode()
    def label_logits(self, features: Tensor) -> list[Tensor]:
        """Features [B, N, 1280] to the classifier's logits, [classes] for each row.

        Row by row, since a decoder may see the words of the likeliest: their bits must not depend on the batch.
        """
        if self.classifier is None:
            raise BundleError("this bundle has no classifier")
        return [self.classifier(row[None])[0] for row in features]

    def words_seen(self, decoder: TextDecoder, logits: Sequence[Tensor], jobs: Sequence[Job]) -> Tensor | None:
        """The words of the likeliest labels that a decoder sees, int64 [B, label_words]; None if it sees none."""
        if not (count := decoder.shape.label_words):
            return None
        found = [with_seen(row.softmax(-1), job.labels) for row, job in zip(logits, jobs, strict=True)]
        rows = [label_words(row.cpu(), self.label_words, count) for row in found]
        return torch.tensor(rows, device=self.device)

    def label_shares(self, logits: Tensor, seen: Mapping[int, float]) -> Tensor:
        """The probability of each label, float [labels]; empty without logits."""
        return with_seen((logits / self.label_temperature).softmax(-1), seen) if len(logits) else logits

    def likeliest(self, shares: Tensor) -> dict[str, float]:
        best = shares.topk(min(MAX_LABELS, len(shares)))
        return {self.classes[i]: p for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)}

    @torch.inference_mode()
    def symbols(self, pixels: NDArray[np.uint8]) -> NDArray[np.int8]:
        """The float head, for pictures that were sent: uint8 [224, 224, 3] to symbols int8 [64, 7, 7], finest level."""
        if self.head is None:
            raise BundleError("this bundle has no head.safetensors: pictures cannot be answered, only latents")
        latent = self.head(torch.from_numpy(pixels)[None].to(self.device))[0]
        rounded: NDArray[np.int8] = latent.round().clamp(-MAX_SYMBOL, MAX_SYMBOL).to(torch.int8).cpu().numpy()
        return rounded


class DecodingBatch:
    """A batch of texts that are being decoded, each pass in the cheapest shape that holds it."""

    def __init__(
        self,
        decoder: TextDecoder,
        memory: Memory,
        texts: list[Text],
        shapes: Sequence[Shape],
        lookahead: Lookahead | None = None,
        speculative: Sequence[int] = (),
        samplers: Mapping[int, Sampler] | None = None,
    ) -> None:
        """speculative: the texts that get proposals of the lookahead when their draft has ended or is wrong.

        samplers: of the texts that are not written greedily.
        """
        self.lookahead, self.speculative, self.samplers = lookahead, frozenset(speculative), samplers or {}
        # The state from which each text's last token was chosen; zeros before the first.
        self.hidden = np.zeros((len(texts), decoder.shape.width), np.float32)
        self.decoder, self.memory, self.texts, self.shapes = decoder, memory, texts, shapes
        self.block = max(width for _, width in shapes)
        self.log_probabilities = [0.0] * len(texts)  # of each text so far; NaN: it failed
        self.unfinished = list(range(len(texts)))  # texts
        self.rows = self.unfinished  # their rows in the batch
        # It begins with zeros: nothing of an earlier text and no NaN is in it.
        self.cache = decoder.new_cache(len(texts), BLOCK)

    def step(self) -> Shape:
        """One pass over all rows: propose, choose, verify. Returns its shape."""
        self._propose_again()
        blocks = [next_block(self.texts[i], self._width) for i in self.unfinished]
        size, width = cheapest(self.shapes, len(blocks), max(map(len, blocks)))
        self._arrange(size)
        tokens = torch.full((size, width), BOS)
        start = torch.zeros(size, dtype=torch.int64)
        for row, (i, block) in enumerate(zip(self.unfinished, blocks, strict=True)):
            # The cache holds every token but the last. What the last pass wrote for rejected proposals lies behind
            # them and is overwritten before it becomes visible, so nothing has to be rolled back.
            tokens[row, : len(block)] = torch.tensor(block)
            start[row] = len(self.texts[i].tokens)
        device = self.memory[0][0].device
        hidden = self.decoder.read(tokens.to(device), start.to(device), self.memory, self.cache)
        logits = self.decoder.choose(hidden)
        best, states = logits.max(-1), hidden.cpu().numpy()
        # argmax takes a NaN for a token. Here it stays NaN, and infinite logits become NaN.
        totals = logits.logsumexp(-1)
        likeliest, log_probabilities = best.indices.tolist(), (best.values - totals).tolist()
        for row, (i, block) in enumerate(zip(self.unfinished, blocks, strict=True)):
            written, choices = self.texts[i].tokens, iter(likeliest[row][: len(block)])
            if sampler := self.samplers.get(i):
                choices = sampler.choices(logits[row, : len(block)].cpu().numpy(), written)
            self.texts[i] = verify(self.texts[i], choices)
            new = self.texts[i].tokens[len(written) :]
            gains = log_probabilities[row][: len(new)]
            if sampler:
                gains = (logits[row, range(len(new)), new] - totals[row, : len(new)]).tolist()
            self.log_probabilities[i] += sum(gains)
            self.hidden[i] = states[row, len(new) - 1]
        self.rows = [row for row, i in enumerate(self.unfinished) if not self.texts[i].is_done]
        self.unfinished = [self.unfinished[row] for row in self.rows]
        return size, width

    def _propose_again(self) -> None:
        for i in self.unfinished:
            text = self.texts[i]
            if self.lookahead and i in self.speculative and text.needs_proposals:
                last = text.tokens[-1] if text.tokens else BOS
                self.texts[i] = propose_again(text, self.lookahead.propose(self.hidden[i], last, self._width - 1))

    @property
    def _width(self) -> int:
        """How many tokens per row are worth their time now.

        For one row, a pass of eight tokens costs hardly more than a narrower one. For several rows, the cost grows with
        the tokens, while the later tokens of a draft are accepted less and less often.
        """
        if len(self.unfinished) > 1:
            return SHARED_BLOCK
        return LONE_BLOCK if (1, LONE_BLOCK) in self.shapes else self.block

    def _arrange(self, size: int) -> None:
        """Moves the unfinished rows to the front of a batch of this size, filled up with unused copies of the first."""
        rows = [*self.rows, *self.rows[:1] * (size - len(self.rows))]
        if rows == list(range(len(self.cache.keys[0]))):
            return
        index = torch.tensor(rows, device=self.memory[0][0].device)
        self.memory = [(keys[index], values[index]) for keys, values in self.memory]
        self.cache.keys = [keys[index] for keys in self.cache.keys]
        self.cache.values = [values[index] for values in self.cache.values]


def _evidence(features: Tensor, label_shares: Tensor, job: Job) -> Evidence:
    """One photo's features [N, 1280] and the probability of each label [labels]."""
    return Evidence(features.mean(0).cpu().numpy(), label_shares.cpu().numpy(), bool(job.labels))


def cheapest(shapes: Sequence[Shape], rows: int, width: int) -> Shape:
    """The shape with the fewest tokens that holds so many rows of such a width; of equal ones that with fewer rows."""
    return min((s for s in shapes if s[0] >= rows and s[1] >= width), key=lambda s: (s[0] * s[1], s[0]))


def encode_image(decoder: TextDecoder, features: Tensor, sizes: Sequence[int], words: Tensor | None = None) -> Memory:
    """The decoder's memory of features [B, N, 1280] and words of labels [B, label_words], in batches of these sizes."""
    seen = padded_batches(features, sizes)
    told = [None] * len(seen) if words is None else padded_batches(words, sizes)
    parts = [decoder.encode_image(part, labels) for part, labels in zip(seen, told, strict=True)]
    layers = zip(*parts, strict=True)
    return [
        (torch.cat([k for k, _ in layer])[: len(features)], torch.cat([v for _, v in layer])[: len(features)])
        for layer in layers
    ]


def padded_batches(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """[B, ...] cut into batches of these sizes; the last one is filled up with rows of zeros."""
    parts = list(torch.split(x, max(sizes)))
    missing = min(size for size in sizes if size >= len(parts[-1])) - len(parts[-1])
    parts[-1] = torch.cat([parts[-1], x.new_zeros(missing, *x.shape[1:])])
    return parts
