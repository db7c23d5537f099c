"""Every shipped recipe composes, validates and plans; sizes are those computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_minitron.api import load_plan
from nemo_minitron.plan.checks import find_problems
from nemo_minitron.plan.describe import plan_facts
from tests.conftest import REPO

RECIPES = sorted((REPO / "recipes").rglob("*.yaml"))
MISSING = ("not fetched yet", "no such file", "matches no file")
"""Texts of problems that a fresh checkout may have: missing assets, and files that users provide."""

# One SmolLM2 layer: q and o 576x576, k and v 192x576, three MLP matrices, two norms; 49152x576 tied embeddings.
_ATTENTION = 2 * 576 * 576 + 2 * 192 * 576 + 2 * 576
_TEACHER = 49152 * 576 + 576
STUDENTS = {
    "smollm2_135m/width": _TEACHER + 30 * (_ATTENTION + 3 * 752 * 576),
    "smollm2_135m/depth": _TEACHER + 18 * (_ATTENTION + 3 * 1536 * 576),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(REPO / "recipes")))
def test_a_recipe_plans_and_its_only_problems_are_missing_files(recipe: Path, tmp_path: Path) -> None:
    plan = load_plan(recipe, [f"execution.run_root={tmp_path}"], checked=False)
    problems = list(find_problems(plan))
    assert all(any(words in problem for words in MISSING) for problem in problems), problems
    names = [call.name for call in plan.calls]
    # The claims suite has its own page.
    assert names[-1] == "report" or recipe.parent.name == "claims"
    stages = plan.recipe.stages
    evaluations = {name for name, stage in stages.items() if stage.kind == "evaluate"}
    labels = [stages[name].label for name in evaluations]  # type: ignore[attr-defined]
    assert len(set(labels)) == len(labels)
    for stage in stages.values():
        if stage.kind == "export":
            assert set(stage.inputs.evaluations) == evaluations  # type: ignore[attr-defined]
    for call in plan.calls:
        assert all(names.index(other) < names.index(call.name) for other in call.depends)


@pytest.mark.parametrize("name", STUDENTS)
def test_the_planned_student_has_the_size_worked_out_by_hand(name: str, tmp_path: Path) -> None:
    facts = plan_facts(load_plan(REPO / f"recipes/{name}.yaml", [f"execution.run_root={tmp_path}"], checked=False))
    assert facts["teacher"]["num_params"] == 134_515_008
    assert facts["student"]["num_params"] == STUDENTS[name]
    assert 0.5 <= facts["student"]["share"] <= 0.7


def test_execution_never_changes_a_fingerprint(tmp_path: Path) -> None:
    toy = REPO / "recipes/toy/width.yaml"
    plans = [
        load_plan(toy, [f"execution.run_root={tmp_path}", *more], checked=False)
        for more in ([], ["execution.parallel.tp=2", "execution.threads=1", "execution.workers=1"])
    ]
    prints = [[call.fingerprint for call in plan.calls] for plan in plans]
    assert prints[0] == prints[1]
