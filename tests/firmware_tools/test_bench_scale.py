"""The benchmark with replicas: what it kills, and that it leaves other Ray clusters alone. Skipped without Ray."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")

from benchmarks.scale import cluster_processes, ray_cluster, run  # noqa: E402
from edge_runtime.inference.bundle import Bundle  # noqa: E402
from tests.bundles import random_symbols  # noqa: E402

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def folders() -> Iterator[list[Path]]:
    """With short names: Ray's sockets are in them, and the path of a socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        yield [Path(first), Path(second)]


def test_the_end_of_its_cluster_ends_no_other(folders: list[Path]) -> None:
    with ray_cluster(folders[0], 1):
        with ray_cluster(folders[1], 1):
            ours = cluster_processes(folders[1])
            others = cluster_processes(folders[0])
            assert others
        psutil.wait_procs(ours, 60)
        assert not cluster_processes(folders[1])
        assert all(process.is_running() for process in others)


def test_a_replica_and_a_server_are_killed_in_runs_of_their_own_and_nothing_is_lost(board_bundle: Bundle) -> None:
    figures = run(board_bundle, random_symbols(2, seed=1), [[1, 2], [3]], "edge", 4, 0.5, 4.0, [2])["2 replicas"]
    for asked in (figures, figures["while_a_replica_is_killed"], figures["while_a_server_is_killed"]):
        assert asked["answered"] == asked["asked"] > 0
    assert figures["while_a_replica_is_killed"]["killed"] == figures["while_a_server_is_killed"]["killed"] == 1
