"""Cores and memory that this process may use. A scheduler or a container often allows less than the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
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


def memory_limit_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Return the smallest memory limit of the process's control groups and their parents; None: no limit."""
    limits = (_memory_limit_of(group) for group in _groups("memory", proc, cgroups))
    return min((limit for limit in limits if limit is not None), default=None)


def usable_memory_bytes() -> int:
    """Return the memory of this machine, or the limit of the process's control groups if that is smaller."""
    installed_bytes, limit_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), memory_limit_bytes()
    return installed_bytes if limit_bytes is None else min(installed_bytes, limit_bytes)


def _quota(proc: Path, cgroups: Path) -> float | None:
    """Return the smallest CPU quota of the process's control groups and their parents, in cores; None: no limit."""
    quotas = (_quota_of(group) for group in _groups("cpu", proc, cgroups))
    return min((quota for quota in quotas if quota is not None), default=None)


def _groups(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """Yield the folders of the process's control groups with this controller, and of their parents."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            roots = [cgroups, cgroups / "unified"]
        elif controller in controllers.split(","):
            roots = [cgroups / controllers, cgroups / controller]
        else:
            continue
        # In a container, the process's own group is mounted as the root, so the listed path may not exist.
        for root in roots:
            yield from _up_to(root / path.strip("/"), root)


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


def _memory_limit_of(group: Path) -> int | None:
    """Return the memory limit of one control group in bytes, which cgroup v2 and v1 store under different names."""
    text = (_read(group / "memory.max") or _read(group / "memory.limit_in_bytes")).strip()
    return int(text) if text.isdigit() else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
