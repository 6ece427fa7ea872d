"""A model of Hugging Face as replicas on Ray Serve (ray_replicas.py). To the target it is a model of this process.

Jobs travel with decoded pictures, 6 MB for one of 1920 x 1080, which is little against what a large model takes.
"""

import hashlib
import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from edge_runtime.errors import ConfigError
from server.config import Config, RayConfig, ServerConfig
from server.prompts import PromptConfig
from server.targets import ray_replicas
from server.targets.huggingface_model import Proof
from server.targets.huggingface_prompts import Job, PromptError
from server.targets.ray_replicas import Replicas
from server.targets.target import Answer

CALLS = 1  # of a replica at the same time: a second one would wait for as long as a batch takes


class Facts(NamedTuple):
    """A replica's description of itself."""

    name: str
    takes_pictures: bool
    proof: Proof


class Replica:
    """One model, in a process of Ray's."""

    def __init__(self, config: Config) -> None:
        from server.app import load_model

        self.model, self._lock = load_model(config), threading.Lock()

    def facts(self) -> Facts:
        return Facts(self.model.name, self.model.takes_pictures, self.model.proof)

    def refusal(self, job: Job) -> str:
        """Why the model cannot read this job; empty: it can."""
        try:
            self.model.check(job)
        except PromptError as error:
            return str(error)
        return ""

    def answer(self, jobs: Sequence[Job], numerics: str) -> list[Answer] | None:
        """None if this replica's numerics are not those that the server promises, since its texts might differ too."""
        if self.model.proof.numerics != numerics:
            return None
        with self._lock:  # a model is for one thread
            return self.model.answer(jobs)


class RayModel(Replicas):
    """The model for `HuggingFaceTarget`, on replicas. For any number of threads."""

    def __init__(self, config: Config, settings: RayConfig) -> None:
        """Starts the replicas, or joins those of another server with the same settings. Raises ConfigError."""
        placed = _placed(config)
        name = f"aiflow-{hashlib.sha256(msgspec.json.encode(placed)).hexdigest()[:16]}"
        super().__init__(Replica, name, placed, settings, CALLS)
        facts: Facts = self.facts
        self.name, self.takes_pictures, self.proof = facts

    def check(self, job: Job) -> None:
        """Raises PromptError, and ConfigError if no replica answers."""
        refusal = self.ask("refusal", job)
        if refusal is None:
            raise ConfigError("no replica has answered: see the logs of Ray")
        if refusal:
            raise PromptError(refusal)

    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        return self.answers(jobs, self.proof.numerics)

    def assistant_status(self) -> dict[str, Any] | None:
        """Each replica counts for itself, and none of it is known here."""
        return None

    def close(self) -> None:
        ray_replicas.close()


def _placed(config: Config) -> Config:
    """What a replica needs of a server's configuration, the same for all servers that may share it."""
    server, hf, lm = config.server, config.hf, config.lm
    kind, _, where = server.target.partition(":")
    model = ServerConfig(
        "replica",
        _absolute(server.bundle),
        target=f"{kind}:{_absolute(where)}" if where else kind,
        device=server.device,
        threads=server.threads,
    )
    hf = msgspec.structs.replace(hf, tail=_absolute(hf.tail), assistant=_absolute(hf.assistant))
    lm = msgspec.structs.replace(lm, weights=_absolute(lm.weights), cache=lm.cache and os.path.abspath(lm.cache))
    text = config.read_prompts()[hf.prompt].text  # for a trial of the tail: the others are put into jobs
    return Config(model, prompts={hf.prompt: PromptConfig(text)}, hf=hf, lm=lm)


def _absolute(path: str | None) -> str | None:
    """For a process with another working directory. The name of a model on the hub is no path."""
    return os.path.abspath(path) if path and os.path.exists(path) else path
