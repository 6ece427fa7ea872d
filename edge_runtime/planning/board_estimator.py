"""Learns what the stages of a frame take on this board, and how busy and hot it is."""

from collections.abc import Mapping
from dataclasses import dataclass

from edge_runtime.planning.recent_values import RecentValues
from edge_runtime.planning.thermal import ThermalState

STAGES = ("resize", "head", "draft", "labels", "encode", "picture")  # encode: a latent; picture: a JPEG


@dataclass(frozen=True, slots=True)
class BoardSnapshot:
    """None: not known. Times are medians of the latest frames."""

    resize_ms: float | None = None
    head_ms: float | None = None
    draft_ms: float | None = None
    labels_ms: float | None = None
    encode_ms: float | None = None  # of a latent
    picture_ms: float | None = None  # encoding of a JPEG
    accepted_unverified_share: float | None = None  # of the latest drafts, 0..1
    temperature_c: float | None = None
    throttled: bool | None = None
    interval_ms: float | None = None  # between frames
    cpu_share: float | None = None  # of one core, used by the stages of the frames, 0..1


class BoardEstimator:
    """Times are seconds of one clock."""

    def __init__(self) -> None:
        self.thermal = ThermalState()
        self._stages = {stage: RecentValues() for stage in STAGES}
        self._busy_ms, self._interval_ms = RecentValues(), RecentValues()
        self._last_frame: float | None = None
        self._accepted_unverified = RecentValues(32)

    def frame_handled(self, stages_ms: Mapping[str, float], at: float) -> None:
        """stages_ms: by the names in STAGES."""
        for stage, ms in stages_ms.items():
            self._stages[stage].add(ms, at)
        self._busy_ms.add(sum(stages_ms.values()), at)
        if self._last_frame is not None:
            self._interval_ms.add(1e3 * max(0.0, at - self._last_frame), at)
        self._last_frame = max(at, self._last_frame or 0.0)

    def draft_written(self, accepted_unverified: bool, at: float) -> None:
        self._accepted_unverified.add(float(accepted_unverified), at)

    def snapshot(self, now: float) -> BoardSnapshot:
        interval, busy = self._interval_ms.median(now), self._busy_ms.median(now)
        return BoardSnapshot(
            **{f"{stage}_ms": recent.median(now) for stage, recent in self._stages.items()},
            accepted_unverified_share=self._accepted_unverified.mean(now),
            temperature_c=self.thermal.temperature_c,
            throttled=self.thermal.throttled,
            interval_ms=interval,
            cpu_share=min(1.0, busy / interval) if busy is not None and interval else None,
        )
