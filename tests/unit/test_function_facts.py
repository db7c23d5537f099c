"""Functions of a user that a stage calls: their code is part of the stage's fingerprint."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_minitron.api import load_plan
from nemo_minitron.artifacts.manifest import Manifest
from nemo_minitron.plan.functions import function_facts, functions_elsewhere
from nemo_minitron.plan.planner import RunPlan
from tests.conftest import REPO, Cli
from tests.support.finished import finish

FUNCTION = "judges_of_a_test.inner.lengths:short"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of an importable module; importing it or one of its parents is an error."""
    package = tmp_path / "site/judges_of_a_test"
    (package / "inner").mkdir(parents=True)
    for folder in (package, package / "inner"):
        (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    file = package / "inner/lengths.py"
    file.write_text("raise RuntimeError('imported')\ndef short(prompt, answer, row): return -len(answer)\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return file


def _plan(root: Path) -> RunPlan:
    rewards = f"stages.reinforce.rewards=[{{rule: function, function: '{FUNCTION}'}}, {{rule: random}}]"
    return load_plan(REPO / "recipes/toy/reinforce.yaml", [f"execution.run_root={root}", rewards], checked=False)


def test_an_edited_reward_function_changes_its_stage(module: Path, tmp_path: Path) -> None:
    finish(_plan(tmp_path))
    assert {state.status for state in _plan(tmp_path).states.values()} == {"finished"}
    module.write_text("def short(prompt, answer, row): return 1 / len(answer)\n")
    state = _plan(tmp_path).states["reinforce"]
    assert state.status == "changed"
    assert f"functions.{FUNCTION}: " in state.reason
    module.unlink()
    assert _plan(tmp_path).states["reinforce"].status == "finished", "a login node may not have the package"


def test_a_run_of_an_older_version_does_not_change(module: Path, tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    call = plan.call("reinforce")
    assert list(call.payload["functions"]) == [FUNCTION]
    older = {key: value for key, value in call.payload.items() if key != "functions"}
    manifest = Manifest("r", "reinforce", "reinforce", "f", older, {}, {})
    assert function_facts(plan.recipe.stages["reinforce"], manifest) == {}


def test_a_module_that_is_not_installed_is_named(module: Path, tmp_path: Path, minitron: Cli) -> None:
    stages = _plan(tmp_path).recipe.stages
    assert list(functions_elsewhere(stages)) == []
    module.unlink()
    (text,) = functions_elsewhere(stages)
    assert f"stages.reinforce calls {FUNCTION}: there is no module" in text
    rewards = f"stages.reinforce.rewards=[{{rule: function, function: '{FUNCTION}'}}]"
    code, output = minitron("check", REPO / "recipes/toy/reinforce.yaml", rewards)
    assert (code, text in " ".join(output.split())) == (0, True), output


def test_stages_without_functions_have_no_such_facts(tmp_path: Path) -> None:
    assert all("functions" not in call.payload for call in load_plan(REPO / "recipes/toy/width.yaml").calls)
