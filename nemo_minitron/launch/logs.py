"""Log files of a stage, from all launchers."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.artifacts.run_paths import LOGS
from nemo_minitron.launch import record

TAIL_BYTES = 1 << 16


def logs_of(run: Path, stage: str) -> list[Path]:
    """Return the stage's log files that are not empty, the one written last at the end."""
    last = record.newest(run)
    jobs = [stage, *(job.name for job in last.jobs if stage in job.stages)] if last else [stage]
    found = [*(run / LOGS).glob(f"{stage}.*")]
    for name in dict.fromkeys(jobs):
        # Launchers keep the logs of their jobs as logs/LAUNCHER/JOB-ID.log.
        found += (run / LOGS).glob(f"*/{name}-[0-9]*.log")
    return sorted((file for file in found if file.stat().st_size), key=lambda file: file.stat().st_mtime)


def tail(file: Path, lines: int) -> list[str]:
    """Return the last lines of a log, taken from its last 64 KiB."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
        return stream.read().decode(errors="replace").splitlines()[-lines:]
