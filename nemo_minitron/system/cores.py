"""Number of cores that this process may use. A scheduler or a container often allows fewer than the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def usable_cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Count the cores that this process may run on, limited by the CPU quota of its control group; at least 1.

    Args:
        proc: mount point of the proc file system, which lists the process's control groups.
        cgroups: mount point of the control groups.
    """
    quota = _quota(proc, cgroups)
    cores = _allowed_cores()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _allowed_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def _quota(proc: Path, cgroups: Path) -> float | None:
    """Return the smallest CPU quota of the process's control groups and their parents, in cores; None: no limit."""
    found = []
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            roots = [cgroups, cgroups / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [cgroups / controllers, cgroups / "cpu"]
        else:
            continue
        # In a container, the process's own group is mounted as the root, so the listed path may not exist.
        groups = [root / path.strip("/") for root in roots]
        for group, root in zip(groups, roots, strict=True):
            found += [quota for folder in _up_to(group, root) if (quota := _quota_of(folder)) is not None]
    return min(found, default=None)


def _up_to(group: Path, root: Path) -> list[Path]:
    return [folder for folder in (group, *group.parents) if folder.is_relative_to(root)]


def _quota_of(group: Path) -> float | None:
    """Return the quota of one control group in cores. cgroup v2 stores `quota period` in one file, v1 in two."""
    words = _read(group / "cpu.max").split()
    if not words:
        words = [*_read(group / "cpu.cfs_quota_us").split(), *_read(group / "cpu.cfs_period_us").split()]
    try:
        quota, period = (float(word) for word in words)
    except ValueError:  # `max` (no limit), or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
