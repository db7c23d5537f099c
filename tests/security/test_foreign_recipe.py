"""A recipe that runs programs, from another user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_minitron.api import load_recipe
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.plan.programs import foreign_programs, programs_of
from tests.conftest import REPO

REINFORCE = REPO / "recipes" / "toy" / "reinforce.yaml"
SITE = ("execution.notify_command=[mail]", "execution.cluster={setup_script: site.sh, command: ./minitron}")
FUNCTION = "stages.reinforce.rewards=[{rule: random}, {rule: function, function: 'os:system'}]"


def _runs(*overrides: str) -> Recipe:
    return load_recipe(REINFORCE, overrides)


def test_the_keys_and_functions_that_run_are_named() -> None:
    found = ["notify_command", "cluster.setup_script", "cluster.command"]
    assert list(programs_of(_runs(*SITE))) == [f"execution.{key}" for key in found]
    assert list(programs_of(_runs(FUNCTION))) == ["os:system (stages.reinforce)"]
    assert list(programs_of(_runs())) == []


@pytest.mark.parametrize(("overrides", "named"), [(SITE, "execution.notify_command"), ((FUNCTION,), "os:system")])
def test_only_a_recipe_of_another_user_causes_a_warning(
    overrides: tuple[str, ...], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, recipe = tmp_path / "mine.yaml", _runs(*overrides)
    file.write_text("{}")
    owner = file.stat().st_uid
    assert foreign_programs(file, recipe) == []
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    monkeypatch.setattr("nemo_minitron.plan.programs._ADMINISTRATOR", owner + 2)
    (output,) = foreign_programs(file, recipe)
    assert f"belongs to another user (uid {owner})" in output
    assert named in output
    assert foreign_programs(file, _runs()) == []
