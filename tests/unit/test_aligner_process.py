"""What a person sees of a process in NeMo-Aligner's environment."""

from __future__ import annotations

import dataclasses
import io
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.backends.alignment.base import TaskContext
from nemo_minitron.backends.alignment.nemo_aligner import environment, process, servers
from nemo_minitron.backends.alignment.nemo_aligner.context import on_cpu
from nemo_minitron.errors import EnvironmentProblem, ProcessesDied
from nemo_minitron.processes import exchange
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress
from nemo_minitron.system.terminal import Screen

STEPS = """
import json, os, sys, time
for step in (3, 4, 5):
    with open("new", "w") as file:
        json.dump({"step": step, "max_steps": 5, "loss": 1 / step}, file)
    os.replace("new", sys.argv[1])
    time.sleep(float(sys.argv[2]))
sys.exit(7)
"""


@pytest.mark.parametrize("terminal", [False, True])
def test_the_bar_goes_to_the_last_step(terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_minitron.system.progress.LOG_INTERVAL_S", 0.0)
    progress = Progress(tmp_path / "status.json")
    progress.stream = io.StringIO()
    progress.console = Screen(file=progress.stream, force_terminal=terminal, width=120)
    words = [sys.executable, "-c", STEPS, process.PROGRESS_FILE, str(4 * process.POLL_S)]
    child = subprocess.Popen(words, cwd=tmp_path, start_new_session=True)
    assert process._wait(child, "sft", tmp_path, progress, StopRequest(), lambda: None) == 7
    shown = progress.stream.getvalue()
    assert "5/5" in shown
    assert "loss 0.2" in shown
    if not terminal:
        lines = shown.splitlines()
        assert lines[0] == "sft 3/5 steps"  # a run that went on: no pace yet
        assert "eta" in next(line for line in lines if line.startswith("sft 4/5"))
        assert lines[-1] == "sft 5/5 steps loss 0.2"


def test_the_end_of_a_server_is_reported_before_the_error_that_it_caused(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"], start_new_session=True)
    child.wait()

    def watch() -> None:
        raise EnvironmentProblem("the server ended")

    with pytest.raises(EnvironmentProblem, match="the server ended"):
        process._wait(child, "ppo", tmp_path, Progress(), StopRequest(), watch)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("", "The rule_server ended with code -9 while the training needed it"),
        ("no such rule", "needed it: ValueError: no such rule"),
        ("x" * 900 + " [Errno 28] No space left on device", "The disk is full"),
    ],
)
def test_a_server_ends_with_its_last_words(message: str, expected: str, tmp_path: Path) -> None:
    server = servers.ServerTask("rule_server", 1, {}, tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    child.kill()
    child.wait()
    exchange.prepare(tmp_path)
    if message:
        exchange.save_error({"type": "ValueError", "message": message}, tmp_path)
    error = servers._ended(server, child)
    assert expected in str(error)
    assert isinstance(error, ProcessesDied) == (not message)


SAYS = """
import json, os, sys
task = json.load(open(sys.argv[2]))
json.dump({"result": dict(os.environ), "finished": True}, open(os.path.join(task["work_dir"], "result.json"), "w"))
"""
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "RANK": "1",
    "WORLD_SIZE": "2",
}
"""What a stage of one process sees on the second of two nodes."""


def _environment_of_a_task(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: bool) -> dict[str, str]:
    """What a task gets from a Python that stands for NeMo-Aligner's."""
    python = folder / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "{folder}/says.py" "$@"\n')
    python.chmod(0o755)
    (folder / "says.py").write_text(SAYS)
    monkeypatch.setenv("MINITRON_ALIGNER_PYTHON", str(python))
    monkeypatch.setattr(process, "has_gpu_kernels", lambda python: True)
    progress = Progress(silent=True)
    result = process.run_task("sft", {}, folder / "work", folder / "log", progress, StopRequest(), **options)  # type: ignore[arg-type]
    return dict(result["result"])


def test_a_single_process_does_not_see_the_job_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning would take it for one of the job's tasks, and refuse two nodes where it was told of one."""
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    seen = _environment_of_a_task(tmp_path, monkeypatch)
    assert not set(JOB) & set(seen)
    assert seen["NCCL_DEBUG"] == "WARN"
    assert (seen["MASTER_ADDR"], seen["PYTHONPATH"]) == ("127.0.0.1", "")


@pytest.mark.parametrize(("on_cpu", "devices"), [(True, ""), (False, "0,1")])
def test_gpus_are_hidden_from_a_task_that_is_to_run_on_the_cpu(
    on_cpu: bool, devices: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert _environment_of_a_task(tmp_path, monkeypatch, on_cpu=on_cpu)["CUDA_VISIBLE_DEVICES"] == devices


def test_an_environment_without_apex_beside_a_gpu_is_refused_and_the_image_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("MINITRON_ALIGNER_PYTHON", sys.executable)
    context = TaskContext("sft", tmp_path, Parallel(), "auto", None, Progress(silent=True), StopRequest())
    with pytest.raises(EnvironmentProblem, match="lacks Apex or Transformer Engine") as error:
        on_cpu(context)
    assert "aligner_image" in str(error.value)
    assert on_cpu(dataclasses.replace(context, device="cpu"))
    for name in ("apex", "transformer_engine"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text("")
    # The same Python, as in a container: packages may come by PYTHONPATH, and the look sees what the task will see.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    environment.has_gpu_kernels.cache_clear()
    assert not on_cpu(context)
    environment.has_gpu_kernels.cache_clear()


def test_pythonpath_stays_for_this_python_and_for_no_other() -> None:
    assert environment.environment_of(Path(sys.executable)) == {}
    assert environment.environment_of(Path("/elsewhere/bin/python")) == {"PYTHONPATH": "", "PYTHONHOME": ""}


def test_both_environments_spell_the_files_of_a_task_alike() -> None:
    """The scripts of the other environment cannot import the names."""
    from nemo_minitron.artifacts import run_paths

    task = runpy.run_path(str(environment.ENTRY / "task.py"))
    assert (task["RESULT_FILE"], task["ERROR_FILE"]) == (run_paths.RESULT, run_paths.ERROR)
    assert (task["PROGRESS_FILE"], task["STOP_FILE"]) == (process.PROGRESS_FILE, process.STOP_FILE)
