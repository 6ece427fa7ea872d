"""The whole chain over thin links: a board, brokers, an edge and a cloud server as processes, photos with captions.

Photos go to the board one at a time over its local broker, as camera software would send them, each when the last one's
final event has come; between the board and the servers' broker is the link simulator. What is told is what a user of
the board sees: its events, and on its clock. Each paradigm is a board of its own, and they take turns photo by photo;
a trace is played to one after the other.

Everything shares this machine's cores, the board's slowdown included, so times are this machine's: what counts is their
ratio to `offload`, which every run has: a JPEG of quality 75 at the model's input size, and a text from the server
alone. `offload-small` is the same with the smallest JPEG that keeps the quality. `escalate` is `speculative` towards an
edge server that passes to the cloud what it is not sure of.
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

import cv2

from benchmarks.e2e_figures import BASELINE, Outcome, against_oracle, compared, outcome_of, slots_of
from benchmarks.e2e_site import DEADLINE_S, Board, Site, machine, site
from edge_runtime.capture.picture_checks import decode_picture
from edge_runtime.capture.picture_files import Picture
from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import Bundle
from firmware_tools.evaluate import Chain, Photos, score
from testbed.link_simulator import Link
from testbed.shaping import Profile
from testbed.terminal import track

# What the board is configured as for each.
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
NEEDS = {"escalate": "speculative"}  # whose texts are the cloud's own

LOST_MS = 1e3 * DEADLINE_S  # what a lost photo counts as in times
WARM_UP = 3  # photos that do not count: before them networks, connections and a policy's estimates are cold
SLOT_S = 20.0  # how long a trace of one moment plays

JPEG_QUALITY = 75
LADDER = (JPEG_QUALITY, 50, 35, 25, 15, 10, 5)
KEEP = 0.98  # of the baseline's CIDEr

MAX_FRAME_BYTES = 500_000  # of what camera software sends; boards take more, at more work
LARGE_FRAME = 1024  # pixels; the longer side of what replaces a larger file

Trace = Sequence[tuple[float, Profile]]


class E2eError(AiflowError, ValueError):
    """A run that cannot begin."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured on, the same for all paradigms."""

    photos: Sequence[Picture]  # named as in the captions
    captions: Mapping[str, Sequence[str]]  # people's, by photo
    slowdown: float = 1.0  # of the board's computing, 1 to 100
    unreadable: int = 0  # photos that were left out
    small_quality: int = JPEG_QUALITY  # of offload-small

    def __post_init__(self) -> None:
        if not 1 <= self.slowdown <= 100:
            raise E2eError(
                f"board slowdown = {self.slowdown}, want 1 to 100: this machine cannot rehearse a faster one"
            )


def run(
    bundle: Bundle, case: Case, paradigms: Sequence[str], profiles: Sequence[Profile], trace: Trace = ()
) -> list[dict[str, Any]]:
    """The figures of each profile. A trace is played for each paradigm from its start, warmed up on the profile.

    Raises E2eError, ChildError, BrokerError, BundleError.
    """
    names = ordered(paradigms)
    if "offload-small" in names:
        case = replace(case, small_quality=smallest_jpeg(bundle, case))
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="aiflow-e2e-")))
        stage = running.enter_context(site(bundle, folder, "escalate" in names))
        return [measure(stage, case, names, profile, trace) for profile in profiles]


def ordered(paradigms: Sequence[str]) -> list[str]:
    """These and what they are compared with, the baseline first. Raises E2eError for others."""
    if unknown := [name for name in paradigms if name not in PARADIGMS]:
        raise E2eError(f"there is no paradigm {', '.join(unknown)}: want some of {', '.join(PARADIGMS)}")
    wanted = {*paradigms, *(NEEDS[name] for name in paradigms if name in NEEDS)}
    return [BASELINE, *(name for name in PARADIGMS if name in wanted and name != BASELINE)]


def case_of(photos: Photos, captions: Mapping[str, Sequence[str]], slowdown: float) -> Case:
    """Photos as camera software would send them. Raises EvaluationError, E2eError."""
    fitting = [_fitting(photo) for photo in photos]
    return Case(fitting, captions, slowdown, unreadable=photos.unreadable)


def _fitting(photo: Picture) -> Picture:
    """As it is, or as camera software would shrink it for a board: still larger than what the model looks at."""
    if len(photo.data) <= MAX_FRAME_BYTES:
        return photo
    pixels = decode_picture(photo.data)
    scale = min(1.0, LARGE_FRAME / max(pixels.shape[:2]))
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    return Picture(photo.name, jpeg.tobytes())


