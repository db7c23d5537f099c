"""Several runners of one run, and the locks of runners that have died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_minitron.api import load_recipe
from nemo_minitron.artifacts.store import Store
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import ArtifactError
from nemo_minitron.execution.runner import run_single
from tests.conftest import REPO, TOY, Cli
from tests.support.part_runs import computed, copy_before

HOLD = """
import sys, time
from pathlib import Path
from nemo_minitron.artifacts.store import Store
with Store(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(600)
"""


def _recipe(root: Path) -> Recipe:
    """Write the recipe as a launcher does for its jobs."""
    return load_recipe(TOY, [f"execution.run_root={root}"])


def _start_stage(root: Path, stage: str) -> subprocess.Popen[str]:
    """Start a stage as the script of a job does."""
    return subprocess.Popen(
        [sys.executable, "-m", "nemo_minitron", "stage", str(root / "recipe.json"), stage],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    "stages",
    [pytest.param(("prune", "prune_random"), marks=pytest.mark.slow), ("prune", "prune")],
    ids=["two stages", "one stage"],
)
def test_two_jobs_at_once(stages: tuple[str, str], toy_run: Path, tmp_path: Path) -> None:
    run = copy_before(toy_run, tmp_path, "prune")
    for name in ("prune_random", "evaluate_random"):
        (run / name).rename(tmp_path / name)
    (tmp_path / "recipe.json").write_text(json.dumps(_recipe(tmp_path).model_dump(mode="json")))
    jobs = [_start_stage(tmp_path, stage) for stage in stages]
    for job in jobs:
        output = job.communicate(timeout=240)[0]
        assert job.returncode == 0, output
    for stage in stages:
        assert computed(run / stage) == computed(toy_run / "toy/width" / stage)
    assert not list(run.glob(".partial-*"))


def test_a_stage_of_another_active_runner_is_not_changed(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    run = copy_before(toy_run, tmp_path, "select")
    command = ("run", TOY, f"execution.run_root={tmp_path}", "--until", "select")
    with Store(run).lock("select"):
        with pytest.raises(ArtifactError, match="Another runner works on this run"):
            run_single(_recipe(tmp_path), "select", quiet=True)
        code, output = minitron(*command)
        assert code == 2, output
        flat = " ".join(output.split())
        assert "Another runner works on this run: jobs that run its stages." in flat
        assert "minitron status RECIPE" in flat
        assert "Traceback" not in output
        assert not (run / "select").exists()
        # Another stage meanwhile.
        (run / "select_random").rename(tmp_path / "select_random")
        run_single(_recipe(tmp_path), "select_random", quiet=True)
        assert (run / "select_random/prune_plan.json").is_file()
    code, output = minitron(*command)
    assert code == 0, output


def test_a_runner_of_the_whole_run_excludes_jobs(toy_run: Path, tmp_path: Path) -> None:
    run = copy_before(toy_run, tmp_path, "select")
    with (
        Store(run).lock(),
        pytest.raises(ArtifactError, match=f"Another runner works on this run: process {os.getpid()} on "),
    ):
        run_single(_recipe(tmp_path), "select", quiet=True)


def test_the_lock_of_a_killed_process_is_free(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    run = copy_before(toy_run, tmp_path, "select")
    command = ("run", TOY, f"execution.run_root={tmp_path}", "--until", "select")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    code, output = minitron(*command)
    assert code == 2
    assert f"process {holder.pid} on" in output
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert f"process {holder.pid} on" in (run / ".lock").read_text(), "its words stay, and mean nothing"
    code, output = minitron(*command)
    assert code == 0, output


def test_the_text_in_a_lock_file_of_another_host_does_not_lock(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    """After the loss of a node, the file system has released its lock, but the file still names the node."""
    run = copy_before(toy_run, tmp_path, "select")
    (run / ".lock").write_text("process 4711 on node-17: minitron run recipe.yaml\n")
    (run / ".work").mkdir(exist_ok=True)
    (run / ".work/select.lock").write_text("process 4711 on node-17: minitron stage select\n")
    (run / ".partial-select-4711").mkdir()
    code, output = minitron("run", TOY, f"execution.run_root={tmp_path}", "--until", "select")
    assert code == 0, output
    assert not list(run.glob(".partial-*"))


@pytest.mark.slow
def test_a_job_waits_for_the_lock_of_the_previous_job(toy_run: Path, tmp_path: Path) -> None:
    run = copy_before(toy_run, tmp_path, "select")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    (tmp_path / "recipe.json").write_text(json.dumps(_recipe(tmp_path).model_dump(mode="json")))
    job = _start_stage(tmp_path, "select")
    time.sleep(3.0)
    assert job.poll() is None, "it waits"
    holder.kill()
    holder.wait()
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 0, output
    assert (run / "select/prune_plan.json").is_file()
