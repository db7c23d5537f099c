"""What a person sees of a process in NeMo-Aligner's environment."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.backends.alignment.base import TaskContext
from nemo_minitron.backends.alignment.nemo_aligner import environment, process, servers
from nemo_minitron.backends.alignment.nemo_aligner.context import on_cpu
from nemo_minitron.errors import EnvironmentProblem, Interrupted, ProcessesDied
from nemo_minitron.processes import exchange
from nemo_minitron.processes.agent import FAILED_FILE, RENDEZVOUS_VARIABLE
from nemo_minitron.processes.nodes import RUNNER_VARIABLE, Nodes, shielded, start_everywhere
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


def test_servers_that_end_after_a_stop_request_are_an_interruption(tmp_path: Path) -> None:
    """Slurm sends SIGTERM to them, too, when it preempts a job."""
    with shielded():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)

    def watch() -> None:
        raise ProcessesDied("the server ended")

    (tmp_path / "STOP").touch()
    with pytest.raises(Interrupted, match="Stopped in ppo as requested by the file STOP"):
        process._wait(child, "ppo", tmp_path, Progress(), StopRequest(tmp_path), watch)
    assert child.wait(10) == -signal.SIGINT


HANDLES_SIGTERM = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); "
HANDLES_SIGTERM += "print('ready', flush=True); time.sleep(60)"


@pytest.mark.parametrize("outside_job", [True, False])
@pytest.mark.parametrize("in_background", [True, False])
def test_a_preemption_does_not_end_processes_outside_of_the_job(
    outside_job: bool, in_background: bool, tmp_path: Path
) -> None:
    """torchrun of older torch and Triton handle SIGTERM even if they are started with the signal ignored."""
    command = [sys.executable, "-c", HANDLES_SIGTERM]

    def start(command: list[str], own: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, start_new_session=True)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.default_int_handler)
    try:
        started = start_everywhere(command, {}, Nodes(), tmp_path, start, outside_job=outside_job)
        assert signal.getsignal(signal.SIGINT) is (signal.SIG_IGN if in_background else signal.default_int_handler)
    finally:
        signal.signal(signal.SIGINT, before)
    assert started.stdout is not None
    assert started.stdout.readline() == b"ready\n"
    started.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.wait(2.0 if outside_job else 60.0)
    assert started.poll() == (None if outside_job else 3)
    process._end(started)
    assert started.poll() == (-signal.SIGINT if outside_job else 3)


RANK = """
import sys, time
sys.path.insert(0, sys.argv[1])
import task
def wait(_):
    print("ready", flush=True)
    time.sleep(60)
task.run(sys.argv[2], wait, {})
"""


def test_a_rank_ends_when_another_one_has_failed(tmp_path: Path) -> None:
    """The agent's SIGTERM does not reach it."""
    names = runpy.run_path(str(environment.ENTRY / "task.py"))
    assert (names["RENDEZVOUS_VARIABLE"], names["FAILED_FILE"]) == (RENDEZVOUS_VARIABLE, FAILED_FILE)
    own = {**os.environ, RENDEZVOUS_VARIABLE: str(tmp_path), RUNNER_VARIABLE: str(os.getpid()), "RANK": "1"}
    words = [sys.executable, "-c", RANK, str(environment.ENTRY), str(tmp_path)]
    rank = subprocess.Popen(words, env=own, stdout=subprocess.PIPE)
    assert rank.stdout is not None
    assert rank.stdout.readline() == b"ready\n"
    (tmp_path / FAILED_FILE).touch()
    assert rank.wait(10) == 1


@pytest.mark.parametrize(
    ("kind", "message", "is_lost"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB", True),
        ("DistBackendError", "NCCL error in: ProcessGroupNCCL.cpp", True),
        ("RuntimeError", "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1", True),
        ("RuntimeError", "CUDA error: an illegal memory access was encountered", True),
        ("RuntimeError", "The size of tensor a (3) must match", False),
        ("ValueError", "no such key", False),
    ],
)
def test_lost_ranks_and_full_memory_are_no_error_of_the_user(
    kind: str, message: str, is_lost: bool, tmp_path: Path
) -> None:
    exchange.prepare(tmp_path)
    exchange.save_error({"type": kind, "message": message}, tmp_path)
    with pytest.raises(EnvironmentProblem, match=f"ended with code 1: {kind}: ") as caught:
        process._result("sft", 1, tmp_path, tmp_path / "log", StopRequest())
    assert isinstance(caught.value, ProcessesDied) == is_lost
    ended = subprocess.Popen(["true"])
    ended.wait()
    error = servers._ended(servers.ServerTask("critic_server", 1, {}, tmp_path), ended)
    assert isinstance(error, ProcessesDied) == is_lost


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
