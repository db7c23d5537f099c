"""Candidates as an array of jobs; stages in containers, through a stand-in for pyxis."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.support.slurm.cluster import SlurmCluster
from tests.support.slurm.runs import SITE, Run, copy_of

pytestmark = pytest.mark.slurm
TIMEOUT_S = 900


def _launch(recipe: str, cluster: SlurmCluster, *overrides: str, outer: Mapping[str, str] | None = None) -> str:
    command = [sys.executable, "-m", "nemo_minitron", "launch", recipe, *SITE, *overrides]
    environment = {**cluster.environment, "OMP_NUM_THREADS": "1", **(outer or {})}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=600, check=False)
    return done.stdout + done.stderr


def test_the_candidates_of_a_search_are_one_array_for_each_rung(slurm: SlurmCluster, tmp_path: Path) -> None:
    output = _launch("recipes/toy/search.yaml", slurm, f"execution.run_root={tmp_path}", "cluster.array_limit=2")
    assert "submitted" in output, output
    slurm.wait_until_idle(TIMEOUT_S)
    run = tmp_path / "toy/search"
    scripts = sorted(file.name for file in (run / "launch/001").glob("*rung*.sh"))
    assert scripts, output
    first = (run / "launch/001" / scripts[0]).read_text()
    assert "#SBATCH --array=0-" in first
    assert "%2\n" in first
    assert (run / "report.html").is_file()


def test_stages_see_only_their_container_and_what_is_mounted(
    slurm_with_containers: SlurmCluster, prepared: Run, tmp_path: Path
) -> None:
    cluster = slurm_with_containers
    site = ("cluster.container.runtime=pyxis", "cluster.container.core_image='nvcr.io#x/nemo-minitron:core'")
    run = copy_of(prepared, tmp_path, cluster, *site, f"cluster.command={Path(sys.executable).with_name('minitron')}")
    assert "srun takes --container-image (pyxis)" in run.call("check", "--cluster")
    run.call("launch", "--until=distill")
    cluster.wait_until_idle(TIMEOUT_S)
    assert (run.folder / "distill/manifest.json").is_file(), run.log("distill")
    image, mounts, workdir = (cluster.home / "log/containers.log").read_text().splitlines()[-1].split("\t")
    assert image == "nvcr.io#x/nemo-minitron:core"
    assert f"{run.folder}:{run.folder}" in mounts.split(",")
    assert workdir == str(REPO)


def test_a_missing_plugin_is_reported_before_anything_is_queued(slurm: SlurmCluster, tmp_path: Path) -> None:
    run = Run(tmp_path, slurm, ("cluster.container.runtime=pyxis", "cluster.container.core_image=x"))
    output = run.call("check", "--cluster", code=2)
    assert "srun has no --container-image: pyxis is not installed" in output


@pytest.mark.parametrize(
    ("keys", "output"),
    [
        (("cluster.partition=gpu",), "there is no partition gpu"),
        (("cluster.partition=short", "cluster.time_min=60", "cluster.grace_s=60"), "needs 60 minutes; the limit is 2"),
        (
            ("cluster.gpus_per_node=16", "cluster.exclusive=true", "execution.device=auto"),
            "needs 16 GPUs per node; its nodes have 8",
        ),
        (("cluster.setup_script=/nowhere.sh",), "there is no file /nowhere.sh"),
    ],
)
def test_what_the_cluster_cannot_give_is_found_before_a_job_is_queued(
    keys: tuple[str, ...], output: str, slurm: SlurmCluster, tmp_path: Path
) -> None:
    assert output in Run(tmp_path, slurm, keys).call("check", "--cluster", code=2)


def test_slurm_refusing_a_job_leaves_nothing_queued(slurm: SlurmCluster, prepared: Run, tmp_path: Path) -> None:
    run = copy_of(prepared, tmp_path, slurm, "cluster.by_stage={evaluate_distilled: {time_min: 90, partition: short}}")
    output = run.call("launch", "--until=evaluate_distilled", code=2)
    assert "sbatch failed" in output
    assert "taking back what was submitted" in output
    slurm.wait_until_idle(30)


OUTER = {
    "SLURM_JOB_ID": "7",
    "SLURM_MEM_PER_CPU": "4000",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_CPUS_PER_TASK": "7",
    "SLURM_NTASKS": "3",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_PARTITION": "nowhere",
    "SRUN_CPUS_PER_TASK": "7",
    "SQUEUE_FORMAT": "%j",
    "RANK": "1",
    "WORLD_SIZE": "2",
}
"""Variables of an interactive job, from which `launch` is called."""


def _site_with(sbatch: str, cluster: SlurmCluster, folder: Path) -> dict[str, str]:
    """Return a PATH on which sbatch is a script of the site; $sbatch is Slurm's program."""
    real = subprocess.run(
        ["bash", "-c", "command -v sbatch"], env=cluster.environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    folder.mkdir()
    program = folder / "sbatch"
    program.write_text(f"#!/bin/bash\nsbatch={real}\n{sbatch}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:{cluster.environment['PATH']}"}


def test_a_launch_inside_a_job_and_after_a_banner(slurm: SlurmCluster, tmp_path: Path) -> None:
    banner = 'echo "-- Welcome --"; echo "2 node hours will be charged"; exec "$sbatch" "$@"'
    outer = {**OUTER, **_site_with(banner, slurm, tmp_path / "bin")}
    root = f"execution.run_root={tmp_path}"
    output = _launch("recipes/toy/width.yaml", slurm, root, "--until=check_teacher", outer=outer)
    assert "submitted" in output, output
    assert "not passed on to sbatch: SBATCH_EXPORT, SBATCH_PARTITION" in output
    slurm.wait_until_idle(TIMEOUT_S)
    run = tmp_path / "toy/width"
    assert (run / "check_teacher/manifest.json").is_file(), output
    jobs = json.loads((run / "launch/001/jobs.json").read_text())["jobs"]
    assert {slurm.job(job["job_ids"][0])["JobState"] for job in jobs} == {"COMPLETED"}


def test_jobs_whose_ids_were_not_printed_are_canceled(slurm: SlurmCluster, tmp_path: Path) -> None:
    mute = '"$sbatch" --begin=now+1hour "$@" >/dev/null; echo "your job is welcome"'
    outer = _site_with(mute, slurm, tmp_path / "bin")
    output = _launch("recipes/toy/width.yaml", slurm, f"execution.run_root={tmp_path}", outer=outer)
    assert "was found in the queue and canceled" in output, output
    slurm.wait_until_idle(30)
