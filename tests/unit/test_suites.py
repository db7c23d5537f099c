"""Suites of runs: figures survive kills, finished tasks are skipped, and time limits stop a suite between tasks."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nemo_minitron import api
from nemo_minitron.config.explain import validate
from nemo_minitron.plan.checks import find_problems
from nemo_minitron.plan.planner import make_plan
from nemo_minitron.stages.registry import STAGES as KINDS
from tests.conftest import REPO

STAGES = {"text": {"kind": "tokenize", "inputs": {"tokenizer": "teacher"}, "sources": [{"source": "asset:toy-text"}]}}


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))


@pytest.fixture
def suite() -> ModuleType:
    return importlib.import_module("suite")


@pytest.fixture
def table() -> ModuleType:
    return importlib.import_module("one_shot_table")


class Clock:
    """A clock that advances only when a task runs."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def _tasks(suite: ModuleType, count: int, work: float = 100.0) -> list[Any]:
    return [suite.Task(f"run {number}", "arm", work, STAGES, {}) for number in range(count)]


def _run(suite: ModuleType, tasks: list[Any], file: Path, **more: Any) -> list[str]:
    """Run tasks of ten seconds each, and return the ids of those that ran."""
    ran, clock = [], Clock()

    def measure(task: Any) -> dict[str, Any]:
        ran.append(task.id)
        clock.now += 10.0
        return {"figures": {"own": {"loss_nats_per_token": 3.0}}}

    def waiting(found: dict[str, Any]) -> list[Any]:
        return [task for task in tasks if task.id not in found]

    suite.run_tasks(waiting, measure, file, file.parent, clock=clock, **more)
    return ran


def test_a_stopped_suite_continues_with_the_runs_that_are_missing(suite: ModuleType, tmp_path: Path) -> None:
    tasks, file = _tasks(suite, 4), tmp_path / "suite/figures.jsonl"
    # The first run has no estimate; a third one would end after 30 seconds.
    assert _run(suite, tasks, file, limit_s=25.0) == ["run 0", "run 1"]
    assert _run(suite, tasks, file) == ["run 2", "run 3"]
    assert _run(suite, tasks, file) == []
    assert list(suite.read_figures(file)) == [task.id for task in tasks]


def test_a_line_that_a_kill_cut_off_is_removed(suite: ModuleType, tmp_path: Path) -> None:
    tasks, file = _tasks(suite, 2), tmp_path / "figures.jsonl"
    _run(suite, tasks[:1], file)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:20])
    assert list(suite.read_figures(file)) == ["run 0"]
    assert file.read_bytes() == whole + whole[:20], "reading changes nothing"
    assert _run(suite, tasks, file) == ["run 1"]
    assert len(file.read_text().splitlines()) == len(suite.read_figures(file)) == 2


def test_a_suite_continues_on_another_machine_with_the_published_figures(suite: ModuleType, tmp_path: Path) -> None:
    tasks, here, there = _tasks(suite, 3), tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    _run(suite, tasks[:2], here)
    suite.publish_figures(suite.read_figures(here), "some", tmp_path / "docs")
    _run(suite, tasks[1:2], there)
    suite.add_published(there, "some", lambda _: tasks, tmp_path / "docs")
    assert _run(suite, tasks, there) == ["run 2"]
    found = suite.read_figures(there)
    assert {name for name, row in found.items() if "shared_machine" in row} == {"run 0"}, "times are of two machines"
    assert found["run 0"] == {**suite.read_figures(here)["run 0"], "shared_machine": True}
    with pytest.raises(SystemExit, match="Published figures: some"):
        suite.add_published(there, "other", lambda _: tasks, tmp_path / "docs")


@pytest.mark.parametrize("wrong", ["published", "own"])
def test_figures_that_do_not_fit_are_not_mixed_with_published_ones(
    wrong: str, suite: ModuleType, tmp_path: Path
) -> None:
    tasks, own, docs = _tasks(suite, 3), tmp_path / "own.jsonl", tmp_path / "docs"
    other = {"text": {**STAGES["text"], "valid_fraction": 0.5}}
    changed = [suite.Task(task.id, "arm", 100.0, other, {}) for task in tasks]
    _run(suite, (changed if wrong == "own" else tasks)[:1], own)
    _run(suite, (changed if wrong == "published" else tasks)[1:], tmp_path / "there.jsonl")
    suite.publish_figures(suite.read_figures(tmp_path / "there.jsonl"), "some", docs)
    own.write_bytes(own.read_bytes() + b'{"id": "cut off')
    before = own.read_bytes()
    advice = "leave out --with-published" if wrong == "published" else "move the file away"
    with pytest.raises(SystemExit, match=advice):
        suite.add_published(own, "some", lambda _: tasks, docs)
    assert own.read_bytes() == before


