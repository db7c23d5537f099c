"""A recipe that runs programs, from another user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_minitron.plan.programs import foreign_programs, programs_of
from nemo_minitron.schema.execution import Execution

CLUSTER = {"setup_script": "site.sh", "command": "./minitron"}
RUNS = Execution.model_validate({"notify_command": ["mail"], "cluster": CLUSTER})


def test_the_keys_that_run_programs_are_named() -> None:
    found = ["notify_command", "cluster.setup_script", "cluster.command"]
    assert list(programs_of(RUNS)) == [f"execution.{key}" for key in found]
    assert list(programs_of(Execution())) == []


def test_only_a_recipe_of_another_user_causes_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("{}")
    owner = recipe.stat().st_uid
    assert foreign_programs(recipe, RUNS) == []
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    monkeypatch.setattr("nemo_minitron.plan.programs._ADMINISTRATOR", owner + 2)
    (output,) = foreign_programs(recipe, RUNS)
    assert f"belongs to another user (uid {owner})" in output
    assert "execution.notify_command" in output
    assert foreign_programs(recipe, Execution()) == []
