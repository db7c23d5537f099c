"""A stop request ends a training after its step, with a checkpoint; a killed run leaves no process behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_minitron.backends.megatron.training.checkpoint import checkpoints
from tests.conftest import REPO
from tests.support.processes import output_of, processes_of, start_run, wait_for_step

LONG = ("stages.distill.num_steps=100000", "stages.distill.save_interval_steps=100000")
RUN = "toy/width"
Request = Callable[[subprocess.Popen[str], Path], None]


def _sigterm_to_the_runner(process: subprocess.Popen[str], _: Path) -> None:
    process.send_signal(signal.SIGTERM)


def _sighup_to_every_process(process: subprocess.Popen[str], _: Path) -> None:
    """Send the signal of a closed terminal."""
    for found in list(processes_of(process)):
        found.send_signal(signal.SIGHUP)


def _sigusr1_to_every_process(process: subprocess.Popen[str], _: Path) -> None:
    """Send the signal of a scheduler before the time limit of a job."""
    for found in list(processes_of(process)):
        found.send_signal(signal.SIGUSR1)


def _sigterm_to_every_process(process: subprocess.Popen[str], _: Path) -> None:
    for found in list(processes_of(process)):
        found.send_signal(signal.SIGTERM)


def _sigterm_to_the_last_rank(process: subprocess.Popen[str], _: Path) -> None:
    # Helper processes of torch inherit the variable.
    ranks = [
        found for found in processes_of(process) if found.environ().get("RANK") == "1" and "worker" in found.cmdline()
    ]
    assert len(ranks) == 1
    ranks[0].send_signal(signal.SIGTERM)


def _stop_file(_: subprocess.Popen[str], root: Path) -> None:
    (root / RUN / "STOP").touch()


@pytest.mark.parametrize(
    ("request_stop", "reason", "dp"),
    [
        (_sigterm_to_the_runner, "SIGTERM", 1),
        (_stop_file, "the file STOP", 1),
        pytest.param(_sigterm_to_the_runner, "SIGTERM", 2, marks=pytest.mark.slow),
        (_sigterm_to_the_last_rank, "SIGTERM", 2),
        pytest.param(_sigterm_to_every_process, "SIGTERM", 2, marks=pytest.mark.slow),
        (_sigusr1_to_every_process, "SIGUSR1", 1),
        pytest.param(_sigusr1_to_every_process, "SIGUSR1", 2, marks=pytest.mark.slow),
        (_sighup_to_every_process, "SIGHUP", 1),
        pytest.param(_sighup_to_every_process, "SIGHUP", 2, marks=pytest.mark.slow),
    ],
)
def test_a_training_stops_after_its_step_and_resumes(
    request_stop: Request, reason: str, dp: int, tmp_path: Path
) -> None:
    layout = f"execution.parallel_by_stage={{distill: {{dp: {dp}, micro_batch_size: 4}}}}"
    first = start_run(tmp_path, *LONG, layout)
    work = tmp_path / RUN / ".work/distill"
    wait_for_step(work / "curves.jsonl", 5, first)
    request_stop(first, tmp_path)
    output = output_of(first)
    assert first.returncode == 130, output
    found = re.search(rf"distill stopped after step (\d+) of 100000 as requested by {reason}", output)
    assert found, output
    assert "the same command continues." in output
    assert "Traceback" not in output
    step = int(found[1])
    assert [path.name for path in checkpoints(work / "checkpoints")] == [f"step_{step:08d}"]
    assert not (tmp_path / RUN / "distill").exists(), "nothing may be published"
    assert not list(processes_of(first))

    again = start_run(tmp_path, *LONG, layout)
    wait_for_step(work / "curves.jsonl", step + 2, again)
    again.send_signal(signal.SIGTERM)
    output = output_of(again)
    assert again.returncode == 130
    log = tmp_path / RUN / "logs/distill.ranks.log"
    assert f"distill {step}/100000" in (log.read_text() if dp > 1 else output), "it must resume from the checkpoint"
    assert ("STOP, which stopped an earlier run" in output) == (reason == "the file STOP")
    assert not (tmp_path / RUN / "STOP").exists()


def test_a_signal_outside_of_training_ends_the_run_at_once(tmp_path: Path) -> None:
    process = start_run(tmp_path, *LONG)
    lock = tmp_path / RUN / ".lock"
    while not (lock.is_file() and lock.read_text()):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output = output_of(process, 60)
    assert process.returncode == 130, output
    assert "the same command continues" in output
    assert not (tmp_path / RUN / "distill").exists()


INTERRUPTED_IN_AN_EXTENSION = """
import ctypes
from nemo_minitron.cli import main as cli

run = ctypes.pythonapi.PyRun_String  # what an extension module may call while it is imported
run.restype, run.argtypes = ctypes.py_object, [ctypes.c_char_p, ctypes.c_int, ctypes.py_object, ctypes.py_object]
FILE_INPUT = 257
cli._app_of = lambda _: lambda standalone_mode: run(b"raise KeyboardInterrupt", FILE_INPUT, {}, {})
cli.main()
"""


def test_an_interrupt_within_an_import_has_the_exit_code_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(INTERRUPTED_IN_AN_EXTENSION)
    done = subprocess.run(
        [sys.executable, "-m", "command"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert "the same command continues" in done.stderr
    assert done.returncode == 130


@pytest.mark.parametrize("dp", [1, 2])
def test_a_killed_runner_leaves_no_process(dp: int, tmp_path: Path) -> None:
    layout = f"execution.parallel_by_stage={{distill: {{dp: {dp}, micro_batch_size: 4}}}}"
    process = start_run(tmp_path, "stages.distill.num_steps=100000", "stages.distill.save_interval_steps=2", layout)
    wait_for_step(tmp_path / RUN / ".work/distill/curves.jsonl", 5, process)
    assert list(processes_of(process)), "otherwise the test would pass without any process"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 15
    while (left := list(processes_of(process))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, [found.cmdline() for found in left]
