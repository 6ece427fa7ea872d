"""Captions per second of a server that verifies drafts, against writing alone; and the time of one pass.

    python -m benchmarks.server                      networks of the real size with random weights, invented drafts
    python -m benchmarks.server --threads 2

All ways run in one process on the same latents, with the same texts as result. They take turns, so that other work on
the machine affects them alike. One thread is timed in CPU seconds, which other programs do not change; more threads
are timed by the wall clock. `run` takes a real bundle with real latents and drafts.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as in server/__init__.py

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.inference.bundle import Bundle
from models.family import LATENT, DecoderShape, Tail, TextDecoder
from server.engine import BLOCK, SIZES, Answer, Engine, Job, Proof
from server.loading import load_engine
from server.numerics import prove

Drafts = Sequence[Sequence[int]]


def run(
    bundle: Bundle,
    symbols: NDArray[np.int8],
    drafts: Drafts,
    tier: str = "edge",
    batches: Sequence[int] = (1, 8),
    rounds: int = 5,
    threads: int = 1,
) -> dict[str, Any]:
    """A bundle's tier on symbols int8 [N, 64, 7, 7] of level 0 and one draft each; see `captions_per_second`."""
    engine = load_engine(bundle, (tier,), threads=threads)
    engine.proof = prove(engine)
    gain = bundle.manifest.latent.gains[0]
    jobs = [Job(s, gain, tuple(draft), tier) for s, draft in zip(symbols, drafts, strict=True)]
    return {"threads": threads, **captions_per_second(engine, jobs, batches, rounds)}


def captions_per_second(engine: Engine, jobs: Sequence[Job], batches: Sequence[int], rounds: int) -> dict[str, Any]:
    """Medians over rounds, by batch size, of four ways to write the same captions.

    verified: with the drafts. alone: the target by itself, with passes of the same shape. self_drafted: without a
    draft, with the server's own proposals. one_by_one: alone, with passes of one token, like a server that never
    verifies. Its texts may differ, so `same_texts` counts the equal ones.
    """
    undrafted, self_drafted = ([replace(job, draft=draft) for job in jobs] for draft in (None, ()))
    proven = engine.proof
    single = replace(proven, shapes=tuple((rows, 1) for rows in SIZES))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    result: dict[str, Any] = {
        "clock": clock.__name__,
        "captions": len(jobs),
        "proof": asdict(engine.proof),
        "batches": {},
    }
    for size in batches:
        ways: dict[str, Callable[[], list[Answer]]] = {
            "verified": partial(_write, engine, jobs, size, proven),
            "alone": partial(_write, engine, undrafted, size, proven),
            "self_drafted": partial(_write, engine, self_drafted, size, proven),
            "one_by_one": partial(_write, engine, undrafted, size, single),
        }
        answers = {name: way() for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                started = clock()
                way()
                seconds[name].append(clock() - started)
        ratios = [alone / verified for alone, verified in zip(seconds["alone"], seconds["verified"], strict=True)]
        versus_one = [one / verified for one, verified in zip(seconds["one_by_one"], seconds["verified"], strict=True)]
        result["batches"][size] = {
            "per_second": {name: round(len(jobs) / statistics.median(s), 2) for name, s in seconds.items()},
            "passes": {name: round(statistics.mean(a.passes for a in answers[name]), 3) for name in ways},
            "verified_to_alone": round(statistics.median(ratios), 3),
            "verified_to_one_by_one": round(statistics.median(versus_one), 3),
            "same_texts": {name: _same(answers["alone"], answers[name]) for name in ways},
        }
    verified = [engine.answer([job])[0] for job in jobs]
    result["proposed"] = sum(answer.proposed for answer in verified)
    result["accepted"] = sum(answer.accepted for answer in verified)
    result["redrafted"] = sum(answer.redrafted for answer in verified)
    result["tokens"] = sum(len(answer.tokens) for answer in verified)
    return result


def _write(engine: Engine, jobs: Sequence[Job], size: int, proof: Proof) -> list[Answer]:
    before, engine.proof = engine.proof, proof
    answers = [answer for i in range(0, len(jobs), size) for answer in engine.answer(jobs[i : i + size])]
    engine.proof = before
    return answers


def pass_costs(
    decoder: TextDecoder, widths: Sequence[int] = (1, 4, 8, 16), sizes: Sequence[int] = (1, 4, 8), seconds: float = 10.0
) -> dict[str, dict[str, float]]:
    """Milliseconds of one pass by batch size and width: minimum and median."""
    cases: dict[str, tuple[Callable[[], Any], list[float]]] = {}
    with torch.inference_mode():
        for size in sizes:
            memory = decoder.encode_image(torch.rand(size, 49, 1280))
            for width in widths:
                tokens, start = torch.randint(4, decoder.shape.vocabulary, (size, width)), torch.full((size,), 5)
                cache = decoder.new_cache(size, BLOCK)
                cases[f"B={size} W={width}"] = (partial(decoder.step, tokens, start, memory, cache), [])
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for call, times in cases.values():
                started = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - started))
    return {
        name: {"min_ms": round(min(times), 2), "median_ms": round(statistics.median(times), 2)}
        for name, (_, times) in cases.items()
    }


def made_up_drafts(texts: Drafts, agreement: float, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Drafts in which each token is the target's with this probability, and otherwise a random word."""
    chosen = random.Random(seed)
    return [[t if chosen.random() < agreement else chosen.randrange(4, vocabulary) for t in text] for text in texts]


def _same(texts: Sequence[Answer], others: Sequence[Answer]) -> float:
    return sum(a.tokens == b.tokens for a, b in zip(texts, others, strict=True)) / len(texts)


def _random_engine(shape: DecoderShape) -> Engine:
    torch.manual_seed(0)
    decoder = TextDecoder(shape)
    torch.nn.init.normal_(decoder.norm.weight)  # otherwise tied embeddings repeat one token without end
    engine = Engine(Tail().eval(), {"edge": decoder.eval().requires_grad_(False)})
    engine.proof = prove(engine)
    return engine


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="for the cost of passes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = DecoderShape(vocabulary=2900)
    engine = _random_engine(shape)
    result: dict[str, Any] = {
        "threads": arguments.threads,
        "pass_costs": pass_costs(engine.decoders["edge"], seconds=arguments.seconds),
    }
    symbols = np.random.default_rng(0).laplace(0, 1.5, (arguments.captions, *LATENT)).round().astype(np.int8)
    plain = [Job(s, max_tokens=13) for s in symbols]  # the length of a caption
    texts = [answer.tokens for answer in engine.answer(plain)]
    for agreement in (0.5, 0.75, 0.9):
        drafts = made_up_drafts(texts, agreement, shape.vocabulary)
        jobs = [Job(j.symbols, draft=tuple(draft), max_tokens=13) for j, draft in zip(plain, drafts, strict=True)]
        result[f"agreement {agreement}"] = captions_per_second(engine, jobs, (1, 8), arguments.rounds)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
