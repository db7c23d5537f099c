"""The task of a stage that its ranks get: planned once, with every value that they need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_minitron import api
from nemo_minitron.execution import worker
from nemo_minitron.execution.task import StageTask
from nemo_minitron.plan import planner
from nemo_minitron.plan.planner import RunPlan, refreshed
from tests.conftest import TOY


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    return api.plan(api.load_recipe(TOY, [f"execution.run_root={tmp_path}", "execution.parallel.dp=2"]))


def test_a_rank_reads_the_task_that_the_runner_wrote(plan: RunPlan, tmp_path: Path) -> None:
    for call in plan.calls:
        work = tmp_path / "work" / call.name
        work.mkdir(parents=True)
        task = StageTask.of(call, plan.recipe, tmp_path / "out", work)
        task.save()
        assert task.file.stat().st_mode & 0o777 == 0o600
        read = StageTask.load(json.loads(task.file.read_text()))
        assert (read.params, read.parallel, read.execution) == (task.params, task.parallel, task.execution)
        assert json.dumps(read.inputs) == json.dumps(task.inputs)
        assert (read.name, read.run_dir, read.out_dir, read.work_dir) == (
            call.name,
            task.run_dir,
            task.out_dir,
            task.work_dir,
        )


def test_ranks_plan_nothing() -> None:
    assert not {"make_plan", "source_facts", "RunPlan"} & set(vars(worker))


def test_a_second_look_at_a_plan_lists_no_files(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(*_: object) -> None:
        raise AssertionError("the sources are listed again")

    monkeypatch.setattr(planner, "source_facts", listed)
    again = refreshed(plan)
    assert [call.fingerprint for call in again.calls] == [call.fingerprint for call in plan.calls]
