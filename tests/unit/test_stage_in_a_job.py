"""What `minitron stage` requires and leaves for the job's script, and the nodes of a job other than the first."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_minitron.api import load_plan, load_recipe
from nemo_minitron.cli import stage as command
from nemo_minitron.errors import ArtifactError, DataError, Interrupted, ProcessesDied
from nemo_minitron.execution import job
from nemo_minitron.execution.runner import run_single
from tests.conftest import REPO, TOY
from tests.support.finished import finish


@pytest.mark.parametrize(
    ("error", "written"),
    [
        (DataError("the data are damaged"), "failed"),
        (ProcessesDied("killed"), None),
        (Interrupted("Stopped as requested by SIGTERM"), "interrupted"),
        (KeyboardInterrupt("SIGTERM"), "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_file_says_how_the_stage_ended(
    error: BaseException, written: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tmp_path / name for name in ("failed", "interrupted")}
    for name, file in files.items():
        monkeypatch.setenv(f"MINITRON_{name.upper()}_FILE", str(file))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(job, "run_in_job", fail)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(load_recipe(TOY).model_dump(mode="json")))
    with pytest.raises(type(error)):
        command.stage(recipe, "distill")
    assert [name for name, file in files.items() if file.exists()] == ([written] if written else [])
    assert all(file.read_text().strip() == str(error) for file in files.values() if file.exists())


OTHER_NODE = """
import os, sys
os.environ |= {"MINITRON_NODES": "2", "MINITRON_RENDEZVOUS": "node1:20001", "MINITRON_ATTEMPT": "7"}
os.environ["SLURM_NODEID"] = "1"
from nemo_minitron.api import load_plan, load_recipe
from nemo_minitron.execution import job
from nemo_minitron.execution.runner import run_single
serve = job.serve_requests
def shown(*arguments):
    print("serves", flush=True)
    return serve(*arguments)
job.serve_requests = shown
job.run_in_job(load_recipe(sys.argv[1], [f"execution.run_root={sys.argv[2]}"]), "distill")
"""


def test_another_node_waits_for_the_first_after_a_stop_signal(tmp_path: Path) -> None:
    words = [sys.executable, "-c", OTHER_NODE, str(TOY), str(tmp_path)]
    other = subprocess.Popen(words, cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "serves\n"
    other.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert other.poll() is None, "the step would be killed before the first node has saved a checkpoint"
    released = tmp_path / "toy/width/.work/distill/orders/7/end"
    released.parent.mkdir(parents=True)
    released.touch()
    assert other.wait(60) == 0


@pytest.mark.parametrize("stopped", [False, True])
def test_another_node_says_whether_its_processes_died_without_a_stop_request(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = tmp_path / "died"
    job_variables = {"NODES": "2", "RENDEZVOUS": "node1:20001", "ATTEMPT": "7", "DIED_FILE": str(died)}
    for name, value in job_variables.items():
        monkeypatch.setenv(f"MINITRON_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "1")
    requests = tmp_path / "toy/width/.work/distill/orders/7"
    requests.mkdir(parents=True)
    code = f"import os, signal; {stopped} and os.kill(os.getppid(), signal.SIGTERM); raise SystemExit(137)"
    request = {"command": [sys.executable, "-c", code], "environment": {}}
    (requests / "0.json").write_text(json.dumps(request))
    with pytest.raises(ProcessesDied, match="exited with code 137") as caught:
        job.run_in_job(load_recipe(TOY, [f"execution.run_root={tmp_path}"]), "distill")
    assert (died.read_text().strip() if died.exists() else None) == (None if stopped else str(caught.value))


def test_a_stage_does_not_read_an_input_of_another_recipe(tmp_path: Path) -> None:
    submitted, other = ([f"execution.run_root={tmp_path}", f"stages.distill.lr={lr}"] for lr in ("1e-3", "3e-4"))
    finish(load_plan(TOY, other), leave_out=["evaluate_distilled"])
    with pytest.raises(ArtifactError, match=r"no longer matches .*\n  - distill: lr: 0.0003 -> 0.001") as caught:
        run_single(load_recipe(TOY, submitted), "evaluate_distilled", quiet=True)
    assert "--rerun distill" in str(caught.value)
    assert not (tmp_path / "toy/width/evaluate_distilled").exists()
