"""Outputs that the user has accepted although the recipe has changed, and later reruns of their stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nemo_minitron.api import load_plan
from nemo_minitron.artifacts.manifest import Manifest
from nemo_minitron.artifacts.store import Store
from nemo_minitron.errors import ArtifactError
from nemo_minitron.execution.runner import RunOptions, settle
from nemo_minitron.execution.work import open_work
from nemo_minitron.plan.planner import RunPlan, refreshed
from nemo_minitron.system.progress import Progress
from tests.conftest import TOY
from tests.support.finished import finish

OTHER_RATE = "stages.distill.lr=3e-4"


def _plan(root: Path, *overrides: str) -> RunPlan:
    return load_plan(TOY, [f"execution.run_root={root}", *overrides])


def _statuses(plan: RunPlan) -> set[str]:
    return {state.status for state in plan.states.values()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a finished run whose distillation was accepted with another learning rate."""
    folder = tmp_path / "toy/width"
    finish(_plan(tmp_path))
    assert _statuses(_plan(tmp_path)) == {"finished"}
    settle(_plan(tmp_path, OTHER_RATE), RunOptions(accept_drift=True))
    assert _statuses(_plan(tmp_path, OTHER_RATE)) == {"finished"}
    return folder


def _manifest(run: Path, stage: str) -> Manifest:
    found = Store(run).manifest(stage)
    assert found is not None
    return found


def test_a_rerun_replaces_what_was_accepted(run: Path, tmp_path: Path) -> None:
    plan = settle(_plan(tmp_path, OTHER_RATE), RunOptions(rerun=("distill",)))
    assert plan.states["distill"].status == "to run"
    finish(plan)
    assert _statuses(refreshed(plan)) == {"finished"}
    distilled = _manifest(run, "distill")
    assert distilled.fingerprint == plan.call("distill").fingerprint
    assert distilled.fingerprint in json.dumps(_manifest(run, "evaluate_distilled").payload["inputs"])
    settle(_plan(tmp_path, OTHER_RATE), RunOptions())


def test_a_rerun_after_the_output_was_deleted_by_hand_replaces_what_was_accepted(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "distill")
    plan = _plan(tmp_path, OTHER_RATE)
    assert plan.states["distill"].status == "to run"
    finish(settle(plan, RunOptions(rerun=("changed",))))
    assert _statuses(refreshed(plan)) == {"finished"}


def test_a_rerun_withdraws_the_acceptance(run: Path, tmp_path: Path) -> None:
    for rate in ([OTHER_RATE], []):
        finish(settle(_plan(tmp_path, *rate), RunOptions(rerun=("distill",))))
    with pytest.raises(ArtifactError, match="no longer matches"):
        settle(_plan(tmp_path, OTHER_RATE), RunOptions())


@pytest.mark.parametrize(
    ("accept", "until", "resumes"), [(True, None, True), (False, None, False), (True, "prune", False)]
)
def test_a_submission_accepts_the_work_of_an_unfinished_training(
    accept: bool, until: str | None, resumes: bool, tmp_path: Path
) -> None:
    before, silent = _plan(tmp_path), Progress(silent=True)
    finish(before, leave_out=before.followers({"distill"}))
    store = Store(tmp_path / "toy/width")
    folder, _ = open_work(before.call("distill"), store, silent)
    (folder / "checkpoint").touch()
    plan = settle(_plan(tmp_path, OTHER_RATE), RunOptions(accept_drift=accept, until=until))
    work, accepted = open_work(plan.call("distill"), store, silent)  # what the job of the stage does
    assert (work / "checkpoint").exists() == resumes
    assert [[change.split(":")[0] for change in entry["changed"]] for entry in accepted] == [["lr"]] * resumes
