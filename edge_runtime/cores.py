"""How many processor cores this process may use."""

import os
import re
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """The cores of its affinity, at most the CPU quota of its cgroup and of each cgroup above it, and at least 1.

    A quota (of a container, or systemd's CPUQuota) does not change the affinity. When it is used up, the kernel stops
    all threads of the process for the rest of the period, so a quota of 1.5 cores counts as 1. It is in `cpu.max`
    (kernel.org, "Control Group v2", CPU Interface Files). Without cgroup v2, only the affinity counts.
    """
    cores = len(os.sched_getaffinity(0))
    cgroups, own = root / "sys/fs/cgroup", root / "proc/self/cgroup"
    path = re.search(r"(?m)^0::/(.*)$", own.read_text()) if own.is_file() else None
    folder = cgroups / path[1] if path else cgroups
    for cgroup in (folder, *folder.parents):
        limit = cgroup / "cpu.max"  # "max 100000", or microseconds of CPU time in so many microseconds
        if cgroup.is_relative_to(cgroups) and limit.is_file():
            quota, period = limit.read_text().split()
            cores = cores if quota == "max" else min(cores, int(quota) // int(period))
    return max(1, cores)
