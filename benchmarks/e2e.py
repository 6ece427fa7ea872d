"""The case study: a board, brokers, an edge and a cloud server as processes, over thin links, on photos with captions.

Photos go to the board one at a time over its local broker, as camera software sends them. The next photo follows the
final event of the last one. The link simulator is between the board and the servers' broker. The figures come from the
board's events, as its users see them. Each paradigm has its own board. The boards take turns photo by photo; a trace is
played to one board after the other.

All processes share this machine's cores, so the times are this machine's. What counts is their ratio to `offload`,
which every run includes: a JPEG of quality 75 at the model's input size, and a text from the server alone.
`offload-small` is the same with the smallest JPEG that keeps the quality. `escalate` is `speculative` with an edge
server that passes answers it is not sure of up to the cloud.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.e2e_figures import BASELINE, PhotoOutcome, against_oracle, compared, outcome_of, slots_of
from benchmarks.e2e_site import DEADLINE_S, MeasuredBoard, Site, machine, run_site
from benchmarks.quality import Photos, proven_chain, score
from edge_runtime.capture.picture_files import Picture
from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.picture_checks import decode_picture
from testbed.link_simulator import LinkSimulator
from testbed.sample_photos import shrunk_jpeg
from testbed.shaping import Profile
from testbed.terminal import track

# The board's configured paradigm for each.
PARADIGMS = {
    "device": "device",
    "offload": "offload",
    "offload-small": "offload",
    "split": "split",
    "speculative": "speculative",
    "policy": "auto",
    "escalate": "speculative",
}
DEFAULT = tuple(name for name in PARADIGMS if name != "escalate")
NEEDS = {"escalate": "speculative"}  # its texts are exactly the cloud's

LOST_MS = 1e3 * DEADLINE_S  # the time of a lost photo
WARM_UP = 3  # photos that do not count: networks, connections and the policy's measurements are cold before them
SLOT_S = 20.0  # how long a trace with one entry plays

JPEG_QUALITY = 75
LADDER = (JPEG_QUALITY, 50, 35, 25, 15, 10, 5)
KEEP = 0.98  # of the baseline's CIDEr

MAX_FRAME_BYTES = 500_000  # camera software sends no larger files; boards accept them, at more work
LARGE_FRAME = 1024  # pixels; larger files are replaced by a picture whose longer side is this

Trace = Sequence[tuple[float, Profile]]


class E2eError(AiflowError, ValueError):
    """A run that cannot begin."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured, the same for all paradigms."""

    photos: Sequence[Picture]  # named as in the captions
    captions: Mapping[str, Sequence[str]]  # by photo
    slowdown: float = 1.0  # of the board's computation, 1 to 100
    unreadable: int = 0  # photos left out
    small_quality: int = JPEG_QUALITY  # JPEG quality of offload-small
    target: str = "bundle"  # of the cloud server, "bundle" or "lm"

    def __post_init__(self) -> None:
        if not 1 <= self.slowdown <= 100:
            raise E2eError(
                f"board slowdown = {self.slowdown}, want 1 to 100: this machine cannot simulate a faster board"
            )


def run(
    bundle: Bundle, case: Case, paradigms: Sequence[str], profiles: Sequence[Profile], trace: Trace = ()
) -> list[dict[str, Any]]:
    """The figures of each profile. A trace is played to each paradigm, after a warm-up on the profile.

    Raises E2eError, ProcessError, BrokerError, BundleError.
    """
    names = ordered(paradigms)
    if "offload-small" in names:
        case = replace(case, small_quality=smallest_jpeg(bundle, case))
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="aiflow-e2e-")))
        site = running.enter_context(run_site(bundle, folder, "escalate" in names, case.target))
        return [measure(site, case, names, profile, trace) for profile in profiles]


def ordered(paradigms: Sequence[str]) -> list[str]:
    """These paradigms and those they are compared with, the baseline first. Raises E2eError for unknown ones."""
    if unknown := [name for name in paradigms if name not in PARADIGMS]:
        raise E2eError(f"there is no paradigm {', '.join(unknown)}: want some of {', '.join(PARADIGMS)}")
    wanted = {*paradigms, *(NEEDS[name] for name in paradigms if name in NEEDS)}
    return [BASELINE, *(name for name in PARADIGMS if name in wanted and name != BASELINE)]


def case_of(photos: Photos, captions: Mapping[str, Sequence[str]], slowdown: float, target: str = "bundle") -> Case:
    """Photos as camera software sends them. Raises EvaluationError, E2eError."""
    fitting = [_fitting(photo) for photo in photos]
    return Case(fitting, captions, slowdown, unreadable=photos.unreadable, target=target)


def _fitting(photo: Picture) -> Picture:
    """The photo; shrunk, but not below the model's input size, if camera software would not send so large a file."""
    if len(photo.data) <= MAX_FRAME_BYTES:
        return photo
    return Picture(photo.name, shrunk_jpeg(decode_picture(photo.data), LARGE_FRAME, 90))


