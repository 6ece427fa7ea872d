"""Parts of an event for people: changed words, times by stage, who answered, labels. Pure functions, without I/O."""

from collections.abc import Mapping
from difflib import SequenceMatcher

from edge_runtime.wire import Event


def marked(text: str, other: str) -> list[tuple[str, bool]]:
    """The words of a text, in runs. True: the other text does not have these words at that place."""
    words = text.split()
    matcher = SequenceMatcher(None, other.split(), words, autojunk=False)
    return [(" ".join(words[i:j]), tag != "equal") for tag, _, _, i, j in matcher.get_opcodes() if j > i]


def stages(event: Event) -> dict[str, float]:
    """Milliseconds from pixels to the last answer: the board's stages, the link, the servers'."""
    times = event.timings_ms
    names = ("resize", "head", "labels", "draft", "encode")
    board: dict[str, float] = {name: times[name] for name in names if name in times}
    if "answer" not in times:
        return board
    queue, compute = sum(hop.queue_ms for hop in event.hops), sum(hop.compute_ms for hop in event.hops)
    link = max(0.0, times["answer"] - queue - compute)
    return board | {"link": link, "queue": queue, "server": compute}


def answered_by(event: Event) -> str:
    if event.type == "lost":
        return "nobody, the draft is kept" if event.text else "nobody"
    by = event.answered_by
    return f"{by.tier} {by.server}".strip() if by else ""


def labels(scores: Mapping[str, float], count: int = 3) -> str:
    """The likeliest labels for people, such as "espresso 62 %, cup 20 %"."""
    likeliest = sorted(scores.items(), key=lambda each: -each[1])[:count]
    return ", ".join(f"{name} {share:.0%}".replace("%", " %") for name, share in likeliest)
