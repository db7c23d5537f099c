"""Resuming a training in a work folder that was started with other keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_minitron.api import load_plan
from nemo_minitron.artifacts.store import Store
from nemo_minitron.execution.work import accept_work, open_work
from nemo_minitron.plan.planner import StageCall
from nemo_minitron.system.progress import Progress
from tests.conftest import TOY


def _distill(tmp_path: Path, *keys: str) -> StageCall:
    keys = (f"execution.run_root={tmp_path}", *(f"stages.distill.{key}" for key in keys))
    return next(call for call in load_plan(TOY, keys).calls if call.name == "distill")


@pytest.mark.parametrize(
    ("change", "resumes"),
    [
        ("teacher_correction={pretraining_lr: 4e-3, warmup_steps: 5}", True),
        ("teacher_correction={pretraining_lr: 5e-3, warmup_steps: 4, min_lr: 1e-5}", True),
        ("teacher_correction={pretraining_lr: 5e-3, warmup_steps: 5, lr_schedule: linear}", False),
        ("teacher_correction=null", False),
        ("valid_interval_steps=7", True),
        # The loss before would be of other text than the loss after.
        ("valid_num_tokens=4711", False),
    ],
)
def test_a_training_resumes_with_other_rates_but_not_with_another_schedule_or_other_measurements(
    change: str, resumes: bool, tmp_path: Path
) -> None:
    store, silent = Store(tmp_path / "run"), Progress(silent=True)
    correction = "teacher_correction={pretraining_lr: 5e-3, warmup_steps: 5}"
    first = _distill(tmp_path, correction)
    folder, _ = open_work(first, store, silent)
    (folder / "checkpoint").touch()
    changed = _distill(tmp_path, correction, change)
    accept_work(changed, store, silent)
    again, accepted = open_work(changed, store, silent)
    assert (again / "checkpoint").exists() == resumes
    assert bool(accepted) == resumes
