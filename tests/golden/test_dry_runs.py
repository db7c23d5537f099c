"""Every recipe that ships can be planned and its scripts printed on a machine that has no data, no assets, no Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import REPO, Cli

RECIPES = [
    file
    for file in sorted((REPO / "recipes").glob("*/*.yaml"))
    if file.parent.name != "claims" or file.stem == "smollm2_135m"
]
SITES = {"slurm_pyxis": ("launcher=slurm", "cluster=slurm_pyxis"), "dgx": ("cluster=dgx",)}


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to an empty folder, without programs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: str(file.relative_to(REPO / "recipes")))
def test_a_recipe_is_planned_and_its_scripts_are_printed_without_the_data(recipe: Path, minitron: Cli) -> None:
    code, output = minitron("plan", recipe, "--json", *SITES["slurm_pyxis"])
    assert code == 0, output
    problems = json.loads(output)["problems"]
    assert "sbatch: there is no such program on this machine." in problems
    assert f"container.core_image: there is no file {Path.cwd() / 'nemo-minitron-core.sqsh'}" in problems
    for site, words in SITES.items():
        code, output = minitron("launch", "--dry-run", recipe, *words)
        assert code == 0, output
        assert ("#SBATCH" if site == "slurm_pyxis" else "docker run") in output
        missing = [line for line in output.splitlines() if line.startswith("missing here")]
        assert len(missing) >= (2 if site == "slurm_pyxis" else 1)
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("site", ["slurm", "slurm_pyxis", "slurm_apptainer"])
def test_a_recipe_for_cpus_shares_its_nodes(site: str, minitron: Cli) -> None:
    words = (REPO / "recipes/toy/width.yaml", "launcher=slurm", f"cluster={site}")
    code, output = minitron("launch", "--dry-run", *words)
    assert code == 0, output
    assert not any(word in output for word in ("gpu:", "gpus", "--exclusive"))
    stages = output.count("#SBATCH --nodes=1\n")
    assert stages > 10
    assert output.count("#SBATCH --cpus-per-task=8\n") == output.count("#SBATCH --mem=32G\n") == stages
    two_nodes = ("execution.parallel_by_stage={distill: {dp: 4}}", "cluster.ranks_per_node=2")
    code, output = minitron("launch", "--dry-run", *words, *two_nodes)
    assert code == 0, output
    assert output.count("#SBATCH --exclusive\n") == 1, "several nodes"


WIDTH = REPO / "recipes/llama31_8b/width_4b.yaml"
NO_DATA = "stages.data.sources.0.source = ./data/*.jsonl.gz: matches no file."


def test_what_is_missing_is_listed_by_plan_and_dry_run_and_refused_by_all_that_would_start(minitron: Cli) -> None:
    code, output = minitron("plan", WIDTH)
    assert (code, f"problem {NO_DATA}" in output) == (0, True)
    code, output = minitron("launch", "--dry-run", WIDTH)
    assert (code, f"missing here {NO_DATA}" in output) == (0, True)
    assert f"minitron run {WIDTH}" in output
    for command in ("check", "run", "launch"):
        code, output = minitron(command, WIDTH)
        assert (code, f"- {NO_DATA}" in output) == (2, True), command


def test_a_dry_run_refuses_what_no_machine_could_run(minitron: Cli) -> None:
    code, output = minitron("launch", "--dry-run", WIDTH, "stages.distill.min_lr=1", *SITES["dgx"])
    assert (code, "above lr" in output) == (2, True)
    code, output = minitron("launch", "--dry-run", WIDTH, "stages.distil.lr=1", *SITES["dgx"])
    assert (code, "Did you mean stages.distill?" in output) == (2, True)


def test_check_with_a_cluster_reports_what_recipe_and_cluster_lack(minitron: Cli) -> None:
    code, output = minitron("check", "--cluster", WIDTH, *SITES["slurm_pyxis"])
    assert (code, NO_DATA in output, "no sbatch" in output) == (2, True, True)


def test_a_pattern_with_brackets_is_shown_whole(minitron: Cli) -> None:
    code, output = minitron("plan", WIDTH, "stages.data.sources=[{source: 'x/[ab]*.txt'}]")
    assert (code, "x/[ab]*.txt: matches no file." in output) == (0, True)


@pytest.mark.parametrize("source", ["", " ", "asset:", "hf:"])
def test_an_empty_source_is_refused(source: str, minitron: Cli) -> None:
    code, output = minitron("check", REPO / "recipes/toy/width.yaml", f"stages.teacher.source={source}")
    assert (code, "stages.teacher.source: is empty" in output) == (2, True)


def test_a_tilde_is_the_home_folder_in_every_key(minitron: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_minitron.api import load_recipe

    home = Path.cwd()
    monkeypatch.setenv("HOME", str(home))
    (home / "a [1].jsonl").write_text('{"text": "x"}\n')
    words = ["execution.run_root=~/runs", "stages.data.sources=[{source: '~/a [1].jsonl'}]"]
    assert load_recipe(WIDTH, words).execution.run_root == str(home / "runs")
    code, output = minitron("check", WIDTH, *words)
    assert code == 0, output
    code, output = minitron("check", WIDTH, "stages.data.sources=[{source: ~nobody_of_this_name/x}]")
    assert (code, "home folder" in output) == (2, True)
    code, output = minitron("check", WIDTH, "execution.run_root=~nobody_of_this_name/x")
    assert (code, "home folder" in output) == (2, True)
