"""The benchmark with replicas leaves other Ray clusters of the machine alone. Skipped without Ray."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")

from benchmarks.scale import cluster_processes, ray_cluster  # noqa: E402

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
