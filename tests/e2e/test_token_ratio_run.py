"""Two arms of the token-ratio suite with the toy model: run, stored, resumed and reported."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron import api
from tests.conftest import REPO

BUDGET = 5120
EVALUATE = {"kind": "evaluate", "num_tokens": 1024, "seq_len_tokens": 128, "precision": "fp32"}
COMPENSATE = {
    "kind": "compensate",
    "num_samples": 24,
    "seq_len_tokens": 128,
    "heldout_tokens": 1024,
    "inputs": {"teacher": "teacher", "data": "data", "heldout": None},
}


@pytest.mark.slow
def test_two_arms_are_trained_once_and_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    names = ("suite", "token_ratio_arms", "token_ratio_claims")
    suite, arms, claims = (importlib.import_module(name) for name in names)
    recipe = api.load_recipe(
        "toy/width", [f"execution.run_root={tmp_path}", "execution.threads=1", "stages.distill.inputs.check=null"]
    )
    measured = {
        name: {**EVALUATE, "label": name, "inputs": {"data": "data"}} for name in ("evaluate", "evaluate_other")
    }
    stages = {**suite.explicit_stages(recipe), **measured, "compensate": COMPENSATE}
    tasks = [
        arms.task_of(arms.Run(arm, BUDGET, 1, batch=batch), stages, 4)
        for arm, batch in (("sliced", 1.0), ("compensated", 0.5))
    ]
    file, ran = tmp_path / "figures.jsonl", []

    def measure(task: Any) -> dict[str, Any]:
        ran.append(task.id)
        return dict(suite.run_task(task, recipe))

    folder = suite.run_folder(recipe)
    for _ in range(2):
        found = suite.run_tasks(lambda found: [task for task in tasks if task.id not in found], measure, file, folder)
    assert ran == [task.id for task in tasks]

    for task in tasks:
        row = found[task.id]
        assert row["training_tokens"] == BUDGET
        # Training helps even this little.
        assert claims.loss_of(row, "own") < claims.loss_of(row, "start own")
        assert claims.wall_of(row, claims.interrupted_stages(list(found.values()))) > 0
        assert not any((folder / name).exists() for name in task.temporary)
    # The repaired student starts better; both share the cut.
    sliced, repaired = (found[task.id] for task in tasks)
    assert claims.loss_of(repaired, "start own") < claims.loss_of(sliced, "start own")
    assert repaired["wall_s"]["prune_activation_s1"] == sliced["wall_s"]["prune_activation_s1"]
    text = claims.page(list(found.values()), claims.Design("sliced", (BUDGET,), (1,)), "toy", "toy.png")
    assert f"| compensated | {BUDGET:,} |" in text
