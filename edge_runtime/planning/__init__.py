"""Decides how each frame is answered: which paradigm, and why.

`BoardPlanner` makes a `Plan` per frame for the pipeline. If the paradigm is "auto", `Policy` chooses it from a
`Snapshot` of the `Measurements`: of the link, of the servers and of the board. Knows nothing of the pipeline.
"""

from edge_runtime.planning.measurements import Measurements, Snapshot
from edge_runtime.planning.plan import FixedPlanner, Plan, Planner
from edge_runtime.planning.planner import BoardPlanner
from edge_runtime.planning.policy import Decision, Policy

__all__ = ["BoardPlanner", "Decision", "FixedPlanner", "Measurements", "Plan", "Planner", "Policy", "Snapshot"]
