"""Recipes that extend other recipes, and the search path of recipes and configs."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.config.compose import compose, write_out
from nemo_minitron.system.places import configs_dirs, recipe_name, require_recipe, shipped_recipes
from tests.conftest import REPO, Cli

MINE = "stages: {distill: {num_steps: 7}}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a user's working directory outside of the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> Path:
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


@cache
def shipped(name: str) -> dict[str, Any]:
    return compose(REPO / "recipes" / f"{name}.yaml")


def expected(base: str, name: str, **distill: Any) -> dict[str, Any]:
    """Return a shipped recipe with another name and with changes to its distill stage."""
    found = copy.deepcopy(shipped(base))
    found["stages"]["distill"] |= distill
    return {**found, "name": name}


@pytest.mark.parametrize(
    "defaults",
    [
        "[toy/width, _self_]",
        "[/toy/width, _self_]",
        "[toy/width.yaml, _self_]",
        "[toy/width]",
        "[toy/width@_global_, _self_]",
        "[{toy@_global_: width}, _self_]",
        "[optional toy/width, optional nothing/there, _self_]",
        f"[{REPO}/recipes/toy/width, _self_]",
        f"[{REPO}/recipes/toy/width.yaml, _self_]",
    ],
)
def test_a_shipped_recipe_is_extended_by_its_name_or_its_path(defaults: str, folder: Path) -> None:
    write("recipes/mine.yaml", f"defaults: {defaults}\n{MINE}")
    assert compose(Path("recipes/mine.yaml")) == expected("toy/width", "mine", num_steps=7)


def test_a_shipped_recipe_can_be_copied_to_any_folder(folder: Path) -> None:
    for name in shipped_recipes():
        copied = write("elsewhere/mine.yaml", (REPO / f"recipes/{name}.yaml").read_text())
        assert compose(copied) == {**compose(REPO / f"recipes/{name}.yaml"), "name": "mine"}, name


@pytest.mark.parametrize(("file", "name"), [("mine.yml", "mine"), ("recipes/a/b.yaml", "a/b"), ("x y/z.yaml", "z")])
def test_a_shipped_recipe_is_extended_from_any_folder(file: str, name: str, folder: Path) -> None:
    write(file, f"defaults: [toy/width, _self_]\n{MINE}")
    assert compose(Path(file)) == expected("toy/width", name, num_steps=7)
    assert compose(Path(file).with_suffix("")) == compose(folder / file)


def test_recipes_extend_over_several_folders_and_the_outermost_takes_precedence(folder: Path) -> None:
    write("recipes/first.yml", f"defaults: [toy/width, _self_]\n{MINE}")
    write("recipes/deeper/second.yaml", "defaults: [../first, _self_]\nstages: {distill: {lr: 1.0e-5}}\n")
    write("third recipe.yaml", "defaults: [recipes/deeper/second, _self_]\nstages: {distill: {num_steps: 9}}\n")
    assert compose(Path("third recipe.yaml")) == expected("toy/width", "third-recipe", num_steps=9, lr=1.0e-5)
    write("before.yaml", "defaults: [_self_, recipes/first]\nstages: {distill: {num_steps: 9}}\n")
    assert compose(Path("before.yaml"))["stages"]["distill"]["num_steps"] == 7


def test_groups_of_a_base_can_be_overridden_and_a_base_is_merged_only_once(folder: Path) -> None:
    write("chain.yaml", "defaults: [smollm2_135m/iterative, _self_]\n")
    assert compose(Path("chain.yaml")) == {**compose(REPO / "recipes/smollm2_135m/iterative.yaml"), "name": "chain"}
    text = "defaults: [toy/depth, override /data@stages.data: your_text, _self_]\n"
    write("data.yaml", text.replace("override /data@stages.data: your_text", "{override /data@stages.data: your_text}"))
    assert compose(Path("data.yaml"))["stages"]["data"]["sources"] != [{"source": "asset:toy-text"}]
    write("one.yaml", f"defaults: [toy/width, _self_]\n{MINE}")
    write("other.yaml", "defaults: [toy/width, _self_]\nstages: {distill: {lr: 1.0e-5}}\n")
    write("both.yaml", "defaults: [one, other]\n")
    assert compose(Path("both.yaml")) == expected("toy/width", "both", num_steps=7, lr=1.0e-5)
    assert compose(Path("both.yaml"), ["data@stages.data=your_text"])["stages"]["data"] != {}


def test_the_name_of_a_base_is_not_inherited_and_a_composed_recipe_needs_no_base(folder: Path) -> None:
    """With the name of the base, the run would be reported as one whose recipe has changed."""
    base = write("base.yaml", "name: of/the/base\ndefaults: [toy/width, _self_]\n")
    mine = write("mine.yaml", f"defaults: [base, _self_]\n{MINE}")
    assert (compose(base)["name"], compose(mine)["name"]) == ("of/the/base", "mine")
    alone = write("elsewhere/alone.yaml", write_out(mine, [], {}))
    base.unlink()
    assert compose(alone) == expected("toy/width", "mine", num_steps=7)


def test_the_package_header_places_the_configs_beside_a_recipe(folder: Path) -> None:
    write("more/steps.yaml", "num_steps: 7\n")
    write("more/header.yaml", "# @package stages.distill\n# My own.\nlr: 1.0e-5\n")
    write("more/mine.yaml", "defaults: [toy/width, steps@stages.distill, header, _self_]\n")
    assert compose(Path("more/mine.yaml")) == expected("toy/width", "mine", num_steps=7, lr=1.0e-5)


def test_folders_of_the_user_take_precedence_over_those_of_the_package(folder: Path) -> None:
    assert require_recipe(Path("toy/width")) == REPO / "recipes/toy/width.yaml"
    own = write("recipes/toy/width.yaml", f"defaults: [toy/width, _self_]\n{MINE}")
    assert require_recipe(Path("toy/width")) == own.resolve()
    assert compose(Path("toy/width")) == expected("toy/width", "toy/width", num_steps=7)
    write("configs/cluster/ours.yml", "account: me\n")
    write("configs/data/toy_text.yaml", "kind: tokenize\nsources: [{source: own.txt}]\n")
    assert configs_dirs(own.resolve()) == [folder / "configs", REPO / "configs"]
    found = compose(Path("toy/depth"), ["cluster=ours"])
    assert found["execution"]["cluster"] == {"account": "me"}
    assert found["stages"]["data"] == {"kind": "tokenize", "sources": [{"source": "own.txt"}]}
    assert compose(Path("toy/depth"), ["cluster=dgx"])["execution"]["cluster"]["container"]["runtime"] == "docker"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("/x/recipes/a/b.yml", "a/b"),
        ("/x/mine.v2.1.yaml", "mine.v2.1"),
        ("/x/my recipe (2).yaml", "my-recipe-2"),
        ("/x/recipes/модель 3.yaml", "модель-3"),
        ("/x/模型.yaml", "模型"),
        ("/x/_.yaml", "recipe"),
        ("/x/recipe.json", "recipe.json"),
    ],
)
def test_every_file_name_gives_a_valid_run_name(file: str, name: str, folder: Path) -> None:
    from nemo_minitron.config.explain import validate

    assert recipe_name(Path(file)) == name
    written = write(file.removeprefix("/"), "defaults: [toy/width]\n")
    assert validate(compose(written), where=file).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [toy/widht]", "extends toy/widht, which does not exist"),
        ("defaults: [nothing, _self_]", "allowed: claims/smollm2_135m, "),
        ("defaults: [mine]", "extends itself: mine"),
        ("defaults: [other]", "mine.yaml -> "),
        ("defaults: [toy/width, {/pipeline: chain}]", "Multiple values for pipeline"),
        ("defaults: [{/data@stages.data: nothing}]", "allowed: benchmark_train_passages, toy_text, your_text"),
        ("defaults: toy/width", "not a list"),
        ("defaults: [3]", "defaults.0 = 3: neither a name"),
        ("defaults: [{a: b, c: d}]", "neither a name"),
        ("defaults: [_self_, _self_]", "contains _self_ more than once"),
        ("hydra: {searchpath: []}", "hydra: unknown key of a recipe"),
        ("- a\n- b", "must be a mapping"),
        ("a: &x [*x]", "a value contains itself"),
        ("a: 1\na: 2", "duplicate key a"),
        ("1: 2", "a key of a recipe must be a text"),
        ("a:\n\tb: 1", "line 2"),
        ("a: ${b}\nb: ${a}", "Recursive interpolation"),
    ],
)
def test_errors_name_the_file_of_the_user(text: str, message: str, folder: Path, minitron: Cli) -> None:
    write("other.yaml", "defaults: [mine]\n")
    code, out = minitron("check", write("mine.yaml", text + "\n"))
    assert code == 2
    assert message in out
    assert "mine.yaml" in out
    assert "minitron_recipe" not in out


def test_the_error_about_a_missing_recipe_names_others(folder: Path, minitron: Cli) -> None:
    write("neighbor.yaml", "{}\n")
    code, out = minitron("check", "toy/depht")
    assert (code, "allowed: toy/depth" in out) == (2, True)
    for wrong in ("nothing", "x" * 300, "recipes/nothing.yaml"):
        code, out = minitron("check", wrong)
        assert code == 2
        assert "smollm2_135m/width, template, toy/aligned" in out
    assert "neighbor.yaml" in minitron("check", "nothing")[1]
    assert "is a folder" in minitron("check", folder)[1]


def test_the_shipped_recipes_are_listed_and_printed(folder: Path, minitron: Cli) -> None:
    code, out = minitron("recipes")
    assert code == 0
    assert all(name in out for name in shipped_recipes())
    assert minitron("recipes", "template") == (0, (REPO / "recipes/template.yaml").read_text())
    code, out = minitron("recipes", "toy/nothing")
    assert code == 2
    assert "allowed: " in out


def test_hydra_does_not_inspect_the_call_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read the sources of all callers to find a folder of configs that no recipe has."""
    monkeypatch.delattr(inspect, "stack")
    assert compose(REPO / "recipes/toy/width.yaml")["name"] == "toy/width"
