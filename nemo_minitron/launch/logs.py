"""Where a stage's words are, whoever ran it."""

from __future__ import annotations

from pathlib import Path

TAIL_BYTES = 1 << 16


def logs_of(run: Path, stage: str) -> list[Path]:
    """Its log files, the one written to last at the end."""
    from nemo_minitron.launch import record

    last = record.newest(run)
    jobs = [stage, *(job.name for job in last.jobs if stage in job.stages)] if last else [stage]
    found = [*(run / "logs").glob(f"{stage}.*")]
    for name in dict.fromkeys(jobs):
        found += (run / "logs/slurm").glob(f"{name}-[0-9]*.log")
    return sorted((file for file in found if file.stat().st_size), key=lambda file: file.stat().st_mtime)


def tail(file: Path, lines: int) -> list[str]:
    """The last lines of a log; of one that is long, from its last 64 KiB."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
        return stream.read().decode(errors="replace").splitlines()[-lines:]
