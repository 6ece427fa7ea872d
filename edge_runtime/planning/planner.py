"""The planner of a board: makes the plan of each frame from configuration, remote settings and measurements.

If the paradigm is "auto", the policy chooses it (policy.py), from what the board has measured (measurements.py).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from edge_runtime.config import RuntimeConfig
from edge_runtime.inference.draft_calibration import Calibration
from edge_runtime.planning.measurements import Measurements
from edge_runtime.planning.plan import Plan
from edge_runtime.planning.policy import Policy
from edge_runtime.planning.thermal import ThermalReader
from edge_runtime.reporting.remote_settings import NO_PROMPT, RemoteSettings
from edge_runtime.wire import Options, Tier
from edge_runtime.wire.envelope import GREEDY
from edge_runtime.wire.event import Explain, ParadigmName

if TYPE_CHECKING:
    from edge_runtime.capture.cameras import Cameras  # loads OpenCV, which `aiflow doctor` must do without


class BoardPlanner:
    """Used by the frame path's thread only."""

    def __init__(
        self,
        config: RuntimeConfig,
        cameras: "Cameras",
        settings: RemoteSettings,
        measurements: Measurements,
        calibration: Calibration,
        *,
        has_head: bool = True,
        has_draft: bool = True,
        level_bytes: Sequence[float] = (),
        has_room: Callable[[], bool] = lambda: True,
        sampling: Mapping[str, Options] | None = None,
    ) -> None:
        """calibration: of the bundle's drafts; level_bytes: of usual features at each level, if it has several;
        has_room: whether one more request may wait for its reply; sampling: the options that say how
        tokens are chosen, by camera.
        """
        self._sampling = sampling or {}
        self._board, self._has_outbox, self._has_room = config.board, config.outbox is not None, has_room
        self._cameras, self._settings, self._measurements = cameras, settings, measurements
        # One policy per camera: their deadlines and loads differ.
        self._policies = {
            camera.config.name: Policy(config.policy, has_head=has_head, has_draft=has_draft, level_bytes=level_bytes)
            for camera in cameras
        }
        self._min_confidence = lru_cache(maxsize=8)(calibration.min_confidence)
        self._thermal = ThermalReader()

    def plan(self, camera: str) -> Plan:
        """The camera's own settings take precedence over the board's. Raises KeyError for an unknown camera."""
        board, own = self._board, self._cameras[camera].config
        paradigm, tier = own.paradigm or self._settings["paradigm"], own.tier or board.tier
        prompt = self._settings[f"{camera}_prompt"]
        plan = Plan(
            "device",
            "configured",
            own.deadline_ms or board.deadline_ms,
            Tier[tier.upper()] if tier else None,
            level=board.level,
            groups=board.groups,
            max_bytes=board.max_bytes,
            jpeg_quality=board.jpeg_quality,
            picture_pixels=board.picture_pixels,
            questions=own.questions,
            prompt="" if prompt == NO_PROMPT else prompt,
            sampling=self._sampling.get(camera, GREEDY),
            camera=camera if len(self._policies) > 1 else "",
            reuse_distance=own.reuse_distance,
            reuse_s=own.reuse_s,
        )
        now = time.monotonic()
        self._measurements.catch_up(now)
        if paradigm != "device" and board.paradigm != "offload" and not self._has_room():
            why = f"device: {board.open_requests} requests wait already"
            return self._without_link(replace(plan, why=why, explain=Explain("device", why)))
        if paradigm == "auto":
            return self._choose(plan, camera, now)
        takes = self._measurements.takes(now, plan.prompt, not plan.sampling.is_greedy)
        if paradigm != "device" and takes.lacking:
            why = f"device: {takes.lacking}"
            alone = replace(plan, why=why, explain=Explain("device", why))
            return self._without_link(alone) if takes.later else alone
        name = cast(ParadigmName, paradigm)  # the setting accepts no other word
        return replace(plan, paradigm=name, explain=Explain(name, "configured"))

    def learn(self, plan: Plan, timings_ms: dict[str, float], confidence: float | None) -> None:
        """Passes on what the stages took, and whether a draft could be accepted without verification."""
        now = time.monotonic()
        if plan.min_confidence is not None and confidence is not None:
            self._measurements.draft_written(plan.accepts(confidence), now)
        self._measurements.frame_handled(plan.paradigm, timings_ms, now)

    def _choose(self, plan: Plan, camera: str, now: float) -> Plan:
        """As the policy chooses."""
        self._measurements.thermal_read(self._thermal.read(now))
        snapshot = self._measurements.snapshot(now, plan.prompt, not plan.sampling.is_greedy)
        decision = self._policies[camera].choose(snapshot, now, plan.budget_ms)
        chosen = replace(
            plan,
            paradigm=decision.paradigm,
            why=decision.explain.reason,
            explain=decision.explain,
            writes_draft=decision.writes_draft,
            sends_draft=decision.sends_draft,
            max_bytes=smaller(plan.max_bytes, decision.max_feature_bytes),
            # With a tier, questions or a prompt, a server shall answer every frame. What the confidence of a draft is
            # worth was measured on greedy ones.
            min_confidence=None
            if plan.tier or plan.questions or plan.prompt or not plan.sampling.is_greedy
            else self._min_confidence(float(self._settings["quality_floor"])),
            # Whoever configures split or offload wants to measure the target alone. Here only the time counts.
            propose=decision.paradigm in ("split", "offload"),
        )
        is_for_later = decision.outage or (snapshot.takes.lacking and snapshot.takes.later)
        return self._without_link(chosen) if is_for_later and decision.paradigm == "device" else chosen

    def _without_link(self, plan: Plan) -> Plan:
        """The device answers. If there is an outbox, a server answers too, later."""
        if not self._has_outbox:
            return plan
        return replace(plan, paradigm="speculative", why=f"{plan.why}; kept until there is room", keep=True)


def smaller(one: int | None, other: int | None) -> int | None:
    """The smaller of two limits, None being no limit."""
    return min((limit for limit in (one, other) if limit is not None), default=None)
