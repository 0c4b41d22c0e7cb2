"""How many CPUs this process may use, which may be fewer than its machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def usable_cpus(own: Path = _OWN, cgroups: Path = _CGROUPS) -> int:
    """CPUs by this process's affinity (``taskset``, Slurm) and by the CPU quota of its container; at least 1.

    Args:
        own: the file that names this process's control groups.
        cgroups: where they are mounted.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([count, *_quotas(own, cgroups)])))


def _quotas(own: Path, cgroups: Path) -> Iterator[float]:
    """CPUs that each control group around this process may use, where it is limited."""
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = cgroups / controllers if (cgroups / controllers).is_dir() else cgroups / "cpu"
        mount = mount if controllers else cgroups
        # A limit above holds, too. What a container sees as the root may be named by its path outside.
        here = mount / path.lstrip("/")
        for folder in (here, *here.parents):
            if controllers:
                values = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            else:
                values = _read(folder / "cpu.max").split()
            if len(values) == 2 and all(value.isdecimal() and int(value) > 0 for value in map(str.strip, values)):
                yield int(values[0]) / int(values[1])
            if folder == mount:
                break


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):  # none, on this system
        return ""
