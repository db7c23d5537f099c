"""Jobs are submitted once, and `status`, `cancel` and the next `launch` find every submitted job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemo_minitron.api import load_recipe
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import ArtifactError, EnvironmentProblem
from nemo_minitron.execution.runner import RunOptions
from nemo_minitron.launch import record
from nemo_minitron.launch.slurm.submit import submit
from nemo_minitron.launch.status import job_facts, require_no_jobs
from nemo_minitron.plan.planner import make_plan
from tests.conftest import TOY, Cli
from tests.support.fake_slurm import FakeSlurm

OPTIONS = RunOptions(until="data")
QUEUED = "PENDING             |None|0:00|1:00|||0|"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A Slurm with a queue: squeue lists the jobs of sbatch until scancel was called for them."""
    fake = FakeSlurm(tmp_path / "slurm", monkeypatch)
    queue = tmp_path / "queue"
    queue.touch()
    fake.set("sbatch", f'n=$(($(wc -l <{queue}) + 41)); echo "$n|${{@: -1}}" >>{queue}; echo $n')
    states = f"sed -n \"s/^${{job#--jobs=}}|.*/${{job#--jobs=}}|{QUEUED}/p\" {queue} | tr -d ' '"
    fake.set("squeue", f'for job in "$@"; do case $job in --jobs=*) {states}; exit;; esac; done; cat {queue}')
    fake.set("scancel", "exit 0")
    return fake


def _recipe(tmp_path: Path) -> Recipe:
    site = ["launcher=slurm", "cluster=slurm", "cluster.partition=null", "cluster.account=null"]
    return load_recipe(TOY, [f"execution.run_root={tmp_path}/runs", *site])


def _slow(fake: FakeSlurm, seconds: float) -> None:
    file = fake.folder / "bin/sbatch"
    file.write_text(file.read_text().replace("#!/bin/bash\n", f"#!/bin/bash\nsleep {seconds}\n"))


def test_a_second_launch_while_sbatch_is_slow_submits_nothing(tmp_path: Path, fake: FakeSlurm) -> None:
    _slow(fake, 0.6)
    recipe = _recipe(tmp_path)
    first = threading.Thread(target=submit, args=(make_plan(recipe), OPTIONS, print))
    first.start()
    while not (tmp_path / "runs/toy/width/launch/001").is_dir():
        time.sleep(0.02)
    with pytest.raises(ArtifactError, match="Another `minitron launch` of this run is running"):
        submit(make_plan(recipe), OPTIONS, print)
    first.join()
    jobs = [call for call in fake.calls("sbatch") if call.endswith(".sh")]
    assert len(jobs) == len(set(jobs)) == 2
    last = record.newest(tmp_path / "runs/toy/width")
    assert last is not None
    assert last.complete
    assert last.job_ids == ["41", "42"]
    with pytest.raises(ArtifactError, match="Jobs of this run are still there: 41, 42"):
        submit(make_plan(recipe), OPTIONS, print)


KILLED = """
import sys
from tests.security.test_launch_once import OPTIONS, _recipe
from nemo_minitron.launch.slurm.submit import submit
from nemo_minitron.plan.planner import make_plan
from pathlib import Path
submit(make_plan(_recipe(Path(sys.argv[1]))), OPTIONS, print)
"""


def test_a_killed_launch_leaves_no_unknown_job(tmp_path: Path, fake: FakeSlurm, minitron: Cli) -> None:
    recipe, run = _recipe(tmp_path), tmp_path / "runs/toy/width"
    body = (fake.folder / "bin/sbatch").read_text()
    # sbatch has created the job, but its caller is killed before it reads the id.
    (fake.folder / "bin/sbatch").write_text(f"{body.rsplit('; echo', 1)[0]}; kill -KILL $PPID\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    recorded = json.loads((run / "launch/001/jobs.json").read_text())
    assert not recorded["complete"]
    assert [job["job_ids"] for job in recorded["jobs"]] == [[], []]
    assert job_facts(run)["teacher"]["job"] == "41"
    with pytest.raises(ArtifactError, match="Jobs of this run are still there: 41"):
        submit(make_plan(recipe), OPTIONS, print)
    code, output = minitron("cancel", TOY, f"execution.run_root={tmp_path}/runs")
    assert (code, output.strip()) == (0, "canceled 41")
    assert fake.calls("scancel") == ["41"]


def test_nothing_is_submitted_if_the_queue_does_not_answer_after_a_kill(tmp_path: Path, fake: FakeSlurm) -> None:
    recipe, run = _recipe(tmp_path), tmp_path / "runs/toy/width"
    folder = record.next_folder(run)
    folder.mkdir(parents=True)
    record.Submission(folder, "slurm", 0.0, (record.Submitted("teacher", ("teacher",), (), "x"),), False).write()
    fake.set("squeue", "echo 'slurm_load_jobs error: Invalid user' >&2; exit 1")
    with pytest.raises(EnvironmentProblem, match="Invalid user"):
        submit(make_plan(recipe), OPTIONS, print)
    assert job_facts(run) == {}, "status shows what is recorded"
    assert not fake.calls("sbatch")


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "launch/.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ArtifactError, match="The lock is a link"), record.launching(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def _submitted(run: Path) -> None:
    folder = record.next_folder(run)
    folder.mkdir(parents=True)
    record.Submission(folder, "slurm", 0.0, (record.Submitted("teacher", ("teacher",), ("41",), "x"),)).write()


@pytest.mark.parametrize("command", ["run", "launch"])
def test_no_stage_runs_here_while_jobs_wait(command: str, tmp_path: Path, fake: FakeSlurm, minitron: Cli) -> None:
    run = tmp_path / "runs/toy/width"
    _submitted(run)
    fake.set("squeue", "echo '41|PENDING|None|0:00|1:00||0|'")
    words = [command, TOY, f"execution.run_root={tmp_path}/runs", "--until=teacher"]
    code, output = minitron(*words)
    assert code == 2
    assert "Jobs of this run are still there: 41." in output
    assert not (run / "teacher").exists()
    fake.set("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    code, output = minitron(*words)
    assert code == 0, output
    assert (run / "teacher/manifest.json").is_file()


@pytest.mark.parametrize("own", ["SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"])
def test_a_job_of_the_run_may_run_the_recipe(
    own: str, tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    _submitted(tmp_path)
    fake.set("squeue", "echo '41|RUNNING|None|0:00|1:00||0|'")
    with pytest.raises(ArtifactError, match="still there: 41"):
        require_no_jobs(tmp_path)
    monkeypatch.setenv(own, "41")
    require_no_jobs(tmp_path)
