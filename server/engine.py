"""The target networks of a bundle on one device: symbols and drafts in, texts out.

Every pass has the same shape, whoever is in it: [B, BLOCK] tokens over a static cache. Plain decoding is a pass with
one real token. Libraries choose the order of sums by shape, so equal shapes are what makes a row's logits equal bit for
bit (He et al., "Defeating Nondeterminism in LLM Inference", 2025), and with them its text, whatever its draft and its
neighbours. Batch sizes other than one are used only where `numerics.prove` found the same bits; where the bits depend
on how a text is cut into blocks, drafts are ignored.

Knows nothing of messages, queues and deadlines.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edge_runtime.bundle import BOS, Bundle, BundleError
from models.family import LATENT, Classifier, DecoderShape, Head, Memory, Tail, TextDecoder
from server.verify import Text, new_text, next_block, verify

BLOCK = 16  # tokens a pass reads: a whole caption's draft; with 8, one row and many differ in bits on some CPUs
SIZES = (1, 4, 8)  # batch sizes, where proven
MAX_SYMBOL = 127
MAX_LABELS = 5  # likeliest labels of an answer

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Job:
    """What one text is written from."""

    symbols: NDArray[np.int8]  # [64, 7, 7]
    gain: float = 1.0  # of the symbols' level: symbols per unit of the head's output
    draft: tuple[int, ...] = ()  # any integers: what cannot be used is cut
    tier: str = "edge"
    max_tokens: int | None = None  # longest text, end token included; at most the bundle's
    wants_label: bool = False


@dataclass(frozen=True)
class Answer:
    """One text and how it came about. A target that computed no number has an `error`, and no tokens."""

    tokens: tuple[int, ...]  # without the end token
    accepted: int = 0  # proposed tokens that the target chose as well
    proposed: int = 0  # tokens of the draft that were usable
    passes: int = 0  # forward passes of the target
    confidence: float = 0.0  # geometric mean of the probabilities of its tokens, end token included
    scores: dict[str, float] = field(default_factory=dict)  # probability of the likeliest labels, best first
    error: str = ""
    stages_ms: dict[str, float] = field(default_factory=dict)  # of the whole batch: tail, look, passes


@dataclass(frozen=True)
class Proof:
    """What the start test found on this device: see numerics.prove."""

    # Batch sizes with the same bits as one row alone, by stage.
    tail_sizes: tuple[int, ...] = (1,)
    look_sizes: tuple[int, ...] = (1,)
    pass_sizes: tuple[int, ...] = (1,)
    may_speculate: bool = False  # bits do not depend on how a text is cut into blocks
    numerics: str = ""  # short id of the bits; servers with different ones may answer differently


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
        device: str = "cpu",
    ) -> None:
        self.tail, self.decoders, self.classifier, self.classes, self.head = tail, decoders, classifier, classes, head
        self.device = torch.device(device)
        self.proof = Proof()
        self.block = BLOCK  # benchmarks try others; a proof is for this one

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
            size = max(self.proof.pass_sizes)
            for batch in (rows[i : i + size] for i in range(0, len(rows), size)):
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
        texts = [
            new_text(
                job.draft if self.proof.may_speculate else (),
                shape.vocabulary,
                min(job.max_tokens or shape.max_tokens, shape.max_tokens),
            )
            for job in jobs
        ]
        started = time.perf_counter()
        memory = look(decoder, features, self.proof.look_sizes)
        looked = time.perf_counter()
        writing = Writing(decoder, memory, texts, self.proof.pass_sizes, self.block)
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
            counts = text.accepted, text.proposed, text.passes
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
    """A batch of texts being written. Its size is one of `sizes`; what the texts do not fill is idle padding."""

    def __init__(
        self, decoder: TextDecoder, memory: Memory, texts: list[Text], sizes: Sequence[int], block: int = BLOCK
    ) -> None:
        self.decoder, self.texts, self.sizes, self.block = decoder, texts, sizes, block
        self.log_probabilities = [0.0] * len(texts)  # of each text so far; NaN: it failed
        self.live = list(range(len(texts)))  # texts that are not finished; the first rows of the batch, in this order
        # Zeroed: nothing of an earlier text, and no NaN, is left in it.
        self.cache = decoder.new_cache(len(memory[0][0]), block)
        self.memory = memory
        self._keep_rows(self.live)

    def step(self) -> None:
        """One pass over all rows: choose, verify, drop the rows that are finished."""
        blocks = [next_block(self.texts[i], self.block) for i in self.live]
        tokens = torch.full((self.size, self.block), BOS)
        start = torch.zeros(self.size, dtype=torch.int64)
        for row, (i, block) in enumerate(zip(self.live, blocks, strict=True)):
            # The cache holds every token but the last. What the pass before wrote for rejected proposals is overwritten
            # before it becomes visible, so rolling back is not advancing.
            tokens[row, : len(block)] = torch.tensor(block)
            start[row] = len(self.texts[i].tokens)
        device = self.memory[0][0].device
        logits = self.decoder.step(tokens.to(device), start.to(device), self.memory, self.cache)
        best = logits.max(-1)
        # To argmax a NaN looks like a token. Here it stays NaN, and infinite logits become NaN.
        log_probabilities = (best.values - logits.logsumexp(-1)).tolist()
        for i, block, choices, gained in zip(self.live, blocks, best.indices.tolist(), log_probabilities, strict=False):
            before = self.texts[i]
            self.texts[i] = verify(before, choices[: len(block)])
            self.log_probabilities[i] += sum(gained[: len(self.texts[i].tokens) - len(before.tokens)])
        rows = [row for row, i in enumerate(self.live) if not self.texts[i].is_done]
        self.live = [self.live[row] for row in rows]
        if rows:
            self._keep_rows(rows)

    @property
    def size(self) -> int:
        """Rows of the batch, idle ones included."""
        return len(self.cache.keys[0])

    def _keep_rows(self, rows: list[int]) -> None:
        """Brings these rows to the front, in the smallest size that holds them."""
        size = fitting(len(rows), self.sizes)
        if rows == list(range(len(rows))) and size == self.size:
            return
        index = torch.tensor([*rows, *rows[:1] * (size - len(rows))], device=self.memory[0][0].device)
        self.memory = [(keys[index], values[index]) for keys, values in self.memory]
        self.cache.keys = [keys[index] for keys in self.cache.keys]
        self.cache.values = [values[index] for values in self.cache.values]


def look(decoder: TextDecoder, features: Tensor, sizes: Sequence[int]) -> Memory:
    """What the decoder sees of the image, for features [B, N, 1280], computed in batches of these sizes only."""
    parts = [decoder.look(part) for part in padded_batches(features, sizes)]
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


def load_engine(bundle: Bundle, tiers: Sequence[str], device: str = "cpu", threads: int = 1) -> Engine:
    """Loads the tail, the classifier, the float head if there is one, and these tiers' decoders, as float32.

    Sets torch's thread count for the whole process: bits depend on it. Raises BundleError.
    """
    torch.set_num_threads(threads)
    # On a GPU: float32 all through, and no algorithm that sums in another order at each run.
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    manifest = bundle.manifest
    if (manifest.latent.channels, manifest.latent.height, manifest.latent.width) != LATENT:
        raise BundleError(f"bundle {manifest.name} codes {manifest.latent}, this version's networks read {LATENT}")
    weights = load_weights(bundle, manifest.tail)
    decoders = {tier: _decoder(bundle, tier) for tier in tiers}
    tail = filled(Tail(), _below(weights, "tail."), manifest.tail)
    classifier, head = None, None
    if manifest.classes:
        classifier = filled(Classifier(len(manifest.classes)), _below(weights, "classifier."), manifest.tail)
    if "head.safetensors" in manifest.files:
        head = filled(Head(), load_weights(bundle, "head.safetensors"), "head.safetensors")
    for network in (tail, classifier, head, *decoders.values()):
        if network is not None:
            network.to(device)
    return Engine(tail, decoders, classifier, manifest.classes, head, device)


def _decoder(bundle: Bundle, tier: str) -> TextDecoder:
    target = bundle.manifest.targets.get(tier)
    if target is None:
        raise BundleError(f"bundle {bundle.manifest.name} has no target {tier}: it has {list(bundle.manifest.targets)}")
    shape = DecoderShape(
        bundle.manifest.vocabulary,
        target.width,
        target.heads,
        target.encoder_layers,
        target.decoder_layers,
        bundle.manifest.max_tokens,
    )
    return filled(TextDecoder(shape), load_weights(bundle, target.file), target.file)


def load_weights(bundle: Bundle, name: str) -> dict[str, Tensor]:
    """A safetensors file of the bundle, checked against its hash; as float32. Raises BundleError."""
    try:
        return {key: value.float() for key, value in load_file(bundle.file(name)).items()}
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{bundle.path / name} is no readable safetensors file: {error}") from error


def filled(network: Network, weights: dict[str, Tensor], name: str) -> Network:
    """The network with these weights, every one of them used and ready to serve. Raises BundleError."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise BundleError(f"{name} does not hold this network's weights: {error}") from error
    return network.eval().requires_grad_(False)


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
