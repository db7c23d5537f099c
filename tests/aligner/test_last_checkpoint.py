"""NeMo resumes from what is kept of the checkpoints of a killed training; it refuses some of what a kill leaves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nemo_minitron.backends.alignment.nemo_aligner.environment import aligner_python
from nemo_minitron.backends.alignment.nemo_aligner.last_checkpoint import keep_last_checkpoint
from tests.unit.test_last_checkpoint import CASES, plant

pytestmark = pytest.mark.slow

RESUME = """
import sys
from types import SimpleNamespace
from nemo.utils.exp_manager import check_resume

for folder in sys.argv[1:]:
    trainer = SimpleNamespace(ckpt_path=None)
    try:
        check_resume(trainer, folder, resume_if_exists=True, resume_ignore_no_checkpoint=True)
        print("FOUND", (trainer.ckpt_path or "none").rpartition("/")[2])
    except ValueError as error:
        print("FOUND refused:", str(error)[:15])
"""


def resumed(folders: list[Path]) -> list[str]:
    """Return the names of the checkpoints from which NeMo would resume."""
    command = [str(aligner_python()), "-c", RESUME, *(str(folder / "nemo_experiment") for folder in folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]


def test_nemo_resumes_from_the_newest_finished_checkpoint(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(CASES))]
    for folder, (left, _, _) in zip(folders, CASES.values(), strict=True):
        plant(folder, left)
    before = dict(zip(CASES, resumed(folders), strict=True))
    assert before["the first is unfinished"] == "refused: Last checkpoint"
    assert before["the one before has not been removed yet"] == "refused: Multiple checkp"
    steps = [keep_last_checkpoint(folder) for folder in folders]
    assert resumed(folders) == [f"step={step}-last" if step else "none" for step in steps]
