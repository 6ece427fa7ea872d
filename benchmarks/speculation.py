"""Ways to write the same captions: a target alone, with the board's draft, with the server's own proposals, with both.

All ways run in one process on the same photos and take turns. The time until a caption is there includes writing the
draft, the link in both directions, and the batch that the caption is in. The link is added as a number; nothing waits
for it.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import truediv
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.server import Drafts, take_turns
from edge_runtime.inference.bundle import Bundle
from server.engine import Engine, Job
from server.loading import ready_engine
from testbed.terminal import markdown_table, short

if TYPE_CHECKING:
    from server.targets.huggingface_model import HuggingFaceModel
    from server.targets.huggingface_prompts import Job as TextJob

DELAYS_MS = (0, 30, 100)  # of a link, in one direction
BATCHES = (1, 8)
LOOKUP = 8  # tokens that assisted generation proposes per pass, as many as the phrases of `server/targets/phrases.py`


@dataclass(frozen=True, slots=True)
class Written:
    """One caption."""

    tokens: tuple[int, ...]
    passes: int  # in which one of its tokens was chosen


@dataclass(frozen=True, slots=True)
class Way:
    """One way to write captions, in batches of a size."""

    write: Callable[[int], list[Written]]
    has_draft: bool = False  # the board writes a draft before it asks


def run(
    bundle: Bundle,
    symbols: NDArray[np.int8],
    drafts: Drafts,
    draft_ms: float,
    tier: str = "cloud",
    rounds: int = 5,
    threads: int = 1,
    batches: Sequence[int] = BATCHES,
) -> dict[str, Any]:
    """A bundle's tier on symbols int8 [N, 64, 7, 7] of the default level, with a draft each. draft_ms: to write one."""
    engine = ready_engine(bundle, (tier,), threads=threads)
    level = bundle.manifest.latent.default_level
    jobs = [Job(s, level, draft=tuple(draft), tier=tier) for s, draft in zip(symbols, drafts, strict=True)]
    undrafted, own = ([replace(job, draft=draft) for job in jobs] for draft in (None, ()))
    ways = {
        "alone": Way(partial(_of_engine, engine, undrafted, True)),
        "board's draft": Way(partial(_of_engine, engine, jobs, False), has_draft=True),
        "server's proposals": Way(partial(_of_engine, engine, own, True)),
        "both": Way(partial(_of_engine, engine, jobs, True), has_draft=True),
    }
    about = {"target": f"{tier} of {bundle.manifest.name}", "proof": asdict(engine.proof)}
    return about | compare(ways, draft_ms, rounds, batches)


def run_hf(
    bundle: Bundle,
    pixels: Sequence[NDArray[np.uint8]],
    drafts: Drafts,
    draft_ms: float,
    model: str,
    rounds: int = 5,
    threads: int = 1,
    batches: Sequence[int] = BATCHES,
    assistant: str | None = None,
) -> dict[str, Any]:
    """A model of transformers on pictures uint8 [224, 224, 3] with a draft of the bundle's words each.

    model: see `HuggingFaceModel.load`. assistant: a smaller language model, for one more way. Raises TargetError.
    """
    from server.config import HuggingFaceConfig
    from server.prompts import QUESTION
    from server.targets.huggingface_model import HuggingFaceModel
    from server.targets.huggingface_prompts import Job as TextJob

    target, limit = HuggingFaceModel.load(model, threads=threads), HuggingFaceConfig().max_tokens
    jobs = [
        TextJob(QUESTION, picture, bundle.text(list(draft)), limit)
        for picture, draft in zip(pixels, drafts, strict=True)
    ]
    if assistant:
        target.add_assistant(assistant, threads=threads)
    return {"target": f"hf:{model}"} | _of_transformers(target, jobs, draft_ms, rounds, batches)


def run_language(
    bundle: Bundle,
    symbols: NDArray[np.int8],
    drafts: Drafts,
    draft_ms: float,
    rounds: int = 5,
    threads: int = 1,
) -> dict[str, Any]:
    """The target "lm" on symbols int8 [N, 64, 7, 7] of the default level with a draft each. Raises ConfigError.

    One at a time: each has the words of other labels in its prompt, so the prompts differ in length.
    """
    from benchmarks.language import LanguageEngine

    engine, level = LanguageEngine(bundle, threads), bundle.manifest.latent.default_level
    jobs = [engine.asked(Job(each, level, draft=tuple(draft))) for each, draft in zip(symbols, drafts, strict=True)]
    return {"target": "lm"} | _of_transformers(engine.model, jobs, draft_ms, rounds, (1,))


