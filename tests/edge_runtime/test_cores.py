"""The cores of a process, with and without a CPU quota. The files are those of Linux, in a folder."""

import os
from functools import partial
from pathlib import Path

import pytest

from edge_runtime.cores import usable_cores
from server.app import usual_calls

ALL = len(os.sched_getaffinity(0))


def system(root: Path, own: str, **limits: str) -> Path:
    """own: the cgroup of the process. limits: what `cpu.max` says, by cgroup."""
    for name in (*limits, own.lstrip("/")):
        (root / "sys/fs/cgroup" / name).mkdir(parents=True, exist_ok=True)
    for name, limit in limits.items():
        (root / "sys/fs/cgroup" / name / "cpu.max").write_text(f"{limit}\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"1:cpu:/\n0::{own}\n")
    return root


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ({}, ALL),
        ({"a.slice/b.service": "max 100000"}, ALL),
        ({"a.slice/b.service": "100000 100000"}, 1),
        ({"a.slice/b.service": "20000 100000"}, 1),  # a part of a core is one that stops again and again
        ({"a.slice/b.service": "150000 100000"}, 1),
        ({"a.slice/b.service": "1000000000 100000"}, ALL),
        ({"a.slice/b.service": "max 100000", "a.slice": "100000 100000"}, 1),
        ({"another.slice": "100000 100000"}, ALL),
        ({"": "100000 100000"}, 1),  # a container sees its own cgroup there
    ],
)
def test_a_process_has_the_cores_that_its_affinity_and_all_quotas_leave(
    tmp_path: Path, limits: dict[str, str], cores: int
) -> None:
    assert usable_cores(system(tmp_path, "/a.slice/b.service", **limits)) == cores


def test_a_container_that_does_not_see_the_cgroup_that_it_is_in_has_the_quota_that_it_sees(tmp_path: Path) -> None:
    root = system(tmp_path, "/", **{"": "100000 100000"})
    (root / "proc/self/cgroup").write_text("0::/system.slice/docker-1.scope\n")
    assert usable_cores(root) == 1


def test_a_system_without_cgroups_has_the_cores_of_the_affinity(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == ALL
    assert 1 <= usable_cores() <= ALL


def test_a_server_with_a_quota_of_one_core_computes_one_batch_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = system(tmp_path, "/a", a="100000 100000")
    monkeypatch.setattr("server.app.usable_cores", partial(usable_cores, root))
    assert usual_calls(threads=1) == 1
