"""Toy runs for a cluster: prepared once up to the distillation, then copied."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPO, TOY
from tests.support.slurm.cluster import SlurmCluster

NAME = "toy/width"
STEPS = 40
SITE = (
    "launcher=slurm",
    "cluster=slurm",
    "cluster.gpus_per_node=0",
    "cluster.exclusive=false",
    "cluster.cpus_per_node=2",
    "cluster.mem_gib=8",
    "cluster.cpu.cpus_per_node=2",
    "cluster.cpu.mem_gib=8",
    "cluster.ranks_per_node=2",
)
DISTILL = (f"stages.distill.num_steps={STEPS}", "stages.distill.save_interval_steps=5", "stages.distill.warmup_steps=2")
TWO_NODES = "execution.parallel_by_stage={distill: {tp: 2, dp: 2}}"


@dataclass(frozen=True)
class Run:
    """A run of the toy recipe below `root`."""

    root: Path
    cluster: SlurmCluster | None = None
    overrides: tuple[str, ...] = DISTILL
    recipe: Path = TOY
    name: str = NAME
    curves: str = ".work/distill/curves.jsonl"
    """Of the training that `wait_for_step` watches."""

    @property
    def folder(self) -> Path:
        return self.root / self.name

    def call(self, command: str, *words: str, code: int = 0) -> str:
        """Return the output of `minitron COMMAND RECIPE`, including stderr."""
        outer = os.environ if self.cluster is None else self.cluster.environment
        site = SITE if self.cluster is not None else ()
        options = [word for word in words if "=" not in word or word.startswith("-")]
        keys = [word for word in words if word not in options]
        positional = [option for option in options if not option.startswith("-")] if command == "logs" else []
        rest = [option for option in options if option not in positional]
        line = [
            sys.executable,
            "-m",
            "nemo_minitron",
            command,
            *rest,
            str(self.recipe),
            *positional,
            *site,
            *self.overrides,
        ]
        done = subprocess.run(
            [*line, f"execution.run_root={self.root}", *keys],
            cwd=REPO,
            env={**outer, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def job_ids(self, submission: int = 1) -> dict[str, list[str]]:
        jobs = json.loads((self.folder / f"launch/{submission:03d}/jobs.json").read_text())["jobs"]
        return {job["name"]: job["job_ids"] for job in jobs}

    def log(self, job: str) -> str:
        """Return the output of its jobs."""
        return "".join(file.read_text() for file in sorted((self.folder / "logs/slurm").glob(f"{job}-[0-9]*.log")))

    def wait_for_step(self, step: int, timeout_s: float = 300) -> None:
        """Wait until the training has made this many steps; it must not have finished."""
        curves, until = self.folder / self.curves, time.monotonic() + timeout_s
        stage = Path(self.curves).parts[1]
        while time.monotonic() < until:
            assert not (self.folder / stage).exists(), "it ended too early to be disturbed"
            if curves.is_file() and any(
                json.loads(line)["step"] >= step for line in curves.read_text().splitlines()[:-1]
            ):
                return
            time.sleep(0.05)
        raise AssertionError(f"no step {step}:\n{self.log(stage)}")

    def seconds_per_step(self) -> float:
        """Return the time of a step of its finished distillation, without the first steps."""
        rows = [json.loads(line) for line in (self.folder / "distill/curves.jsonl").read_text().splitlines()]
        trained = [row for row in rows if "tokens_per_s" in row]
        tokens_per_step = trained[-1]["tokens"] / trained[-1]["step"]
        return tokens_per_step / statistics.median(row["tokens_per_s"] for row in trained)

    def weights(self) -> bytes:
        return (self.folder / "distill/model.safetensors").read_bytes()


def prepare(root: Path) -> Run:
    """Run all stages before the distillation, on this machine."""
    run = Run(root)
    run.call("run", "--until=prune")
    run.call("run", "--until=check_teacher")
    return run


def copy_of(prepared: Run, root: Path, cluster: SlurmCluster | None, *overrides: str) -> Run:
    shutil.copytree(prepared.root, root, dirs_exist_ok=True)
    return Run(root, cluster, (*DISTILL, *overrides))
