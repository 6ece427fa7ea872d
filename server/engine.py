"""The target networks of a bundle on one device: symbols and drafts in, texts out.

Libraries choose the order of sums by shape, so a token's bits may depend on what else is computed with it (He et al.,
"Defeating Nondeterminism in LLM Inference", 2025). Here a text is what one row writes alone in passes of [1, BLOCK]
tokens over a static cache, one of them real. Other shapes are used only where `numerics.prove` found the same bits, so
that a text is the same to the bit whatever its draft and its neighbours; where bits depend on how a text is cut into
blocks, drafts are ignored. Plain decoding and verification are one code path.

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
from models.family import Classifier, Head, Memory, Tail, TextDecoder
from models.lookahead import Lookahead
from server.verify import Text, new_text, next_block, redraft, verify

Shape = tuple[int, int]  # of a pass: rows, tokens a row

BLOCK = 16  # tokens a pass reads at most: a whole caption's draft
WIDTHS = (4, 8, BLOCK)  # tokens a pass reads, where proven: for many rows with little to verify, less is faster
SIZES = (1, 4, 8)  # batch sizes, where proven
LONE_BLOCK = 8  # tokens of a block that is alone in its pass: measured best of 4 to 8, 10, 12 and 16
SHARED_BLOCK = 4  # tokens of a block that is not alone in its pass: measured best of 4, 8 and 16 at batch 8
MAX_SYMBOL = 127
MAX_LABELS = 5  # likeliest labels of an answer


@dataclass(frozen=True)
class Job:
    """What one text is written from."""

    symbols: NDArray[np.int8]  # [64, 7, 7]
    gain: float = 1.0  # of the symbols' level: symbols per unit of the head's output
    draft: tuple[int, ...] | None = None  # any integers: what cannot be used is cut; None: the target writes alone
    tier: str = "edge"
    max_tokens: int | None = None  # longest text, end token included; at most the bundle's
    wants_label: bool = False


@dataclass(frozen=True)
class Answer:
    """One text and how it came about. A target that computed no number has an `error`, and no tokens."""

    tokens: tuple[int, ...]  # without the end token
    accepted: int = 0  # proposed tokens that the target chose as well
    proposed: int = 0  # tokens of the draft that were usable
    redrafted: int = 0  # tokens that the target chose as well, of what was proposed when the draft had gone wrong
    passes: int = 0  # forward passes of the target
    confidence: float = 0.0  # geometric mean of the probabilities of its tokens, end token included
    scores: dict[str, float] = field(default_factory=dict)  # probability of the likeliest labels, best first
    error: str = ""
    stages_ms: dict[str, float] = field(default_factory=dict)  # of the whole batch: tail, look, passes


@dataclass(frozen=True)
class Proof:
    """What the start test found on this device: see numerics.prove."""

    # Batch sizes and shapes with the same bits as one row alone, by stage.
    tail_sizes: tuple[int, ...] = (1,)
    look_sizes: tuple[int, ...] = (1,)
    shapes: tuple[Shape, ...] = ((1, BLOCK),)
    may_speculate: bool = False  # bits do not depend on how a text is cut into blocks
    numerics: str = ""  # short id of the bits; servers with different ones may answer differently

    @property
    def block(self) -> int:
        """Tokens that a pass reads at most."""
        return max(width for _, width in self.shapes)

    @property
    def rows(self) -> int:
        """Rows that a pass holds at most, at that width."""
        return max(size for size, width in self.shapes if width == self.block)


class Engine:
    """The tail that all targets share, and one text decoder a tier. For one thread.

    A `proof` must come from `numerics.prove` on the same device and thread count; without one, every row runs alone and
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
        device: str = "cpu",
    ) -> None:
        """lookaheads: by tier; without one, drafts that end or go wrong are not replaced."""
        self.tail, self.decoders, self.classifier, self.classes, self.head = tail, decoders, classifier, classes, head
        self.lookaheads = lookaheads or {}
        self.device = torch.device(device)
        self.proof = Proof()

    @torch.inference_mode()
    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        """The texts of any number of jobs, in their order."""
        started = time.perf_counter()
        latents = np.stack([job.symbols.astype(np.float32) / np.float32(job.gain) for job in jobs])
        features = self.features(torch.from_numpy(latents).to(self.device), self.proof.tail_sizes)
        tail_ms = 1e3 * (time.perf_counter() - started)
        answers: dict[int, Answer] = {}
        for tier in dict.fromkeys(job.tier for job in jobs):
            rows = [i for i, job in enumerate(jobs) if job.tier == tier]
            for batch in (rows[i : i + self.proof.rows] for i in range(0, len(rows), self.proof.rows)):
                written = self._write(tier, [jobs[i] for i in batch], features[batch], tail_ms)
                answers.update(zip(batch, written, strict=True))
        return [answers[i] for i in range(len(jobs))]

    def features(self, latents: Tensor, sizes: Sequence[int]) -> Tensor:
        """The tail in batches of these sizes: latents, float [B, 64, 7, 7], to features, float [B, N, 1280]."""
        # Channels last: a sixth faster on a CPU, and convolutions are meant to run so on a GPU.
        return in_batches(lambda x: self.tail(x.contiguous(memory_format=torch.channels_last)), latents, sizes)

    def _write(self, tier: str, jobs: Sequence[Job], features: Tensor, tail_ms: float) -> list[Answer]:
        decoder = self.decoders[tier]
        shape = decoder.shape
        drafts = [job.draft if self.proof.may_speculate else None for job in jobs]
        texts = [
            new_text(draft or (), shape.vocabulary, min(job.max_tokens or shape.max_tokens, shape.max_tokens))
            for job, draft in zip(jobs, drafts, strict=True)
        ]
        started = time.perf_counter()
        memory = look(decoder, features, self.proof.look_sizes)
        looked = time.perf_counter()
        drafted = [i for i, draft in enumerate(drafts) if draft is not None]
        writing = Writing(decoder, memory, texts, self.proof.shapes, self.lookaheads.get(tier), drafted)
        while writing.live:
            writing.step()
        done = time.perf_counter()
        stages = {"tail": tail_ms, "look": 1e3 * (looked - started), "passes": 1e3 * (done - looked)}
        answers = []
        for i, (job, text, log_probability) in enumerate(
            zip(jobs, writing.texts, writing.log_probabilities, strict=True)
        ):
            if not math.isfinite(log_probability):
                answers.append(Answer((), error=f"target {tier} computed no finite numbers", stages_ms=stages))
                continue
            confidence = math.exp(log_probability / len(text.tokens))
            scores = self._labels(features[i]) if job.wants_label else {}
            counts = text.accepted, text.proposed, text.redrafted, text.passes
            answers.append(Answer(text.without_end, *counts, confidence, scores, stages_ms=stages))
        return answers

    @torch.inference_mode()
    def classify(self, latents: Sequence[NDArray[np.int8]], gain: float = 1.0) -> list[dict[str, float]]:
        """Labels alone, without a text: latents int8 [64, 7, 7] each, to the probabilities of the likeliest labels."""
        symbols = torch.from_numpy(np.stack(latents).astype(np.float32) / np.float32(gain)).to(self.device)
        return [self._labels(row) for row in self.features(symbols, self.proof.tail_sizes)]

    def _labels(self, features: Tensor) -> dict[str, float]:
        if self.classifier is None:
            return {}
        best = self.classifier(features[None])[0].softmax(-1).topk(min(MAX_LABELS, len(self.classes)))
        return {self.classes[i]: p for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)}

    @torch.inference_mode()
    def symbols(self, pixels: NDArray[np.uint8]) -> NDArray[np.int8]:
        """The float head, for pictures that were sent whole: uint8 [224, 224, 3] to symbols int8 [64, 7, 7], gain 1."""
        if self.head is None:
            raise BundleError("this bundle has no head.safetensors: pictures cannot be answered, only latents")
        latent = self.head(torch.from_numpy(pixels)[None].to(self.device))[0]
        rounded: NDArray[np.int8] = latent.round().clamp(-MAX_SYMBOL, MAX_SYMBOL).to(torch.int8).cpu().numpy()
        return rounded


