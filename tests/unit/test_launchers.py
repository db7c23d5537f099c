"""The registry of launchers: those of this package, and one of another package. Also: the scripts of launchers/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron import api
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import EnvironmentProblem, PlanError
from nemo_minitron.execution.runner import RunOptions
from nemo_minitron.launch import registry
from nemo_minitron.launch.base import JobState
from nemo_minitron.launch.status import cancel_jobs, job_facts
from nemo_minitron.plan.folder import run_dir
from tests.conftest import REPO, TOY, Cli

TINY = """
from nemo_minitron.launch import record
from nemo_minitron.launch.base import JobState, Launcher, Step
from nemo_minitron.plan.folder import run_dir


def render(plan, options, arguments):
    return [Step(("tiny-submit", call.name), f"minitron stage recipe.json {call.name}") for call in plan.calls]


def submit(plan, options, log):
    recipe = plan.recipe
    folder = record.next_folder(run_dir(recipe))
    folder.mkdir(parents=True)
    done = record.Submission(folder, "tiny", 0.0, (record.Submitted("all", tuple(recipe.stages), ("7",), ""),))
    done.write()
    return done


def states(submission):
    return {stage: JobState("7", "RUNNING") for job in submission.jobs for stage in job.stages}


def cancel(submission):
    return submission.job_ids


LAUNCHER = Launcher("tiny", render, submit, states, cancel)
"""


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a package with the launcher `tiny`, and return its module."""
    site = tmp_path / "site"
    facts = site / "tiny_launcher-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-launcher\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[{registry.GROUP}]\ntiny = tiny_launcher_of_a_test:LAUNCHER\n")
    module = site / "tiny_launcher_of_a_test.py"
    module.write_text(TINY)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, module.stem, raising=False)
    return module


def _recipe(tmp_path: Path, launcher: str, *overrides: str) -> Recipe:
    recipe = api.load_recipe(TOY, [f"execution.run_root={tmp_path}/runs", *overrides])
    execution = recipe.execution.model_copy(update={"launcher": launcher})
    return recipe.model_copy(update={"execution": execution})


def test_a_launcher_of_another_package_renders_submits_and_cancels(other_package: Path, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "tiny")
    launcher = registry.of_recipe(recipe)
    steps = launcher.render(api.plan(recipe), RunOptions(), ())
    assert steps[0].command == ("tiny-submit", "teacher")
    done = launcher.submit(api.plan(recipe), RunOptions(), print)
    assert done is not None
    assert launcher.states(done)["distill"] == JobState("7", "RUNNING")
    assert job_facts(run_dir(recipe))["distill"]["state"] == "running"
    assert cancel_jobs(run_dir(recipe)) == ["7"]


def test_the_commands_use_a_launcher_of_another_package(
    other_package: Path, tmp_path: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(tmp_path, "tiny")
    monkeypatch.setattr(api, "load_recipe", lambda *_: recipe)
    code, output = minitron("launch", "--dry-run", TOY)
    assert (code, "# tiny-submit teacher\nminitron stage recipe.json teacher\n" in output) == (0, True), output
    assert not run_dir(recipe).exists(), "a dry run writes nothing"
    code, output = minitron("launch", TOY)
    assert (code, "watch: minitron status RECIPE" in output) == (0, True), output
    code, output = minitron("status", TOY, "--json")
    assert (code, '"state": "running"' in output) == (0, True), output
    assert minitron("cancel", TOY) == (0, "canceled 7\n")


def test_a_launcher_that_is_not_installed_is_refused_and_its_record_is_skipped(
    other_package: Path, tmp_path: Path
) -> None:
    recipe = _recipe(tmp_path, "tiny")
    registry.of_recipe(recipe).submit(api.plan(recipe), RunOptions(), print)
    (other_package.parent / "tiny_launcher-1.0.dist-info/entry_points.txt").unlink()
    assert job_facts(run_dir(recipe)) == {}
    with pytest.raises(PlanError, match=r"There is no launcher tiny(.|\n)*docker, local, slurm"):
        registry.of_recipe(recipe)


@pytest.mark.parametrize(
    ("code", "message"),
    [("import no_such_package", "cannot be imported: ModuleNotFoundError"), ("LAUNCHER = 7", "is a int")],
)
def test_a_broken_launcher_of_another_package_is_an_error_of_the_environment(
    code: str, message: str, other_package: Path
) -> None:
    other_package.write_text(code)
    with pytest.raises(EnvironmentProblem, match=message):
        registry.get("tiny")


def test_every_launcher_of_this_package_has_the_name_under_which_it_is_found() -> None:
    assert {name: registry.get(name).name for name in registry.BUILT_IN} == {name: name for name in registry.BUILT_IN}


def test_containers_on_this_machine_have_their_own_launcher(tmp_path: Path) -> None:
    container = "execution.cluster.container={runtime: apptainer, core_image: 'docker://x/y:z'}"
    assert registry.of_recipe(_recipe(tmp_path, "local", container)).name == "docker"
    assert registry.of_recipe(_recipe(tmp_path, "slurm", container)).name == "slurm"
    assert registry.of_recipe(_recipe(tmp_path, "local")).name == "local"


def _words_of_script(script: str, words: list[str], cwd: Path, tmp_path: Path) -> list[list[str]]:
    """Run a script of launchers/ with a stand-in for `minitron`; return its working folder and words at each call."""
    stand_in = tmp_path / "venv" / "bin" / "minitron"
    stand_in.parent.mkdir(parents=True, exist_ok=True)
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD $*"\n')
    stand_in.chmod(0o755)
    own = {**os.environ, "VENV": str(tmp_path / "venv")}
    command = ["bash", str(REPO / "launchers" / script), *words]
    done = subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("script", "before", "calls"),
    [("local.sh", [], ["check", "run"]), ("dgx.sh", [], ["launch"]), ("slurm.sh", ["mysite"], ["check", "launch"])],
)
def test_a_script_finds_a_recipe_of_the_folder_in_which_it_is_called(
    script: str, before: list[str], calls: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").touch()
    seen = _words_of_script(script, [*before, "mine.yaml", "a=1"], tmp_path, tmp_path)
    assert [words[:2] for words in seen] == [[str(REPO), call] for call in calls]
    assert all({str(tmp_path / "mine.yaml"), "a=1"} <= set(words) for words in seen)
    for recipe, cwd in (("toy/width", tmp_path), ("recipes/toy/width.yaml", REPO)):
        assert all(recipe in words for words in _words_of_script(script, [*before, recipe], cwd, tmp_path))
