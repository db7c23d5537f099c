"""Runs of the command line in separate processes, which tests signal and kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psutil

from nemo_minitron.backends.alignment.nemo_aligner.fork_server import COMMAND
from tests.conftest import REPO, TOY

MARK = "MINITRON_TEST_RUN"


def start_run(root: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start `minitron run` on the toy recipe up to distillation; its processes have a unique mark."""
    command = [sys.executable, "-m", "nemo_minitron", "run", str(TOY), f"execution.run_root={root}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: uuid4().hex}
    process = subprocess.Popen(
        [*command, "--until", "distill"],
        cwd=REPO,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.mark = environment[MARK]  # type: ignore[attr-defined]
    return process


def processes_of(process: subprocess.Popen[str]) -> Iterator[psutil.Process]:
    """Return all processes with the run's mark, including orphans."""
    return marked(process.mark)  # type: ignore[attr-defined]


def marked(mark: str) -> Iterator[psutil.Process]:
    """Return all processes with this mark."""
    for found in psutil.process_iter():
        try:
            if found.environ().get(MARK) == mark and found.status() != psutil.STATUS_ZOMBIE:
                yield found
        except psutil.Error:
            continue


def wait_for_step(curves: Path, step: int, process: subprocess.Popen[str], *, timeout_s: float = 240) -> None:
    """Wait until the curve has a row of this step."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if curves.is_file() and any(json.loads(line)["step"] >= step for line in curves.read_text().splitlines()[:-1]):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("the training did not get that far")


def output_of(process: subprocess.Popen[str], timeout_s: float = 240) -> str:
    """Wait for the end, and return stdout and stderr."""
    return "".join(process.communicate(timeout=timeout_s))


def runs_in_a_fork(process: psutil.Process) -> bool:
    """Return whether the process is the current task of a stage that has imported NeMo-Aligner once."""
    parent = process.parent()
    return parent is not None and COMMAND in process.cmdline() and COMMAND in parent.cmdline()


def mark_of(process: subprocess.Popen[str]) -> str:
    """Return the mark of a process that has just been started; right after its start its environment can be empty."""
    deadline = time.monotonic() + 10.0
    while MARK not in (found := psutil.Process(process.pid).environ()):
        assert time.monotonic() < deadline, "the process has no mark"
        time.sleep(0.01)
    return found[MARK]
