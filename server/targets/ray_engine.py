"""The bundle's networks behind Ray Serve: replicas on any machines of a Ray cluster, with as many GPUs as each needs.

To the target they are an engine like that of this process; `answer` sends a batch to one replica. A text depends on its
job alone, so a batch whose replica died goes to another one, and several servers may share the replicas.
"""

import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends no usage statistics

import ray
from ray import serve
from ray.exceptions import ActorAlreadyExistsError, RayError

from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from server.config import RayConfig, ServerConfig
from server.engine import Job, Proof
from server.pictures import PictureWorkerError
from server.questions import Questions
from server.targets.bundle import BundleTarget
from server.targets.target import Answer, Limits

logger = logging.getLogger(__name__)

CONNECT_S = 10.0  # to a cluster
START_S = 600.0  # for the first replica: it loads torch and runs the start test
TRIES = 3  # of a batch, each on a replica that is free
RETRY_MS = 1000  # when boards may ask again, if no replica has answered
CALLS_PER_REPLICA = 2  # one is computed while the next one is on the way


class Facts(NamedTuple):
    """A replica's description of itself."""

    bundle: bytes  # id
    proof: Proof
    has_head: bool


class Replica:
    """One engine, in a process of Ray's. The bundle lies at the same path on every machine."""

    def __init__(self, config: ServerConfig) -> None:
        from server.app import load

        self.bundle, self.engine = load(config, config.bundle)

    def facts(self) -> Facts:
        return Facts(self.bundle.id, self.engine.proof, self.engine.head is not None)

    def answer(self, jobs: Sequence[Job], numerics: str) -> list[Answer] | None:
        """None if this replica's numerics are not those that the server promises, since its texts might differ too."""
        return self.engine.answer(jobs) if self.engine.proof.numerics == numerics else None

    def symbols(self, pixels: NDArray[np.uint8]) -> NDArray[np.int8]:
        return self.engine.symbols(pixels)


class RayEngine:
    """The engine for `BundleTarget`, on replicas. For any number of threads."""

    def __init__(self, handle: Any, bundle: Bundle, timeout_s: float) -> None:
        """handle: of the deployed `Replica`. Waits for the first one. Raises ConfigError if its bundle is another."""
        self._handle, self._timeout_s = handle, timeout_s
        self.on_step: Callable[[], None] = lambda: None  # called after each try
        try:
            facts: Facts = handle.facts.remote().result(timeout_s=START_S)
        except (RayError, TimeoutError) as error:
            raise ConfigError(f"no replica has started: {_last_line(error)}: see the logs of Ray") from error
        if facts.bundle != bundle.id:
            raise ConfigError(
                f"the replicas have bundle {facts.bundle.hex()}, this server has {bundle.id.hex()} at {bundle.path}: "
                "install the same bundle at this path on every machine of the cluster"
            )
        self.proof, self.head = facts.proof, facts.has_head or None

    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        answers: list[Answer] | None = self._ask("answer", list(jobs), self.proof.numerics)
        return answers or [Answer(error="no replica has answered: see the logs of Ray", retry_after_ms=RETRY_MS)] * len(
            jobs
        )

    def symbols(self, pixels: NDArray[np.uint8]) -> NDArray[np.int8]:
        symbols: NDArray[np.int8] | None = self._ask("symbols", pixels)
        if symbols is None:
            raise PictureWorkerError("no replica has read the picture, see the logs of Ray")
        return symbols

    def _ask(self, method: str, *arguments: Any) -> Any:
        for _ in range(TRIES):
            if not ray.is_initialized():  # closed: a call would start another cluster
                return None
            answer = self._ask_once(method, *arguments)
            self.on_step()  # a picture takes two calls, and a batch of two bundles one for each
            if answer is not None:
                return answer
        return None

    def _ask_once(self, method: str, *arguments: Any) -> Any:
        try:
            answer = self._handle.options(method_name=method).remote(*arguments).result(timeout_s=self._timeout_s)
        except (RayError, TimeoutError) as error:
            logger.warning("replica failed method=%s error=%s", method, _last_line(error))
            return None
        if answer is None:
            logger.warning("replica has other numerics than %s: use one kind of machine", self.proof.numerics)
        return answer


class RayTarget(BundleTarget):
    """The bundle's networks on replicas; for any number of threads."""

    def __init__(self, bundle: Bundle, config: ServerConfig, settings: RayConfig, questions: Questions) -> None:
        """Starts the replicas, or joins those of another server. Raises ConfigError."""
        engine = RayEngine(_replicas(bundle, config, settings), bundle, settings.timeout_s)
        super().__init__(bundle, engine, config.tier, config.max_batch, questions)
        calls = CALLS_PER_REPLICA * max(settings.replicas, settings.max_replicas or 0)
        self.limits = Limits(config.max_batch, calls, silent_s=settings.timeout_s)

    def close(self) -> None:
        """Ends a cluster that this process has started. Replicas in another one go on for other servers."""
        ray.shutdown()


def _replicas(bundle: Bundle, config: ServerConfig, settings: RayConfig) -> Any:
    """The handle of the replicas of this bundle and tier."""
    host, _, port = (settings.address or "").removeprefix("ray://").rpartition(":")
    try:
        if host:  # Ray itself would try for a quarter of an hour
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        ray.init(
            settings.address or "local",
            namespace="aiflow",
            log_to_driver=False,
            include_dashboard=False,
            ignore_reinit_error=True,  # with two bundles
        )
    except (OSError, ValueError, OverflowError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster at {settings.address or 'this machine'}: {_last_line(error)}: start one with `ray start "
            "--head` and name it as address in [ray], or leave address out"
        ) from error
    try:
        serve.start(proxy_location="Disabled")  # no HTTP: requests come by MQTT
    except ActorAlreadyExistsError:  # another server has started it in this moment
        serve.start(proxy_location="Disabled")
    name = f"aiflow-{bundle.id.hex()}-{config.tier}"
    if name in serve.status().applications:
        return serve.get_app_handle(name)
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas:
        bounds = {"min_replicas": settings.replicas, "max_replicas": settings.max_replicas}
        scaling = {"autoscaling_config": {**bounds, "target_ongoing_requests": CALLS_PER_REPLICA}}
    actor = {"num_cpus": config.threads, "num_gpus": settings.gpus}
    deployment = serve.deployment(
        Replica, name="engine", max_ongoing_requests=CALLS_PER_REPLICA, ray_actor_options=actor, **scaling
    )
    # The same path on every machine, wherever the server was started.
    placed = msgspec.structs.replace(config, bundle=str(bundle.path))
    return serve.run(deployment.bind(placed), name=name, route_prefix=None)


def _last_line(error: Exception) -> str:
    """Ray's errors have whole tracebacks as their text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
