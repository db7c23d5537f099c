"""What a person sees of a process in NeMo-Aligner's environment."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nemo_minitron.backends.aligner import process
from nemo_minitron.interrupts import StopRequest
from nemo_minitron.progress import Progress

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
    monkeypatch.setattr("nemo_minitron.progress.LOG_INTERVAL_S", 0.0)
    progress = Progress(tmp_path / "status.json")
    progress.stream = io.StringIO()
    progress.console = Console(file=progress.stream, force_terminal=terminal, width=120)
    words = [sys.executable, "-c", STEPS, process.PROGRESS_FILE, str(4 * process.POLL_S)]
    child = subprocess.Popen(words, cwd=tmp_path, start_new_session=True)
    assert process._wait(child, "sft", tmp_path, progress, StopRequest()) == 7
    shown = progress.stream.getvalue()
    assert "5/5" in shown
    assert "loss 0.2" in shown
    if not terminal:
        lines = shown.splitlines()
        assert lines[0] == "sft 3/5 steps"  # a run that went on: no pace yet
        assert "eta" in next(line for line in lines if line.startswith("sft 4/5"))
        assert lines[-1] == "sft 5/5 steps loss 0.2"
