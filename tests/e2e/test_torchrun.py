"""Distributed stages through torchrun, as the command line starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import TOY, Cli

TP2 = ["execution.parallel.tp=2", "execution.parallel.micro_batch_size=2"]


def _result(root: Path, stage: str) -> dict:
    return json.loads((root / "toy/width" / stage / "manifest.json").read_text())["result"]


def test_two_ranks_measure_what_one_measured(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    code, output = minitron("run", TOY, f"execution.run_root={tmp_path}", *TP2, "--until", "check_teacher")
    assert code == 0, output
    one, two = (_result(root, "check_teacher") for root in (toy_run, tmp_path))
    assert two["num_tokens"] == one["num_tokens"]
    assert two["loss_nats_per_token"] == pytest.approx(one["loss_nats_per_token"], rel=1e-6)


def test_an_error_in_a_worker_reaches_the_user_as_it_was_written(minitron: Cli, tmp_path: Path) -> None:
    bound = "stages.check_teacher.max_loss=0.5"
    code, output = minitron("run", TOY, f"execution.run_root={tmp_path}", *TP2, bound, "--until", "check_teacher")
    assert code == 2, output
    flat = " ".join(output.split())
    assert "The teacher's held-out loss is" in flat
    assert "at most max_loss = 0.5" in flat
    assert not (tmp_path / "toy/width/check_teacher").exists()


def _on_a_terminal(*command: str) -> str:
    """Return what the command prints on a terminal."""
    screen, terminal = os.openpty()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        # Linux reports an error when the last process has closed the terminal.
        with suppress(OSError), os.fdopen(screen, "rb", buffering=0) as opened:
            while more := opened.read(4096):
                shown += more
    assert process.returncode == 0, shown
    return shown.decode(errors="replace")


def test_a_terminal_shows_nothing_of_what_libraries_log(tmp_path: Path) -> None:
    """Megatron-Core 0.19 logs at each start that its models are deprecated."""
    run = ["run", str(TOY), f"execution.run_root={tmp_path}", *TP2, "--until", "check_teacher"]
    shown = _on_a_terminal(sys.executable, "-m", "nemo_minitron", *run)
    assert "check_teacher" in shown
    assert "deprecated" not in shown.lower()
