"""The task of a stage that its ranks get: planned once, with every value that they need."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_minitron import api
from nemo_minitron.backends.megatron.runtime import session
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.execution import task as tasks
from nemo_minitron.execution import worker
from nemo_minitron.execution.task import StageTask
from nemo_minitron.plan import planner
from nemo_minitron.plan.planner import RunPlan, refreshed
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages import kind
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.out_of_memory import memory_errors
from nemo_minitron.system.progress import Progress
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


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_stage_has_the_session_that_the_recipe_requests(
    deterministic: bool, plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []

    @contextmanager
    def open_session(parallel: Parallel, **options: Any) -> Iterator[Any]:
        opened.append({"parallel": parallel, **options})
        yield SimpleNamespace(is_main=True, device=torch.device("cpu"))

    monkeypatch.setattr(session, "open_session", open_session)
    call = next(call for call in plan.calls if call.name == "evaluate_teacher")
    task = StageTask.of(call, plan.recipe, tmp_path, tmp_path)
    execution = task.execution.model_copy(update={"deterministic": deterministic, "threads": 3, "device": "cpu"})
    monkeypatch.setattr(kind, "load_function", lambda _: lambda params, inputs, context: {"done": True})
    monkeypatch.setattr(tasks, "typed_inputs", lambda *_: None)
    result = tasks.run_task(replace(task, execution=execution), {}, Progress(silent=True), StopRequest())
    assert result == {"done": True, tasks.SESSION_FACTS: {"device": "cpu", "megatron_layers": "torch"}}
    (options,) = opened
    assert options["deterministic"] == deterministic
    assert (options["parallel"], options["threads"], options["device"]) == (call.parallel, 3, "cpu")


@pytest.mark.parametrize(
    ("stage", "error", "advice"),
    [
        ("distill", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "recompute: full"),
        ("score", RuntimeError("CUDA error: out of memory"), "more tp or pp"),
        ("evaluate_teacher", RuntimeError("CUDA error: out of memory"), "use a machine or GPU that has more"),
        ("data", MemoryError(), "use a machine or GPU that has more"),
    ],
)
def test_a_failed_allocation_is_a_message_that_names_the_stage(
    stage: str, error: Exception, advice: str, plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(kind, "load_function", lambda _: fail)
    monkeypatch.setattr(tasks, "typed_inputs", lambda *_: None)
    task = StageTask.of(replace(plan.call(stage), parallel=Parallel()), plan.recipe, tmp_path, tmp_path)
    with pytest.raises(EnvironmentProblem, match=f"Stage {stage} ran out of memory") as caught:
        tasks.run_task(task, {}, Progress(silent=True), StopRequest())
    assert str(error) in caught.value.what
    assert advice in str(caught.value)


def test_other_errors_of_torch_are_not_taken_for_missing_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("It", "here", "none"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
