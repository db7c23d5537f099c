"""What recipes need beside the package: their own text, configs, models and data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron import assets
from nemo_minitron.bundle.items import Item
from nemo_minitron.bundle.places import ASSETS_DIR, items_of, links_out, place_of
from nemo_minitron.config.compose import compose, write_out
from nemo_minitron.config.explain import validate
from nemo_minitron.config.places import CONFIGS, RECIPES, configs_dirs, recipe_name, require_recipe
from nemo_minitron.config.schema import EvaluateStage, Recipe, Schema, ScoreStage
from nemo_minitron.errors import ConfigError, PlanError
from nemo_minitron.files import user_path
from nemo_minitron.hf.source import ASSET, BUILT_IN, HUB
from nemo_minitron.plan.checks import require_valid
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import make_plan
from nemo_minitron.plan.sources import read_by
from nemo_minitron.progress import Progress
from nemo_minitron.stages.spec import STAGES

MOST_LINKS_NAMED = 20
_EXECUTION_ASSETS = "execution.assets_dir"


@dataclass
class Collection:
    """What goes into a bundle, beside wheels."""

    items: list[Item] = field(default_factory=list)
    recipes: list[dict[str, Any]] = field(default_factory=list)
    """For the manifest: file, name, what it was made from."""
    warnings: list[str] = field(default_factory=list)
    needs_aligner: bool = False


def collect(files: Sequence[Path], overrides: Sequence[str], progress: Progress) -> Collection:
    """Everything that stages of these recipes read from outside; assets are fetched and models of the hub downloaded.

    Raises:
        MinitronError: a recipe that cannot be carried out or needs the hub while it runs, or something is missing.
    """
    recipes = {file: validate(compose(file, overrides), where=str(file)) for file in files}
    made_here = [run_dir(recipe).absolute() for recipe in recipes.values()]
    out, outside = Collection(), dict[str, int]()
    for file, recipe in recipes.items():
        _require_no_hub(recipe)
        _fetch_assets(recipe, progress)
        _require_valid(recipe, made_here)
        moved = {_EXECUTION_ASSETS: ASSETS_DIR}
        for key, stage, source in _sources(recipe):
            if _is_made(source, made_here):
                continue
            place = place_of(source, getattr(stage, "revision", None), Path(recipe.execution.assets_dir), outside)
            out.items += items_of(stage, source, place, recipe)
            out.warnings += [
                f"{key}: {file} is packed as the file that a link leads to: {file.resolve()}"
                for file in links_out(stage, source, Path(recipe.execution.assets_dir))[:MOST_LINKS_NAMED]
            ]
            moved[key] = place.source
        out.items += _texts(file, overrides, moved)
        out.recipes.append(
            {"file": _member(file), "name": recipe.name, "made_from": str(file), "overrides": list(overrides)}
        )
        out.needs_aligner |= any(STAGES[stage.kind].needs_aligner for stage in recipe.stages.values())
        if recipe.execution.wandb_project is not None:
            out.warnings.append(
                f"{file}: execution.wandb_project needs a network; set it to null, or WANDB_MODE=offline."
            )
    return out


def _sources(recipe: Recipe) -> Iterator[tuple[str, Schema, str]]:
    """(key, stage, source) of all that is read from outside."""
    for name, stage in recipe.stages.items():
        for key, source in read_by(stage):
            yield f"stages.{name}.{key}", stage, source


def _is_made(source: str, made_here: Sequence[Path]) -> bool:
    """Whether a run of one of the recipes makes it."""
    if source.startswith((ASSET, HUB)):
        return False
    path = user_path(source).absolute()
    return any(path.is_relative_to(run) for run in made_here)


def _require_valid(recipe: Recipe, made_here: Sequence[Path]) -> None:
    made = [f"{key} = {source}:" for key, _, source in _sources(recipe) if _is_made(source, made_here)]
    require_valid(make_plan(recipe), besides=tuple(made))


def _require_no_hub(recipe: Recipe) -> None:
    """lm-eval's own tasks fetch their data while they run."""
    wrong = []
    for name, stage in recipe.stages.items():
        if isinstance(stage, EvaluateStage) and stage.tasks and not stage.tasks_source:
            wrong.append(f"stages.{name}.tasks = {', '.join(stage.tasks)}: set stages.{name}.tasks_source, or tasks=[]")
        task = stage.depth_task if isinstance(stage, ScoreStage) and "task" in stage.layer_metrics else None
        if task is not None and not task.source:
            wrong.append(f"stages.{name}.depth_task = {task.name}: set stages.{name}.depth_task.source")
    if wrong:
        raise PlanError(
            "Tasks of the recipe fetch their data from the hub while they run:\n"
            + "\n".join(f"  - {w}" for w in wrong),
            where=recipe.name,
            allowed="asset:offline-eval-tasks, or a folder with TASK/validation.arrow",
        )


def _fetch_assets(recipe: Recipe, progress: Progress) -> None:
    """Also those that are here: their contents are compared."""
    named = {source.removeprefix(ASSET) for _, _, source in _sources(recipe) if source.startswith(ASSET)}
    known = [name for name in assets.ASSETS if name in named - BUILT_IN.keys()]
    assets.fetch(known, Path(recipe.execution.assets_dir), progress)


def _member(file: Path) -> str:
    return f"{RECIPES}/{recipe_name(require_recipe(file))}.yaml"


def _texts(file: Path, overrides: Sequence[str], moved: Mapping[str, str]) -> Iterator[Item]:
    """The recipe, written out; and the configs that overrides such as `cluster=NAME` choose from."""
    made_from = " ".join(["minitron bundle", str(file), *overrides])
    if any(ord(sign) < 32 for sign in made_from):
        raise ConfigError(f"{made_from!r} has a line break.", next_step="Rename the recipe, or leave the break out.")
    text = f"# Made by: {made_from}\n" + write_out(file, overrides, moved)
    yield Item(_member(file), text.encode(), "recipe")
    found: dict[str, Path] = {}
    for configs in configs_dirs(require_recipe(file)):
        for config in sorted(configs.rglob("*.yaml")):
            found.setdefault(config.relative_to(configs).as_posix(), config)
    for name, config in found.items():
        yield Item(f"{CONFIGS}/{name}", config, "config")
