"""When a training goes on in a work folder that was begun with other keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_minitron.api import load_plan
from nemo_minitron.artifacts.store import Store
from nemo_minitron.execution.work import open_work
from nemo_minitron.plan.planner import StageCall
from nemo_minitron.system.progress import Progress
from tests.conftest import TOY


def _distill(tmp_path: Path, correction: str) -> StageCall:
    keys = [f"execution.run_root={tmp_path}", f"stages.distill.teacher_correction={correction}"]
    return next(call for call in load_plan(TOY, keys).calls if call.name == "distill")


@pytest.mark.parametrize(
    ("correction", "goes_on"),
    [
        ("{pretraining_lr: 4e-3, warmup_steps: 5}", True),
        ("{pretraining_lr: 5e-3, warmup_steps: 4, min_lr: 1e-5}", True),
        ("{pretraining_lr: 5e-3, warmup_steps: 5, lr_schedule: linear}", False),
        ("null", False),
    ],
)
def test_another_rate_of_the_teacher_may_go_on_and_another_course_may_not(
    correction: str, goes_on: bool, tmp_path: Path
) -> None:
    store, silent = Store(tmp_path / "run"), Progress(silent=True)
    begun = _distill(tmp_path, "{pretraining_lr: 5e-3, warmup_steps: 5}")
    folder, _ = open_work(begun, store, accept_drift=True, progress=silent)
    (folder / "checkpoint").touch()
    again, accepted = open_work(_distill(tmp_path, correction), store, accept_drift=True, progress=silent)
    assert (again / "checkpoint").exists() == goes_on
    assert bool(accepted) == goes_on
