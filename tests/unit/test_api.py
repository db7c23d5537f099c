"""The functions for notebooks: the documented example, and the errors of recipes that break a rule."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from nemo_minitron import api
from nemo_minitron.errors import PlanError
from tests.conftest import TOY


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(api)
    # Python 3.13 counts skipped examples too.
    assert found.failed == 0
    assert found.attempted >= 3


def test_a_recipe_that_breaks_a_rule_is_planned_only_unchecked(tmp_path: Path) -> None:
    recipe = api.load_recipe(TOY, [f"execution.run_root={tmp_path}", "stages.distill.min_lr=1"])
    assert api.plan(recipe, checked=False).calls
    for refused in (api.plan, api.run):
        with pytest.raises(PlanError, match="above lr"):
            refused(recipe)
    assert not list(tmp_path.iterdir())


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No stage of this run has finished yet"):
        api.report(api.load_recipe(TOY, [f"execution.run_root={tmp_path}"]))


def test_a_run_and_its_report(tmp_path: Path) -> None:
    recipe = api.load_recipe(TOY, [f"execution.run_root={tmp_path}"])
    folder = api.run(recipe, until="teacher", quiet=True)
    assert (folder / "teacher/manifest.json").is_file()
    assert api.report(recipe) == folder / "report.html"
    assert (folder / "report.html").is_file()
