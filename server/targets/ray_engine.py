"""The bundle's networks as replicas on Ray Serve (ray_replicas.py).

To the target they are an engine like that of this process.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from server.config import Config, RayConfig
from server.engine import Job, Proof
from server.pictures import PictureWorkerError
from server.questions import Questions
from server.targets import ray_replicas
from server.targets.bundle import BundleTarget
from server.targets.ray_replicas import Replicas
from server.targets.target import Answer, Limits

CALLS = 2  # of a replica at the same time: one is computed while the next one is on the way


class Facts(NamedTuple):
    """A replica's description of itself."""

    bundle: bytes  # id
    proof: Proof
    has_head: bool


class Replica:
    """One engine, in a process of Ray's."""

    def __init__(self, config: Config) -> None:
        from server.app import load

        self.bundle, self.engine = load(config.server, config.server.bundle)

    def facts(self) -> Facts:
        return Facts(self.bundle.id, self.engine.proof, self.engine.head is not None)

    def answer(self, jobs: Sequence[Job], numerics: str) -> list[Answer] | None:
        """None if this replica's numerics are not those that the server promises, since its texts might differ too."""
        return self.engine.answer(jobs) if self.engine.proof.numerics == numerics else None

    def symbols(self, pixels: NDArray[np.uint8]) -> NDArray[np.int8]:
        return self.engine.symbols(pixels)


class RayEngine(Replicas):
    """The engine for `BundleTarget`, on replicas. For any number of threads."""

    def __init__(self, bundle: Bundle, config: Config, settings: RayConfig) -> None:
        """config: of the server, with this bundle. Raises ConfigError, also if the replicas have another bundle."""
        super().__init__(Replica, f"aiflow-{bundle.id.hex()}-{config.server.tier}", config, settings, CALLS)
        facts: Facts = self.facts
        if facts.bundle != bundle.id:
            raise ConfigError(
                f"the replicas have bundle {facts.bundle.hex()}, this server has {bundle.id.hex()} at {bundle.path}: "
                "install the same bundle at this path on every machine of the cluster"
            )
        self.proof, self.head = facts.proof, facts.has_head or None

    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        return self.answers(jobs, self.proof.numerics)

    def symbols(self, pixels: NDArray[np.uint8]) -> NDArray[np.int8]:
        symbols: NDArray[np.int8] | None = self.ask("symbols", pixels)
        if symbols is None:
            raise PictureWorkerError("no replica has read the picture, see the logs of Ray")
        return symbols


class RayTarget(BundleTarget):
    """The bundle's networks on replicas; for any number of threads."""

    def __init__(self, bundle: Bundle, config: Config, settings: RayConfig, questions: Questions) -> None:
        """Starts the replicas, or joins those of another server. Raises ConfigError."""
        engine = RayEngine(bundle, config, settings)
        super().__init__(bundle, engine, config.server.tier, config.server.max_batch, questions)
        self.limits = Limits(config.server.max_batch, engine.calls, silent_s=engine.silent_s)

    def close(self) -> None:
        ray_replicas.close()