def test_trained_models_stay_until_their_figures_are_on_disk(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = suite.Task("run 0", "arm", 1.0, STAGES, {}, temporary=("distill",))
    folders = [tmp_path / "distill", tmp_path / ".work/distill"]
    for folder in folders:
        folder.mkdir(parents=True)

    def full_disk(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(suite, "append_figures", full_disk)
        with pytest.raises(OSError, match="no space"):
            _run(suite, [task], tmp_path / "figures.jsonl")
    assert all(folder.exists() for folder in folders)
    assert _run(suite, [task], tmp_path / "figures.jsonl") == ["run 0"]
    assert not any(folder.exists() for folder in folders)


def test_a_run_that_fails_leaves_no_figures(suite: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "figures.jsonl"

    def fail(_: Any) -> dict[str, Any]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        suite.run_tasks(lambda _: _tasks(suite, 1), fail, file, tmp_path)
    assert suite.read_figures(file) == {}


def test_a_stopped_suite_prints_how_to_continue(suite: ModuleType, tmp_path: Path) -> None:
    def stop(_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt("SIGTERM")

    with pytest.raises(SystemExit, match="stopped in run 0; the same command continues"):
        suite.run_tasks(lambda _: _tasks(suite, 1), stop, tmp_path / "figures.jsonl", tmp_path)


def test_the_closest_runs_give_the_estimate(suite: ModuleType) -> None:
    rows = [("a", 100.0, 10.0), ("a", 400.0, 80.0), ("b", 100.0, 50.0)]
    found = {str(n): {"group": g, "work": w, "elapsed_s": s} for n, (g, w, s) in enumerate(rows)}

    def estimate(group: str, work: float) -> float | None:
        return suite.estimated_s(suite.Task("", group, work, {}, {}), found)  # type: ignore[no-any-return]

    assert estimate("a", 400.0) == pytest.approx(80.0)
    assert estimate("a", 200.0) == pytest.approx(30.0)  # 0.1 and 0.2 seconds per unit
    assert estimate("b", 200.0) == pytest.approx(100.0)
    assert estimate("c", 100.0) == pytest.approx(20.0)
    assert suite.estimated_s(suite.Task("", "a", 1.0, {}, {}), {}) is None


def test_figures_of_other_keys_are_refused(suite: ModuleType, tmp_path: Path) -> None:
    tasks, file = _tasks(suite, 1), tmp_path / "figures.jsonl"
    _run(suite, tasks, file)
    found = suite.read_figures(file)
    suite.require_same_origin(found, tasks, file)
    same = {"text": {**STAGES["text"], "seed": 1234}}  # the default
    suite.require_same_origin(found, [suite.Task("run 0", "arm", 1.0, same, {})], file)
    other = {"text": {**STAGES["text"], "valid_fraction": 0.5}}
    with pytest.raises(SystemExit, match=r"other models, texts, keys or versions of a stage \(1 runs: run 0\)"):
        suite.require_same_origin(found, [suite.Task("run 0", "arm", 1.0, other, {})], file)


def test_figures_of_another_version_of_a_stage_are_refused(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tasks, file = _tasks(suite, 1), tmp_path / "figures.jsonl"
    _run(suite, tasks, file)
    kind = KINDS["tokenize"]
    monkeypatch.setitem(KINDS, "tokenize", replace(kind, version=kind.version + 1))
    with pytest.raises(SystemExit, match="versions of a stage"):
        suite.matching_figures(file, lambda _: tasks)


def test_figures_of_changed_text_are_refused_and_those_of_deleted_text_are_kept(
    suite: ModuleType, tmp_path: Path
) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "figures.jsonl"
    stages = {"text": {**STAGES["text"], "sources": [{"source": str(text)}]}}
    tasks = [suite.Task("run 0", "arm", 100.0, stages, {})]
    text.write_text("some text")
    _run(suite, tasks, file)
    suite.matching_figures(file, lambda _: tasks)
    text.write_text("some other text")
    with pytest.raises(SystemExit, match="other models, texts"):
        suite.matching_figures(file, lambda _: tasks)
    text.unlink()
    suite.matching_figures(file, lambda _: tasks)


def test_only_the_stages_that_are_read_are_kept(suite: ModuleType) -> None:
    stages = {
        "teacher": {"inputs": {}},
        "unused": {"inputs": {"model": "teacher"}},
        "score": {"inputs": {"model": "teacher", "search": None}},
        "export": {"inputs": {"models": {"a": "score"}, "list": ["teacher"]}},
    }
    assert list(suite.needed_stages(stages, ["export"])) == ["teacher", "score", "export"]


@pytest.mark.parametrize("size", ["smollm2", "toy"])
def test_every_setting_of_the_one_shot_table_composes_and_passes_the_checks(
    size: str, table: ModuleType, tmp_path: Path
) -> None:
    chosen = table.SIZES[size]
    overrides = [f"execution.run_root={tmp_path}", f"execution.assets_dir={tmp_path}", *chosen.overrides]
    recipe = api.load_recipe(table.token_ratio.RECIPES / f"{chosen.recipe}.yaml", overrides)
    stages = table.explicit_stages(recipe)
    first = [case for case in table.cases(chosen) if (case.tokens, case.draw, case.text) == (32_768, 1, "mixture")]
    assert len(first) == 4 * 7 + 3
    for case in first:
        task = table.task_of(case, stages, chosen.parts[case.part])
        plan = make_plan(validate({**recipe.model_dump(mode="json"), "stages": task.stages}, where=case.id))
        problems = list(find_problems(plan))
        assert all("not fetched yet" in problem for problem in problems), problems
        read = {stage["inputs"]["data"] for stage in task.stages.values() if "num_samples" in stage}
        assert read == {"mixture"}
        assert {task.stages[stage]["inputs"]["data"] for stage in task.measures.values()} == {"mixture", "other"}


def test_the_one_shot_table_has_every_setting_once_and_little_text_first(table: ModuleType) -> None:
    found = list(table.cases(table.SIZES["smollm2"]))
    assert len({case.id for case in found}) == len(found) == 31 * 3 * 2 * 3
    assert [case.tokens for case in found] == sorted(case.tokens for case in found)


def test_the_share_won_back_is_that_of_the_gap_to_the_teacher(table: ModuleType) -> None:
    size = table.Size("", {"mlp": {"ffn_hidden_size": 8}}, (100,), (1, 2))

    def row(name: str, **losses: float) -> dict[str, Any]:
        return {"id": name, "figures": {text: {"loss_nats_per_token": loss} for text, loss in losses.items()}}

    rows = [row("teacher", data=2.0, mixture=2.5, other=3.0)]
    for draw in (1, 2):
        rows.append(row(table.Case("mlp", "slice", None, 100, "data", draw).id, own=4.0, other=5.0))
        rows.append(row(table.Case("mlp", "greedy", "sequential", 100, "data", draw).id, own=3.5 - draw, other=4.5))
    text = table.page(rows, size, "toy")
    assert "| 100 | training text | slice | - | 4.000 (4.000 to 4.000) | - | 5.000 (5.000 to 5.000) | - | 2 |" in text
    assert "| greedy | sequential | 2.000 (1.500 to 2.500) | 100% | 4.500 (4.500 to 4.500) | 25% | 2 |" in text


@pytest.mark.parametrize(
    ("arguments", "modes"),
    [
        ([], {None, "one_shot", "sequential"}),
        (["--mode", "one_shot"], {None, "one_shot"}),
        (["--mode", "sequential", "--method", "greedy"], {"sequential"}),
    ],
)
def test_the_one_shot_table_runs_the_settings_that_are_asked_for(
    arguments: list[str], modes: set[str | None], table: ModuleType
) -> None:
    parsed = table.arguments_of(["--tokens", "32768", *arguments])
    found = [case for case in table.cases(table.SIZES["smollm2"]) if table.wanted(case, parsed)]
    assert {case.tokens for case in found} == {32768}
    assert {case.mode for case in found} == modes