class Writing:
    """A batch of texts being written, each pass in the cheapest shape that holds it."""

    def __init__(
        self,
        decoder: TextDecoder,
        memory: Memory,
        texts: list[Text],
        shapes: Sequence[Shape],
        lookahead: Lookahead | None = None,
        drafted: Sequence[int] = (),
    ) -> None:
        """drafted: which of the texts get a new draft of the lookahead's, as soon as theirs ends or is wrong."""
        self.lookahead, self.drafted = lookahead, frozenset(drafted)
        # From which each text's last token was chosen; zeros before the first.
        self.hidden = np.zeros((len(texts), decoder.shape.width), np.float32)
        self.decoder, self.memory, self.texts, self.shapes = decoder, memory, texts, shapes
        self.block = max(width for _, width in shapes)
        self.log_probabilities = [0.0] * len(texts)  # of each text so far; NaN: it failed
        self.live = list(range(len(texts)))  # texts that are not finished
        self.rows = self.live  # and where in the batch they are
        # Zeroed: nothing of an earlier text, and no NaN, is left in it.
        self.cache = decoder.new_cache(len(texts), BLOCK)

    def step(self) -> Shape:
        """One pass over all rows: propose, choose, verify. Returns its shape."""
        self._redraft()
        blocks = [next_block(self.texts[i], self._width) for i in self.live]
        size, width = cheapest(self.shapes, len(blocks), max(map(len, blocks)))
        self._arrange(size)
        tokens = torch.full((size, width), BOS)
        start = torch.zeros(size, dtype=torch.int64)
        for row, (i, block) in enumerate(zip(self.live, blocks, strict=True)):
            # The cache holds every token but the last. What the pass before wrote for rejected proposals is overwritten
            # before it becomes visible, so rolling back is not advancing.
            tokens[row, : len(block)] = torch.tensor(block)
            start[row] = len(self.texts[i].tokens)
        device = self.memory[0][0].device
        hidden = self.decoder.read(tokens.to(device), start.to(device), self.memory, self.cache)
        logits = self.decoder.choose(hidden)
        best, states = logits.max(-1), hidden.cpu().numpy()
        # To argmax a NaN looks like a token. Here it stays NaN, and infinite logits become NaN.
        log_probabilities = (best.values - logits.logsumexp(-1)).tolist()
        found = zip(self.live, blocks, best.indices.tolist(), log_probabilities, states, strict=False)
        for i, block, choices, gains, row_states in found:
            before = len(self.texts[i].tokens)
            self.texts[i] = verify(self.texts[i], choices[: len(block)])
            written = len(self.texts[i].tokens) - before
            self.log_probabilities[i] += sum(gains[:written])
            self.hidden[i] = row_states[written - 1]
        self.rows = [row for row, i in enumerate(self.live) if not self.texts[i].is_done]
        self.live = [self.live[row] for row in self.rows]
        return size, width

    def _redraft(self) -> None:
        for i in self.live:
            text = self.texts[i]
            if self.lookahead and i in self.drafted and text.wants_redraft:
                last = text.tokens[-1] if text.tokens else BOS
                self.texts[i] = redraft(text, self.lookahead.propose(self.hidden[i], last, self._width - 1))

    @property
    def _width(self) -> int:
        """How many tokens of a block are worth their time now.

        Alone, a pass of eight costs hardly more than a narrower one; with neighbours its price grows with its tokens,
        while a draft's later tokens are accepted ever more rarely.
        """
        if len(self.live) > 1:
            return SHARED_BLOCK
        return LONE_BLOCK if (1, LONE_BLOCK) in self.shapes else self.block

    def _arrange(self, size: int) -> None:
        """Brings the live rows to the front of a batch of this size; copies of the first fill it up, idle."""
        rows = [*self.rows, *self.rows[:1] * (size - len(self.rows))]
        if rows == list(range(len(self.cache.keys[0]))):
            return
        index = torch.tensor(rows, device=self.memory[0][0].device)
        self.memory = [(keys[index], values[index]) for keys, values in self.memory]
        self.cache.keys = [keys[index] for keys in self.cache.keys]
        self.cache.values = [values[index] for values in self.cache.values]


