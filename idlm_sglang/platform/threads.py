"""How many OpenMP threads a worker process gets on a CPU. Imports neither SGLang nor torch."""

import os
from contextlib import suppress
from pathlib import Path

import psutil

# Threads of a forward wait for each other many times in it. Where one of them has to wait for its core, which the HTTP server or the
# client has just then, all stand still.
_FOR_OTHERS = 1
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def threads_per_rank(ranks: int) -> int:
    """OpenMP threads of each of ``ranks`` worker processes on this machine, at least 1: the physical cores that there are for this
    process, by its affinity and its control group, but for one."""
    cores = [psutil.cpu_count(logical=False) or os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        cores.append(len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):  # where there is no control group of this kind, or none with a limit ("max")
        quota, period = _QUOTA.read_text().split()
        cores.append(int(quota) // int(period))
    return max((min(cores) - _FOR_OTHERS) // ranks, 1)
