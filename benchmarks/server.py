"""Captions per second of a server that verifies drafts, against writing alone.

All ways run in one process on the same latents, with the same texts as result. They take turns, so that other work on
the machine affects them alike. One thread is timed in CPU seconds, which other programs do not change; more threads
are timed by the wall clock.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from operator import truediv
from typing import Any, TypeVar

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as in server/__init__.py

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.inference.bundle import Bundle
from server.engine import SIZES, Engine, Job, Proof
from server.loading import load_engine, ready_engine
from server.numerics import prove
from server.targets import Answer

Drafts = Sequence[Sequence[int]]
Result = TypeVar("Result")


def run(
    bundle: Bundle,
    symbols: NDArray[np.int8],
    drafts: Drafts,
    tier: str = "edge",
    batches: Sequence[int] = (1, 8),
    rounds: int = 5,
    threads: int = 1,
) -> dict[str, Any]:
    """A bundle's tier on symbols int8 [N, 64, 7, 7] of the default level, with a draft each: `captions_per_second`."""
    engine, plain = ready_engine(bundle, (tier,), threads=threads), load_engine(bundle, (tier,), threads=threads)
    plain.proof = prove(plain)
    level = bundle.manifest.latent.default_level
    jobs = [Job(s, level, draft=tuple(draft), tier=tier) for s, draft in zip(symbols, drafts, strict=True)]
    return {"threads": threads, **captions_per_second(engine, plain, jobs, batches, rounds)}


def captions_per_second(
    engine: Engine, plain: Engine, jobs: Sequence[Job], batches: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Medians over rounds, by batch size, of five ways to write the same captions.

    verified: with the drafts. alone: the target by itself, with passes of the same shape. self_drafted: without a
    draft, with the server's own proposals. one_by_one: alone, with passes of one token, like a server that never
    verifies. unpacked: with the drafts, by `plain`, an engine whose weights are not packed (server/packed.py). The
    texts of one_by_one and unpacked may differ, so `same_texts` counts the equal ones.
    """
    undrafted, self_drafted = ([replace(job, draft=draft) for job in jobs] for draft in (None, ()))
    proven = engine.proof
    single = replace(proven, shapes=tuple((rows, 1) for rows in SIZES))
    result: dict[str, Any] = {"captions": len(jobs), "proof": asdict(engine.proof), "batches": {}}
    for size in batches:
        ways: dict[str, Callable[[], list[Answer]]] = {
            "verified": partial(_write, engine, jobs, size, proven),
            "alone": partial(_write, engine, undrafted, size, proven),
            "self_drafted": partial(_write, engine, self_drafted, size, proven),
            "one_by_one": partial(_write, engine, undrafted, size, single),
            "unpacked": partial(_write, plain, jobs, size, plain.proof),
        }
        answers, seconds, result["clock"] = take_turns(ways, rounds)
        faster = {
            way: round(statistics.median(map(truediv, seconds[way], seconds["verified"])), 3)
            for way in ("alone", "one_by_one", "unpacked")
        }
        result["batches"][size] = {
            "per_second": {name: round(len(jobs) / statistics.median(s), 2) for name, s in seconds.items()},
            "passes": {name: round(statistics.mean(a.passes for a in answers[name]), 3) for name in ways},
            **{f"verified_to_{way}": ratio for way, ratio in faster.items()},
            "same_texts": {name: _same(answers["alone"], answers[name]) for name in ways},
        }
    verified = [engine.answer([job])[0] for job in jobs]
    result["proposed"] = sum(answer.proposed for answer in verified)
    result["accepted"] = sum(answer.accepted for answer in verified)
    result["accepted_again"] = sum(answer.accepted_again for answer in verified)
    result["tokens"] = sum(len(answer.tokens) for answer in verified)
    return result


def take_turns(
    ways: Mapping[str, Callable[[], Result]], rounds: int
) -> tuple[dict[str, Result], dict[str, list[float]], str]:
    """The result of each way, and its seconds in each round by the clock of this name, after a round that warms up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    results = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = clock()
            way()
            seconds[name].append(clock() - started)
    return results, seconds, clock.__name__


def _write(engine: Engine, jobs: Sequence[Job], size: int, proof: Proof) -> list[Answer]:
    before, engine.proof = engine.proof, proof
    answers = [answer for i in range(0, len(jobs), size) for answer in engine.answer(jobs[i : i + size])]
    engine.proof = before
    return answers


def _same(texts: Sequence[Answer], others: Sequence[Answer]) -> float:
    return sum(a.tokens == b.tokens for a, b in zip(texts, others, strict=True)) / len(texts)
