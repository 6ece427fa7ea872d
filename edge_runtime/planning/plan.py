"""The plan of one frame, and the protocol of a planner: what the pipeline needs to know of this package."""

from dataclasses import dataclass
from math import inf
from typing import Protocol

from edge_runtime.wire import Options, Tier
from edge_runtime.wire.envelope import GREEDY
from edge_runtime.wire.event import Explain, ParadigmName


@dataclass(frozen=True, slots=True)
class Plan:
    """How one frame is answered. It is made before the frame is looked at, and it never changes."""

    paradigm: ParadigmName
    why: str  # for people; part of every event
    budget_ms: int  # from the capture of the frame to its deadline
    tier: Tier | None = None  # the tier that shall answer; None: any
    level: int | None = None  # the finest level of the features that is sent; None: the bundle's default
    groups: int | None = None  # of the latent's channels; None: all
    max_bytes: int | None = None  # of the features; a coarser level is sent if they are longer. None: no limit
    jpeg_quality: int = 75  # 1..100, of the picture that offload sends
    picture_pixels: int | None = None  # its longest side; None: it is the head's input
    explain: Explain | None = None  # the same as `why` for programs, with the numbers behind the decision
    writes_draft: bool = True  # False: no CPU time for a draft that is only shown, not sent
    sends_draft: bool = False  # of offload: the draft goes with the picture; speculative always sends it
    # Accept a draft with at least this confidence without verification. None: verify every draft.
    min_confidence: float | None = None
    # Use an earlier answer again if the frame differs from the answered one by at most this: see inference/reuse.py.
    reuse_distance: float = 0.0  # 0: never
    reuse_s: float = 60.0  # seconds between the two frames, at most
    keep: bool = False  # the link is away: store the request in the outbox, do not send it now
    questions: tuple[str, ...] = ()  # taught ones, which the server is to answer
    prompt: str = ""  # what a server is to ask, by its name; empty: its usual prompt
    sampling: Options = GREEDY  # those that say how the tokens of draft and text are chosen
    camera: str = ""  # to name with a picture; empty: the board has only this one
    propose: bool = False  # the server may propose tokens itself if the request contains no draft

    def accepts(self, confidence: float) -> bool:
        """Whether a draft of this confidence needs no verification. False for NaN and infinity."""
        return self.min_confidence is not None and self.min_confidence <= confidence < inf


class Planner(Protocol):
    """Chooses how frames are answered, and learns from what happened."""

    def plan(self, camera: str) -> Plan:
        """The plan of this camera's next frame."""

    def learn(self, plan: Plan, timings_ms: dict[str, float], confidence: float | None) -> None:
        """Called after each frame. timings_ms: by stage; confidence: of the draft, None if there was none."""


class FixedPlanner:
    """Returns the same plan for every frame."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def plan(self, camera: str) -> Plan:
        return self._plan

    def learn(self, plan: Plan, timings_ms: dict[str, float], confidence: float | None) -> None:
        pass
