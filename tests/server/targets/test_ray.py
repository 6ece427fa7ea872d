"""Replicas on a real Ray cluster of this machine: the same texts as in one process, also while a replica dies.

Ray is no part of the usual environment: without it, these tests are skipped.
"""

import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Event

import numpy as np
import psutil
import pytest
import yaml

from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle, open_bundle
from models.family import LATENT
from server.config import RayConfig
from server.engine import Engine, Job
from server.pictures import PictureWorkerError
from server.questions import Questions
from tests.server.boards import config

pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's own libraries
    from server.targets import ray_engine, ray_replicas

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def target(bundle: Bundle) -> Iterator[ray_engine.RayTarget]:
    target = ray_engine.RayTarget(bundle, config(bundle), RayConfig(replicas=2), Questions(bundle))
    yield target
    target.close()


@pytest.fixture
def jobs(bundle: Bundle) -> list[Job]:
    symbols = np.random.default_rng(1).integers(-2, 3, (6, *LATENT), dtype=np.int8)
    return [Job(each, tier="edge", draft=(5, 6, 7)) for each in symbols]


def replicas() -> list[psutil.Process]:
    running = psutil.process_iter(["cmdline"])
    return [process for process in running if "ServeReplica:aiflow-" in str(process.info["cmdline"])]


def test_ray_accepts_the_cluster_of_the_example() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    example = Path(__file__).parents[3] / "examples" / "ray" / "cluster.yaml"
    cluster = prepare_config(yaml.safe_load(example.read_text()))
    validate_config(cluster)
    assert cluster["available_node_types"]["local.cluster.node"]["min_workers"] == 2


def test_a_cluster_that_is_not_there_is_named(bundle: Bundle) -> None:  # first: this process joins one cluster
    nowhere = RayConfig(address="127.0.0.1:1")
    with pytest.raises(ConfigError, match="no Ray cluster"):
        ray_engine.RayTarget(bundle, config(bundle), nowhere, Questions(bundle))


def test_replicas_write_the_texts_of_one_process(target: ray_engine.RayTarget, engine: Engine, jobs: list[Job]) -> None:
    expected = [answer.tokens for answer in engine.answer(jobs)]
    assert [answer.tokens for answer in target.answer(jobs)] == expected
    assert target.abilities.verified == "strict"
    assert target.limits.calls == 2 * ray_engine.CALLS


def test_a_server_that_starts_in_the_same_moment_joins_the_replicas(
    target: ray_engine.RayTarget, bundle: Bundle, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, tries = ray_replicas.serve.start, []

    def race(**options: str) -> None:
        tries.append(options)
        if len(tries) == 1:
            raise ray_replicas.ActorAlreadyExistsError("SERVE_CONTROLLER_ACTOR")
        start(**options)

    monkeypatch.setattr(ray_replicas.serve, "start", race)
    other = ray_engine.RayTarget(bundle, config(bundle), RayConfig(replicas=2), Questions(bundle))
    assert [answer.tokens for answer in other.answer(jobs)] == [answer.tokens for answer in target.answer(jobs)]


def test_a_batch_whose_replica_dies_is_answered_by_another(target: ray_engine.RayTarget, jobs: list[Job]) -> None:
    expected = [answer.tokens for answer in target.answer(jobs)]
    running = replicas()
    assert len(running) == 2
    running[0].kill()
    for _ in range(8):  # some of them are sent to the dead one
        assert [answer.tokens for answer in target.answer(jobs)] == expected


def test_replicas_with_other_numerics_do_not_answer(target: ray_engine.RayTarget, jobs: list[Job]) -> None:
    proof, target.engine.proof = target.engine.proof, ray_engine.Proof(numerics="of another machine")
    try:
        (answer,) = target.answer(jobs[:1])
    finally:
        target.engine.proof = proof
    assert "no replica" in answer.error
    assert answer.retry_after_ms


def test_each_try_is_a_step_and_a_picture_without_a_replica_is_for_another_server(
    target: ray_engine.RayTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[None] = []
    target.on_step(lambda: steps.append(None))
    monkeypatch.setattr(target.engine, "_timeout_s", 0.0)
    with pytest.raises(PictureWorkerError, match="no replica"):
        target.engine.symbols(np.zeros((224, 224, 3), np.uint8))
    assert len(steps) == ray_replicas.TRIES


def test_a_target_that_is_closed_answers_with_an_error_and_starts_no_cluster(
    target: ray_engine.RayTarget, jobs: list[Job]
) -> None:  # last of this cluster
    target.close()
    (answer,) = target.answer(jobs[:1])
    assert "no replica" in answer.error
    assert not ray_replicas.ray.is_initialized()


def test_a_replica_is_added_while_batches_wait(bundle: Bundle) -> None:  # it takes a minute
    with ProcessPoolExecutor(1, get_context("spawn")) as another:  # since this process has had its cluster
        assert another.submit(replicas_under_load, bundle.path).result() == 2


def replicas_under_load(path: Path) -> int:
    """The replicas of a cluster that starts with one, once there are two or a batch has failed."""
    bundle = open_bundle(path)
    target = ray_engine.RayTarget(bundle, config(bundle), RayConfig(replicas=1, max_replicas=2), Questions(bundle))
    is_enough = Event()

    def ask() -> None:
        while not is_enough.is_set():
            assert not any(answer.error for answer in target.answer([Job(np.zeros(LATENT, np.int8))]))

    assert len(replicas()) == 1
    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask) for _ in range(2 * ray_engine.CALLS)]
        while len(replicas()) < 2 and not any(each.done() for each in asking):
            is_enough.wait(0.2)
        is_enough.set()
    for each in asking:
        each.result()
    running = len(replicas())
    target.close()
    return running