def _of_transformers(
    target: "HuggingFaceModel", jobs: Sequence["TextJob"], draft_ms: float, rounds: int, batches: Sequence[int]
) -> dict[str, Any]:
    from server.targets.huggingface_decoding import Row
    from server.targets.huggingface_model import PHRASES, together
    from server.targets.phrases import PhraseMemory

    loaded_assistant = target.assistant

    def answers(draft: str | None, size: int, has_draft: bool = False, has_assistant: bool = False) -> list[Written]:
        target.phrases = PhraseMemory(PHRASES)  # these photos were not asked about before
        target.assistant = loaded_assistant if has_assistant else None
        asked = jobs if has_draft else [replace(job, draft=draft) for job in jobs]
        written = [answer for part in _parts(asked, size) for answer in target.answer(part)]
        return [Written(answer.tokens, answer.passes) for answer in written]

    def drafted(size: int) -> list[Written]:
        rows = list[Row]()
        for part in _parts(jobs, size):
            texts = [target.row(job.max_tokens, target.drafts.tokens(job.draft or "")) for job in part]
            rows += target.decode(together([target.inputs(job) for job in part]), texts).rows
        return [Written(row.text.without_end, row.text.passes) for row in rows]

    def assisted(_: int) -> list[Written]:
        """Prompt lookup; transformers does it for one text at a time."""
        passes, written = list[int](), []
        hook = target.loaded.model.register_forward_hook(lambda *_: passes.append(1))
        settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "prompt_lookup_num_tokens": LOOKUP}
        ends = target.loaded.model.generation_config.eos_token_id
        for job in jobs:
            passes.clear()
            inputs = target.inputs(job)
            tokens = target.loaded.model.generate(**inputs, max_new_tokens=job.max_tokens, **settings)[0].tolist()
            if tokens[-1] in (ends if isinstance(ends, list) else [ends]):
                tokens.pop()
            written.append(Written(tuple(tokens), len(passes)))
        hook.remove()
        return written

    ways = {
        "alone": Way(partial(answers, None)),
        "board's draft": Way(drafted, has_draft=True),
        "server's proposals": Way(partial(answers, "")),
        "assisted generation": Way(assisted),
        "both": Way(partial(answers, None, has_draft=True), has_draft=True),
    }
    if any(job.image_tokens is not None for job in jobs):
        del ways["assisted generation"]  # it passes image tokens on to every pass, and not only to the first
    if loaded_assistant:
        ways["server's and assistant's proposals"] = Way(partial(answers, "", has_assistant=True))
    return {"proof": asdict(target.proof)} | compare(ways, draft_ms, rounds, batches)


def compare(ways: Mapping[str, Way], draft_ms: float, rounds: int, batches: Sequence[int]) -> dict[str, Any]:
    """By batch size and way: whether the tokens are those of "alone", passes, captions per second and times."""
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "draft_ms": draft_ms, "rounds": rounds}
    figures["batches"] = {}
    for size in batches:
        written, seconds, figures["clock"] = take_turns(
            {n: partial(way.write, size) for n, way in ways.items()}, rounds
        )
        alone = written["alone"]
        figures["captions"] = len(alone)
        figures["batches"][size] = {}
        for name, way in ways.items():
            took_s = statistics.median(seconds[name])
            passes = statistics.mean(each.passes for each in written[name])
            batch_ms = 1e3 * took_s / -(-len(alone) // size)
            before_ms = draft_ms if way.has_draft else 0.0
            figures["batches"][size][name] = {
                "same_tokens": statistics.mean(map(_is_same, written[name], alone)),
                "passes": passes,
                "per_second": len(alone) / took_s,
                "against_alone": statistics.median(map(truediv, seconds["alone"], seconds[name])),
                "ms_at_delay": {delay: before_ms + 2 * delay + batch_ms for delay in DELAYS_MS},
            }
    return figures


def markdown(figures: Mapping[str, Any]) -> str:
    """The figures as a table."""
    header = ["batch", "way", "same tokens", "passes", "captions per second", "against alone"]
    rows = [[*header, *(f"ms at {delay} ms" for delay in DELAYS_MS)]]
    for size, ways in figures["batches"].items():
        for name, way in ways.items():
            values = [way["same_tokens"], way["passes"], way["per_second"], way["against_alone"]]
            rows.append([str(size), name, *map(short, [*values, *way["ms_at_delay"].values()])])
    return markdown_table(rows)


def _of_engine(engine: Engine, jobs: Sequence[Job], looks_ahead: bool, size: int) -> list[Written]:
    before = engine.lookaheads
    engine.lookaheads = before if looks_ahead else {}
    answers = [answer for part in _parts(jobs, size) for answer in engine.answer(part)]
    engine.lookaheads = before
    return [Written(answer.tokens, answer.passes) for answer in answers]


def _parts(jobs: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [jobs[i : i + size] for i in range(0, len(jobs), size)]


def _is_same(one: Written, other: Written) -> bool:
    """A text of transformers comes with its prompt before it."""
    return one.tokens[len(one.tokens) - len(other.tokens) :] == other.tokens
