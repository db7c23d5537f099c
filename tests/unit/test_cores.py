"""Usable cores and memory: affinity, and limits of control groups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_minitron.system.cores import memory_limit_bytes, usable_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def machine(folder: Path, groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    proc, mounted = folder / "proc", folder / "cgroup"
    for name, content in {"proc/self/cgroup": groups, **{f"cgroup/{key}": text for key, text in files.items()}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return proc, mounted


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/slurm/job_1\n", {"slurm/job_1/cpu.max": "max 100000", "slurm/cpu.max": "400000 100000"}, 4),
        ("0::/docker/abc\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/docker/abc\n", {"cpu.max": "nonsense"}, 8),
        (
            "4:cpu,cpuacct:/job\n3:memory:/job\n",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "500000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
            5,
        ),
        ("4:cpu:/job\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_the_tightest_limit_counts(tmp_path: Path, groups: str, files: dict[str, str], cores: int) -> None:
    assert usable_cores(*machine(tmp_path, groups, files)) == cores


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/slurm/job_1\n", {"slurm/job_1/memory.max": "max", "slurm/memory.max": "4096\n"}, 4096),
        ("0::/docker/abc\n", {"memory.max": "8192\n"}, 8192),
        ("3:memory:/job\n4:cpu:/job\n", {"memory/job/memory.limit_in_bytes": "1024\n"}, 1024),
        ("3:memory:/\n", {"memory/memory.limit_in_bytes": "nonsense"}, None),
    ],
)
def test_the_smallest_memory_limit_counts(
    tmp_path: Path, groups: str, files: dict[str, str], limit: int | None
) -> None:
    assert memory_limit_bytes(*machine(tmp_path, groups, files)) == limit


def test_affinity_counts_if_it_is_tighter_and_no_file_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert usable_cores(*machine(tmp_path, "0::/\n", {"cpu.max": "600000 100000"})) == 2
    assert usable_cores(tmp_path / "none", tmp_path / "none") == 2