def smallest_jpeg(bundle: Bundle, case: Case) -> int:
    """The smallest quality of the ladder that keeps the baseline's CIDEr on these photos, without a network between."""
    from server.loading import load_engine

    engine = load_engine(bundle, ["cloud"], threads=os.cpu_count() or 1)
    chain = Chain(bundle, "offload", "onnx", "cloud", engine)

    def cider_of(quality: int) -> float:
        chain.plan = replace(chain.plan, jpeg_quality=quality)
        texts = {}
        for photo in track(case.photos, f"JPEG quality {quality}", len(case.photos)):
            answer = engine.answer([chain.job(chain.send(photo))])[0]
            texts[photo.name] = bundle.text(list(answer.tokens))
        return score({name: case.captions[name] for name in texts}, texts)["cider"]

    return smallest_quality(cider_of)


def smallest_quality(cider_of: Callable[[int], float]) -> int:
    """The smallest of LADDER that keeps KEEP of what the first gets."""
    floor = KEEP * cider_of(LADDER[0])
    return next((quality for quality in LADDER[:0:-1] if cider_of(quality) >= floor), LADDER[0])


def measure(stage: Site, case: Case, names: Sequence[str], profile: Profile, trace: Trace) -> dict[str, Any]:
    """All paradigms over one link."""
    if trace:
        outcomes = {name: play_trace(stage, case, name, profile, trace) for name in names}
    else:
        outcomes = play_in_turns(stage, case, names, profile)
    figures = {
        "profile": profile.name,
        "images": len(case.photos),
        "unreadable": case.unreadable,
        "paradigms": compared(ciders(case, outcomes), outcomes, LOST_MS),
        "link": {"up_kbit": profile.up_kbit, "down_kbit": profile.down_kbit, "rtt_ms": profile.rtt_ms},
        "board_slowdown": case.slowdown,
        "small_jpeg_quality": case.small_quality if "offload-small" in names else None,
        "bundle": stage.bundle.manifest.name,
        "machine": machine(),
    }
    if trace:
        moments = [(seconds, each.name) for seconds, each in trace]
        slots = slots_of(moments, trace_end(trace), outcomes, LOST_MS)
        figures["trace"] = {"slots": slots} | against_oracle(slots)
    return figures


def play_in_turns(stage: Site, case: Case, names: Sequence[str], profile: Profile) -> dict[str, list[Outcome]]:
    """Every photo once for each paradigm, one after the other: what else the machine does then falls on all alike."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    with ExitStack() as running:
        boards = {name: running.enter_context(warm_board(stage, case, name, profile))[1] for name in names}
        start = time.monotonic()
        for number, photo in enumerate(track(case.photos, profile.name, len(case.photos))):
            first = number % len(names)  # nobody always comes behind the same other
            for name in (*names[first:], *names[:first]):
                at_s = time.monotonic() - start
                outcomes[name].append(outcome_of(photo.name, at_s, boards[name].show(photo.data)))
    return outcomes


def play_trace(stage: Site, case: Case, name: str, profile: Profile, trace: Trace) -> list[Outcome]:
    """As many photos as a trace lasts, from the first again."""
    outcomes: list[Outcome] = []
    with warm_board(stage, case, name, profile) as (link, board):
        link.play(trace)
        start = time.monotonic()
        for photo in track(_until(cycle(case.photos), start + trace_end(trace)), f"trace {name}"):
            at_s = time.monotonic() - start
            outcomes.append(outcome_of(photo.name, at_s, board.show(photo.data)))
    return outcomes


@contextmanager
def warm_board(stage: Site, case: Case, name: str, profile: Profile) -> Iterator[tuple[Link, Board]]:
    """A board of one paradigm behind a link of its own, which has seen some photos."""
    quality = case.small_quality if name == "offload-small" else JPEG_QUALITY
    settings = {"paradigm": PARADIGMS[name], "slowdown": case.slowdown, "jpeg_quality": quality}
    broker = ("127.0.0.1", stage.edge if name == "escalate" else stage.cloud)
    with Link(broker, profile) as link, Board(stage, f"{name}-{profile.name}"[:32], link, settings) as board:
        for photo in islice(cycle(case.photos), WARM_UP):
            board.show(photo.data)
        yield link, board


def trace_end(trace: Trace) -> float:
    """Seconds until a trace is over: its last moment lasts as long as the one before."""
    last, before = trace[-1][0], trace[-2][0] if trace[1:] else -SLOT_S
    return 2 * last - before


def _until(photos: Iterator[Picture], end: float) -> Iterator[Picture]:
    while time.monotonic() < end:
        yield next(photos)


def ciders(case: Case, outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, float | None]:
    """CIDEr on the photos that every paradigm has seen, which in a trace need not be all; None where there are none."""
    texts = {name: {outcome.photo: outcome.text for outcome in seen} for name, seen in outcomes.items()}
    common = set.intersection(*(set(of) for of in texts.values()))
    references = {name: case.captions[name] for name in sorted(common)}
    if not references:
        return dict.fromkeys(outcomes)
    return {name: score(references, {photo: of[photo] for photo in references})["cider"] for name, of in texts.items()}