def smallest_jpeg(bundle: Bundle, case: Case) -> int:
    """The smallest JPEG quality of LADDER that keeps the baseline's CIDEr on these photos, without a network."""
    tier = "lm" if case.target == "lm" else "cloud"
    chain = proven_chain(bundle, "offload", tier, "onnx", threads=os.cpu_count() or 1)
    engine = chain.engine
    assert engine  # "offload" has a server

    def cider_of(quality: int) -> float:
        chain.plan = replace(chain.plan, jpeg_quality=quality)
        texts = {}
        for photo in track(case.photos, f"JPEG quality {quality}", len(case.photos)):
            answer = engine.answer([chain.job(chain.send(photo))])[0]
            texts[photo.name] = chain.text(answer)
        return score({name: case.captions[name] for name in texts}, texts)["cider"]

    return smallest_quality(cider_of)


def smallest_quality(cider_of: Callable[[int], float]) -> int:
    """The smallest quality of LADDER with at least KEEP of the first one's CIDEr."""
    floor = KEEP * cider_of(LADDER[0])
    return next((quality for quality in LADDER[:0:-1] if cider_of(quality) >= floor), LADDER[0])


def measure(site: Site, case: Case, names: Sequence[str], profile: Profile, trace: Trace) -> dict[str, Any]:
    """All paradigms over one link."""
    if trace:
        outcomes = {name: play_trace(site, case, name, profile, trace) for name in names}
    else:
        outcomes = play_in_turns(site, case, names, profile)
    figures = {
        "profile": profile.name,
        "images": len(case.photos),
        "unreadable": case.unreadable,
        "paradigms": compared(ciders(case, outcomes), outcomes, LOST_MS),
        "link": {"up_kbit": profile.up_kbit, "down_kbit": profile.down_kbit, "rtt_ms": profile.rtt_ms},
        "board_slowdown": case.slowdown,
        "small_jpeg_quality": case.small_quality if "offload-small" in names else None,
        "bundle": site.bundle.manifest.name,
        "target": case.target,
        "machine": machine(),
    }
    if trace:
        moments = [(seconds, each.name) for seconds, each in trace]
        slots = slots_of(moments, trace_end(trace), outcomes, LOST_MS)
        figures["trace"] = {"slots": slots} | against_oracle(slots)
    return figures


def play_in_turns(site: Site, case: Case, names: Sequence[str], profile: Profile) -> dict[str, list[PhotoOutcome]]:
    """Shows every photo to each paradigm in turn, so that other work on the machine affects all of them alike."""
    outcomes: dict[str, list[PhotoOutcome]] = {name: [] for name in names}
    with ExitStack() as running:
        boards = {name: running.enter_context(warm_board(site, case, name, profile))[1] for name in names}
        start = time.monotonic()
        for number, photo in enumerate(track(case.photos, profile.name, len(case.photos))):
            first = number % len(names)  # so that the order changes
            for name in (*names[first:], *names[:first]):
                at_s = time.monotonic() - start
                outcomes[name].append(outcome_of(photo.name, at_s, boards[name].show(photo.data)))
    return outcomes


def play_trace(site: Site, case: Case, name: str, profile: Profile, trace: Trace) -> list[PhotoOutcome]:
    """Shows photos as long as the trace lasts, from the first one again if necessary."""
    outcomes: list[PhotoOutcome] = []
    with warm_board(site, case, name, profile) as (link, board):
        link.play(trace)
        start = time.monotonic()
        for photo in track(_until(cycle(case.photos), start + trace_end(trace)), f"trace {name}"):
            at_s = time.monotonic() - start
            outcomes.append(outcome_of(photo.name, at_s, board.show(photo.data)))
    return outcomes


@contextmanager
def warm_board(site: Site, case: Case, name: str, profile: Profile) -> Iterator[tuple[LinkSimulator, MeasuredBoard]]:
    """A board of one paradigm behind its own link, after some warm-up photos."""
    quality = case.small_quality if name == "offload-small" else JPEG_QUALITY
    settings = {"paradigm": PARADIGMS[name], "slowdown": case.slowdown, "jpeg_quality": quality}
    broker = ("127.0.0.1", site.edge if name == "escalate" else site.cloud)
    with (
        LinkSimulator(broker, profile) as link,
        MeasuredBoard(site, f"{name}-{profile.name}"[:32], link, settings).run() as board,
    ):
        for photo in islice(cycle(case.photos), WARM_UP):
            board.show(photo.data)
        yield link, board


def trace_end(trace: Trace) -> float:
    """Duration of a trace in seconds: its last entry lasts as long as the one before."""
    last, before = trace[-1][0], trace[-2][0] if trace[1:] else -SLOT_S
    return 2 * last - before


def _until(photos: Iterator[Picture], end: float) -> Iterator[Picture]:
    while time.monotonic() < end:
        yield next(photos)


def ciders(case: Case, outcomes: Mapping[str, Sequence[PhotoOutcome]]) -> dict[str, float | None]:
    """CIDEr on the photos that every paradigm has seen: in a trace that may be few. None if there are none."""
    texts = {name: {outcome.photo: outcome.text for outcome in shown} for name, shown in outcomes.items()}
    common = set.intersection(*(set(of) for of in texts.values()))
    references = {name: case.captions[name] for name in sorted(common)}
    if not references:
        return dict.fromkeys(outcomes)
    return {name: score(references, {photo: of[photo] for photo in references})["cider"] for name, of in texts.items()}
