"""The benchmark with replicas leaves other Ray clusters of the machine alone. Skipped without Ray."""

from pathlib import Path

import psutil
import pytest

ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")

from benchmarks.scale import cluster_processes, ray_cluster  # noqa: E402

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


def test_the_end_of_its_cluster_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with ray_cluster(folders[0], 1):
        with ray_cluster(folders[1], 1):
            ours = cluster_processes(folders[1])
            others = cluster_processes(folders[0])
            assert others
        psutil.wait_procs(ours, 60)
        assert not cluster_processes(folders[1])
        assert all(process.is_running() for process in others)
