"""How many CPU cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """The cores of this process's affinity mask, at most its CPU quota in cgroups; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _own_cgroups() for quota in (_quota(folder),) if quota is not None]
    return max(1, min([cores, *(int(quota + 0.5) for quota in quotas)]))


def _own_cgroups() -> list[Path]:
    """The cgroup folders of this process and those above them, of both versions."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            continue
        top = CGROUPS / controllers if controllers else CGROUPS
        own = top / path.lstrip("/")
        # In a container, the path is the host's, and the container's own group is at the top.
        found += [own, *(folder for folder in own.parents if folder.is_relative_to(top))]
    return list(dict.fromkeys(found))


def _quota(folder: Path) -> float | None:
    """Cores per period; None without a limit."""
    try:
        if (folder / "cpu.max").is_file():
            limit, period = (folder / "cpu.max").read_text().split()
            return None if limit == "max" else int(limit) / int(period)
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None
