"""How many cores this process may really use."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The cores of this process by its affinity (cpuset, taskset) and its cgroup's quota, at least 1."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cgroup.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def default_num_threads() -> int:
    """The cores of one rank: those of this process shared with the other ranks that run on the machine.

    torchrun and accelerate say how many those are in LOCAL_WORLD_SIZE.
    """
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
