"""Time of calls that take turns, and memory of this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Literal


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Return the median seconds of each call; one warm-up round, then all in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            started_s = time.perf_counter()
            call()
            if round_number:
                times[name].append(time.perf_counter() - started_s)
    return {name: median(values) for name, values in times.items()}


def memory_gib(field: Literal["VmHWM", "VmRSS", "RssAnon"]) -> float:
    """Return the peak of resident memory, resident memory now, or the part of it without files.

    The peak is not ru_maxrss, which a new process inherits from its parent.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 2**20
