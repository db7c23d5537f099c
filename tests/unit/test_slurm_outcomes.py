"""What the script of a Slurm job does after its stage: bash runs it with stand-ins for srun and scontrol."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.launch.context import JobContext, JobFolders
from nemo_minitron.launch.jobs import Job
from nemo_minitron.launch.slurm.script import render_script
from nemo_minitron.schema.cluster import Cluster, Resources
from nemo_minitron.system.outer_job import SCRIPT_NAMES

MAX_RESTARTS = 3
SAVE = 'mkdir -p "$WORK/checkpoints"; : >"$WORK/checkpoints/0_0.distcp"'
FINISH = 'mkdir -p "$RUN/distill"; : >"$RUN/distill/manifest.json"'
KILLED = "exit 137"
FAIL = 'echo "the data are damaged" >"$MINITRON_FAILED_FILE"; exit 2'
WAIT_FOR_STOP = 'while [ ! -e "$MINITRON_STOP_FILE" ]; do /bin/sleep 0.02; done'
REQUEUED = 'kill -TERM "$PPID"'
"""Slurm ends the script of a job that it has requeued."""


@dataclass
class Script:
    """The script of the stage `distill`, in a folder of its own."""

    root: Path
    requeue: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    site: dict[str, Any] = field(default_factory=dict)
    """Further keys of the cluster."""

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def failed(self) -> Path:
        return self.run / "launch/001/distill.failed"

    def program(self, name: str, body: str) -> None:
        """Define a stand-in, which notes each of its calls."""
        file = self.root / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'#!/bin/bash\necho "$*" >>"{self.root}/{name}.calls"\n{body}\n')
        file.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        file = self.root / f"{name}.calls"
        return file.read_text().splitlines() if file.is_file() else []

    def start(self, srun: str, scontrol: str = REQUEUED) -> subprocess.Popen[str]:
        self.failed.parent.mkdir(parents=True, exist_ok=True)
        # The stage makes its work folder, which does not exist before its first attempt.
        for name, body in {"srun": f'mkdir -p "$WORK"; {srun}', "scontrol": scontrol, "sleep": ":"}.items():
            self.program(name, body)
        folders = JobFolders(self.root, self.run, self.root / "assets", self.failed.parent)
        resources = Resources(time_min=10, max_restarts=MAX_RESTARTS)
        job = Job("distill", ("distill",), 1, 1, resources, "core", uses_gpu=False, after=())
        context = JobContext("toy", self.run, self.failed.parent, folders, ["minitron"])
        script = self.root / "distill.sh"
        script.write_text(render_script(job, Cluster(requeue=self.requeue, **self.site), context))
        environment = {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "RUN": str(self.run),
            "WORK": str(self.run / ".work/distill"),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node1",
            **self.environment,
        }
        return subprocess.Popen(["bash", str(script)], env=environment, stdout=subprocess.PIPE, text=True)

    def result(self, srun: str, scontrol: str = REQUEUED) -> tuple[int, str]:
        """Return the exit code and the last line of the log without its beginning."""
        started = self.start(srun, scontrol)
        output, _ = started.communicate(timeout=60)
        return started.returncode, output.splitlines()[-1].partition(", distill: ")[2]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_a_stage_that_publishes_has_finished_with_any_exit_code(script: Script) -> None:
    assert script.result(f"{FINISH}; exit 1") == (0, "finished")
    assert script.result(FAIL) == (0, "has already finished")
    assert len(script.calls("srun")) == 1
    assert not script.calls("scontrol")


def test_an_error_that_a_user_must_repair_is_not_retried(script: Script) -> None:
    assert script.result(f"{SAVE}; {FAIL}") == (1, "failed: the data are damaged")
    assert script.result(FINISH) == (1, "failed before: the data are damaged")
    assert len(script.calls("srun")) == 1
    assert not script.calls("scontrol")


def test_a_stop_file_of_the_user_is_not_retried(script: Script) -> None:
    code, text = script.result(f'{SAVE}; : >"$RUN/STOP"')
    assert (code, text) == (1, f"stopped by {script.run}/STOP")
    assert not script.calls("scontrol")


@pytest.mark.parametrize(
    "saved",
    [
        "",
        ': >"$WORK/curves.jsonl"',
        'mkdir "$WORK/rows"; echo {} >"$WORK/rows/train.jsonl"',
        'mkdir "$WORK/partial-4"; : >"$WORK/partial-4/a.distcp"',
        'mkdir "$WORK/teacher_logits"; : >"$WORK/teacher_logits/train_0.partial"',
        'printf "[half" >"$WORK/sampled.batches.jsonl"',
    ],
)
def test_a_killed_stage_that_has_saved_nothing_is_not_retried(saved: str, script: Script) -> None:
    text = "ended and has saved nothing new in this job: not retried"
    assert script.result(f"{saved}\n{KILLED}") == (1, text)
    assert text in script.failed.read_text()
    assert script.result(FINISH)[0] == 1
    assert not script.calls("scontrol")


@pytest.mark.parametrize(
    "saved",
    ["0_0.distcp", "model.safetensors", "train.shard.json", "teacher_logits/train_0.jsonl", "sampled.batches.jsonl"],
)
def test_a_killed_stage_that_has_saved_something_is_requeued(saved: str, script: Script) -> None:
    code, text = script.result(f'mkdir -p "$WORK/teacher_logits"; echo >"$WORK/{saved}"; {KILLED}')
    assert (code, text) == (-signal.SIGTERM, "continues in the next job")
    assert script.calls("scontrol") == ["requeue 7"]
    assert not script.failed.exists()


def test_only_what_is_saved_in_this_job_counts(script: Script) -> None:
    script.result(f"{SAVE}; {KILLED}")
    assert script.result(KILLED)[1] == "ended and has saved nothing new in this job: not retried"


INTERRUPT = ': >"$MINITRON_INTERRUPTED_FILE"; exit 130'


def test_a_preempted_stage_is_requeued_even_if_it_has_saved_nothing(script: Script) -> None:
    assert script.result(INTERRUPT)[1] == "continues in the next job"
    assert script.calls("scontrol") == ["requeue 7"]
    assert script.result(KILLED)[1] == "ended and has saved nothing new in this job: not retried"


def test_processes_that_died_on_another_node_are_no_preemption(script: Script) -> None:
    died = f'echo "exited with code 137" >"$MINITRON_DIED_FILE"; {INTERRUPT}'
    assert script.result(died)[1] == "ended and has saved nothing new in this job: not retried"
    script.failed.unlink()
    assert script.result(INTERRUPT)[1] == "continues in the next job", "a file of an earlier job"


def test_a_preempted_stage_is_requeued_at_most_max_restarts_times(script: Script) -> None:
    script.environment = {"SLURM_RESTART_COUNT": str(MAX_RESTARTS)}
    assert script.result(INTERRUPT)[1] == f"has been restarted {MAX_RESTARTS} times: not retried"


def test_a_stage_that_has_saved_nothing_before_its_time_limit_is_not_retried(script: Script) -> None:
    text = "ended and has saved nothing new in this job: not retried"
    assert script.result(f': >"$MINITRON_STOP_FILE"; {INTERRUPT}') == (1, text)


def test_a_batch_that_is_added_to_an_existing_file_counts(script: Script) -> None:
    batch = f'echo "[]" >>"$WORK/rated.batches.jsonl"; {KILLED}'
    for _ in range(2):
        assert script.result(batch)[1] == "continues in the next job"
    assert script.result(KILLED)[1] == "ended and has saved nothing new in this job: not retried"


def test_a_task_of_an_array_requeues_only_itself(script: Script) -> None:
    script.environment = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "0"}
    script.result(f"{SAVE}; {KILLED}")
    assert script.calls("scontrol") == ["requeue 5_0"]


@pytest.mark.parametrize(("restarts", "is_requeued"), [(MAX_RESTARTS - 1, True), (MAX_RESTARTS, False)])
def test_a_job_is_restarted_at_most_max_restarts_times(restarts: int, is_requeued: bool, script: Script) -> None:
    script.environment = {"SLURM_RESTART_COUNT": str(restarts)}
    code, text = script.result(f"{SAVE}; {KILLED}")
    assert bool(script.calls("scontrol")) == is_requeued
    if not is_requeued:
        assert (code, text) == (1, f"has been restarted {MAX_RESTARTS} times: not retried")
        assert text in script.failed.read_text()


def test_a_controller_that_refuses_to_requeue_is_called_several_times(script: Script) -> None:
    assert script.result(f"{SAVE}; {KILLED}", scontrol="exit 1") == (1, "could not be requeued")
    assert len(script.calls("scontrol")) == 6


@pytest.mark.parametrize(
    ("last", "code", "text"),
    [
        ("no", 0, "continues in the next link of its chain"),
        ("yes", 1, "was the last link of its chain: launch again, or raise execution.cluster.links"),
    ],
)
def test_without_requeue_the_next_link_continues(last: str, code: int, text: str, tmp_path: Path) -> None:
    script = Script(tmp_path, requeue=False, environment={"MINITRON_LAST_LINK": last})
    assert script.result(f"{SAVE}; {KILLED}") == (code, text)
    assert not script.calls("scontrol")


def test_the_signal_before_the_time_limit_requests_a_checkpoint(script: Script) -> None:
    started = script.start(f"{WAIT_FOR_STOP}; {SAVE}")
    until = time.monotonic() + 30
    while not script.calls("srun"):
        assert time.monotonic() < until
        time.sleep(0.02)
    started.send_signal(signal.SIGUSR1)
    output, _ = started.communicate(timeout=60)
    assert "the time limit is near: requested a checkpoint" in output
    assert script.calls("scontrol") == ["requeue 7"]


@pytest.mark.parametrize("last", ["true", "set -e -u +o pipefail"])
def test_a_setup_script_may_read_unset_variables_and_set_options(last: str, script: Script) -> None:
    setup = script.root / "setup.sh"
    setup.write_text(f'[ -z "$BASHRCSOURCED" ] && export SITE=here\n{last}\n')
    script.site = {"setup_script": str(setup), "modules": ("cuda",)}
    script.program("module", 'exit "${UNSET_BY_DEFAULT:-0}"')
    assert script.result(f'[ "$SITE" = here ] && {SAVE}; {KILLED}')[1] == "continues in the next job"
    assert script.calls("module") == ["load cuda"]


def test_a_relative_setup_script_is_below_the_folder_of_the_call(script: Script) -> None:
    script.program("setup.sh", "exit 1")
    (script.root / "setup.sh").write_text("export SITE=here")
    script.site = {"setup_script": "setup.sh"}
    assert script.result(f'[ "$SITE" = here ] && {FINISH}') == (0, "finished")


@pytest.mark.parametrize(
    ("setup", "module", "message"),
    [
        ("return 3", "exit 0", "minitron: {root}/setup.sh failed with exit code 3"),
        (None, "exit 0", "minitron: {root}/setup.sh failed with exit code 1"),
        ("true", "exit 1", "minitron: module cuda failed with exit code 1"),
    ],
)
def test_a_stage_does_not_start_in_an_incomplete_environment(
    setup: str | None, module: str, message: str, script: Script
) -> None:
    file = script.root / "setup.sh"
    if setup is not None:
        file.write_text(setup)
    script.site = {"setup_script": str(file), "modules": ("cuda",)}
    script.program("module", module)
    started = script.start(FINISH)
    output, _ = started.communicate(timeout=60)
    assert (started.returncode, output.strip()) == (1, message.format(root=script.root))
    assert not script.calls("srun")


def test_a_stage_gets_nothing_of_the_job_that_submitted_it(script: Script) -> None:
    outer = {**dict.fromkeys(SCRIPT_NAMES, "2"), "SRUN_CPUS_PER_TASK": "2", "RANK": "1"}
    script.environment = outer
    seen = script.root / "seen"
    script.result(f'env >"{seen}"; {FINISH}')
    left = dict(line.split("=", 1) for line in seen.read_text().splitlines() if "=" in line)
    folder, kinds = script.failed.parent, ("STOP", "FAILED", "INTERRUPTED", "DIED")
    assert {name: left[name] for name in outer if name in left} == {
        "MINITRON_LAST_LINK": "2",  # sbatch sets it for the links of a chain
        **{f"MINITRON_{name}_FILE": f"{folder}/distill.{name.lower()}" for name in kinds},
    }
