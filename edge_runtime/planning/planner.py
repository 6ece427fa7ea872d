"""What the next frame's plan is, out of what is configured, switched and measured.

Here the settings meet: the board's, its cameras', its run-time switches. Where they say "auto" the policy chooses, from
what the board has measured; what it chooses and why is in policy.py, what it knows in estimates.py.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import msgspec

from edge_runtime.capture import Cameras
from edge_runtime.config import RuntimeConfig
from edge_runtime.pipeline import Plan
from edge_runtime.planning.measurements import Estimates
from edge_runtime.planning.policy import Policy
from edge_runtime.planning.thermal import VitalsReader
from edge_runtime.reporting.remote_settings import Switches
from edge_runtime.wire import Tier
from edge_runtime.wire.event import Explain, ParadigmName


class BoardPlanner:
    """The planner of a board; on the frame path's thread."""

    def __init__(
        self,
        config: RuntimeConfig,
        cameras: Cameras,
        switches: Switches,
        new_policy: Callable[[], Policy],
        estimates: Estimates,
        has_room: Callable[[], bool] = lambda: True,
    ) -> None:
        """new_policy: one a camera, whose deadlines and loads differ; has_room: for one more request to wait."""
        self._board, self._keeps, self._has_room = config.board, config.outbox is not None, has_room
        self._cameras, self._switches, self._estimates = cameras, switches, estimates
        self._policies = {camera.config.name: new_policy() for camera in cameras}
        self._policy = new_policy()  # of the latest plan
        self._vitals = VitalsReader()

    def plan(self, camera: str) -> Plan:
        """A camera's own settings come before the board's; raises KeyError for a camera that is not configured."""
        board, own = self._board, self._cameras[camera].config
        paradigm = own.paradigm or self._switches["paradigm"]
        tier = own.tier or board.tier
        plan = Plan("device", "configured", own.deadline_ms or board.deadline_ms, Tier[tier.upper()] if tier else None)
        plan = replace(plan, jpeg_quality=board.jpeg_quality)
        now = time.monotonic()
        self._estimates.catch_up(now)
        if paradigm != "device" and board.paradigm != "offload" and not self._has_room():
            why = f"device: {board.open_requests} requests wait already"
            return self._alone(replace(plan, explain=Explain("device", why)), why)
        if paradigm != "auto":
            name = cast(ParadigmName, paradigm)  # the switch takes no other word
            return replace(plan, paradigm=name, explain=Explain(name, "configured"))
        self._estimates.measured(self._vitals.read(now))
        floor = float(self._switches["quality_floor"])
        self._policy = self._policies[camera]
        self._policy.config = msgspec.structs.replace(self._policy.config, quality_floor=floor)
        decision = self._policy.choose(self._estimates.facts(now), now, plan.budget_ms)
        plan = replace(
            plan,
            paradigm=decision.paradigm,
            why=decision.explain.reason,
            explain=decision.explain,
            drafts=decision.drafts,
            may_stand=tier is None,  # else a server is to answer
            # Who configures split or offload wants the target alone; here what counts is the time.
            proposes=decision.paradigm in ("split", "offload"),
        )
        return self._alone(plan, plan.why) if decision.away and decision.paradigm == "device" else plan

    def _alone(self, plan: Plan, why: str) -> Plan:
        """The device answers; with an outbox, until a server does."""
        if self._keeps:
            return replace(plan, paradigm="speculative", why=f"{why}; kept until there is room", keeps=True)
        return replace(plan, paradigm="device", why=why)

    def stands(self, plan: Plan, confidence: float) -> str | None:
        """A draft stands only where the policy chose: who configures speculative or a tier wants each one verified."""
        if not plan.may_stand:
            return None
        stands = self._policy.stands(confidence)
        self._estimates.drafted(stands, time.monotonic())
        return f"the draft is sure enough: confidence {confidence:.2f}" if stands else None

    def took(self, plan: Plan, timings_ms: dict[str, float]) -> None:
        """Feeds the estimates."""
        self._estimates.took(plan.paradigm, timings_ms, time.monotonic())
