"""Stand-ins for Slurm's programs: shell scripts that print the output of real sites."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CONTROLLER_IS_AWAY = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'
NO_SUCH_JOB = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'


class FakeSlurm:
    """A folder of stand-ins, first on the PATH."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setattr("nemo_minitron.launch.slurm.client.RETRY_S", 0.01)
        monkeypatch.setattr("nemo_minitron.launch.slurm.client.PATIENCE_S", 1.0)
        monkeypatch.setattr("nemo_minitron.launch.slurm.client.TIMEOUT_S", 10.0)
        for name in ("sbatch", "squeue", "sacct", "sinfo", "srun", "scancel", "scontrol"):
            self.set(name, "exit 1")

    def set(self, name: str, body: str) -> None:
        """Set the body of a program; each call and its environment are recorded in files."""
        program = self.folder / "bin" / name
        note = f'printf "%s\\n" "$*" >>"{self.folder}/{name}.calls"; env >"{self.folder}/{name}.env"'
        program.write_text(f"#!/bin/bash\n{note}\n{body}\n")
        program.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        """Return the arguments of each call."""
        file = self.folder / f"{name}.calls"
        return file.read_text().splitlines() if file.is_file() else []

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of the last call."""
        lines = (self.folder / f"{name}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)
