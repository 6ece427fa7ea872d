"""Replicas on Ray Serve: copies of one object on any machines of a Ray cluster, with as many GPUs as each needs.

A text depends on its job alone, so a batch whose replica died goes to another one, and several servers may share the
replicas.
"""

import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends no usage statistics

import ray
from ray import serve
from ray.exceptions import ActorAlreadyExistsError, RayError

from edge_runtime.errors import ConfigError
from server.config import Config, RayConfig
from server.targets.target import Answer

logger = logging.getLogger(__name__)

CONNECT_S = 10.0  # to a cluster
START_S = 600.0  # for the first replica: it loads torch and runs the start test
TRIES = 3  # of a batch, each on a replica that is free
JOINED = ("DEPLOYING", "RUNNING")  # applications; one that could not start is started again
RETRY_MS = 1000  # when boards may ask again, if no replica has answered


class Replicas:
    """The replicas of one name. For any number of threads."""

    def __init__(self, kind: type[Any], name: str, config: Config, settings: RayConfig, calls: int) -> None:
        """Starts them, or joins those that another server has started by this name, and waits for the first one.

        kind: made of `config` in each process of Ray's, with methods `facts` and `answer`. The paths in `config` have
        to be the same on every machine. calls: at the same time, of a replica. Raises ConfigError.
        """
        self._handle, self._timeout_s = _deployed(kind, name, config, settings, calls), settings.timeout_s
        self.calls = calls * max(settings.replicas, settings.max_replicas or 0)  # at the same time
        self.silent_s = settings.timeout_s
        self.on_step: Callable[[], None] = lambda: None  # called after each try
        try:
            self.facts = self._handle.facts.remote().result(timeout_s=START_S)
        except (RayError, TimeoutError) as error:
            raise ConfigError(f"no replica has started: {_last_line(error)}: see the logs of Ray") from error

    def answers(self, jobs: Sequence[Any], numerics: str) -> list[Answer]:
        """Of one replica with the numerics that the server promises."""
        answers: list[Answer] | None = self.ask("answer", list(jobs), numerics)
        nobody = Answer(error="no replica has answered: see the logs of Ray", retry_after_ms=RETRY_MS)
        return answers or [nobody] * len(jobs)

    def ask(self, method: str, *arguments: Any) -> Any:
        """The result of a method of one of them. None: none has answered, or the method itself returned None."""
        for _ in range(TRIES):
            if not ray.is_initialized():  # closed: a call would start another cluster
                return None
            answer = self._ask_once(method, *arguments)
            self.on_step()  # a picture takes two calls, and a batch of two bundles one for each
            if answer is not None:
                return answer
        return None

    def _ask_once(self, method: str, *arguments: Any) -> Any:
        call = self._handle.options(method_name=method).remote(*arguments)
        try:
            answer = call.result(timeout_s=self._timeout_s)
        except (RayError, TimeoutError) as error:
            call.cancel()  # if it still waits, it would only delay others
            logger.warning("replica failed method=%s error=%s", method, _last_line(error))
            return None
        if answer is None:
            logger.warning("replica has other numerics than this server promises: use one kind of machine")
        return answer


def close() -> None:
    """Ends a cluster that this process has started. Replicas in another one go on for other servers."""
    ray.shutdown()


def _deployed(kind: type[Any], name: str, config: Config, settings: RayConfig, calls: int) -> Any:
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
    if (there := serve.status().applications.get(name)) and there.status in JOINED:
        return serve.get_app_handle(name)
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas:
        bounds = {"min_replicas": settings.replicas, "max_replicas": settings.max_replicas}
        scaling = {"autoscaling_config": {**bounds, "target_ongoing_requests": calls}}
    actor = {"num_cpus": config.server.threads, "num_gpus": settings.gpus}
    deployment = serve.deployment(kind, name="engine", max_ongoing_requests=calls, ray_actor_options=actor, **scaling)
    try:
        return serve.run(deployment.bind(config), name=name, route_prefix=None)
    except (RayError, RuntimeError) as error:
        raise ConfigError(
            f"the replicas do not start: {_last_line(error)}: see the logs of Ray, and install the bundle or the model "
            "at the same path on every machine"
        ) from error


def _last_line(error: Exception) -> str:
    """Ray's errors have whole tracebacks as their text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