def cheapest(shapes: Sequence[Shape], rows: int, width: int) -> Shape:
    """The shape with the fewest tokens that holds so many rows of so many tokens; of equals the one with fewer rows."""
    return min((s for s in shapes if s[0] >= rows and s[1] >= width), key=lambda s: (s[0] * s[1], s[0]))


def look(decoder: TextDecoder, features: Tensor, sizes: Sequence[int]) -> Memory:
    """What the decoder sees of the image, for features [B, N, 1280], computed in batches of these sizes only."""
    parts = [decoder.encode_image(part) for part in padded_batches(features, sizes)]
    layers = zip(*parts, strict=True)
    return [
        (torch.cat([k for k, _ in layer])[: len(features)], torch.cat([v for _, v in layer])[: len(features)])
        for layer in layers
    ]


def in_batches(network: Callable[[Tensor], Tensor], x: Tensor, sizes: Sequence[int]) -> Tensor:
    """A network over [B, ...], run in batches of these sizes only."""
    return torch.cat([network(part) for part in padded_batches(x, sizes)])[: len(x)]


def padded_batches(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """[B, ...] cut into batches of these sizes; the last is filled up with rows of zeros."""
    parts = list(torch.split(x, max(sizes)))
    missing = fitting(len(parts[-1]), sizes) - len(parts[-1])
    parts[-1] = torch.cat([parts[-1], x.new_zeros(missing, *x.shape[1:])])
    return parts


def fitting(rows: int, sizes: Sequence[int]) -> int:
    """The smallest of the sizes that holds so many rows."""
    return min(size for size in sizes if size >= rows)
