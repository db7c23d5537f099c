"""The contents of a bundle besides wheels: recipes, models and data."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from nemo_minitron import __version__, assets
from nemo_minitron.bundle.items import Item
from nemo_minitron.bundle.places import ASSETS_DIR, items_of, links_out, place_of
from nemo_minitron.config.compose import compose, write_out
from nemo_minitron.config.explain import validate
from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import PlanError
from nemo_minitron.hf.source import ASSET, BUILT_IN, HUB
from nemo_minitron.plan.checks import require_valid
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import make_plan
from nemo_minitron.plan.sources import sources_of
from nemo_minitron.stages.kind import Source
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.system.files import user_path
from nemo_minitron.system.places import RECIPES, recipe_name, require_recipe
from nemo_minitron.system.progress import Progress

MOST_LINKS_NAMED = 20
_EXECUTION_ASSETS = "execution.assets_dir"


@dataclass
class Collection:
    """Contents of a bundle, without wheels."""

    items: list[Item] = field(default_factory=list)
    recipes: list[dict[str, Any]] = field(default_factory=list)
    """File and name of each recipe, for the manifest; `waits_for`: files of recipes whose outputs it reads."""
    warnings: list[str] = field(default_factory=list)
    needs_aligner: bool = False


def collect(files: Sequence[Path], overrides: Sequence[str], progress: Progress) -> Collection:
    """Collect everything that the stages of these recipes read from outside. Fetch assets and download hub models.

    Raises:
        MinitronError: a recipe is invalid or needs the hub while it runs, or something is missing.
    """
    recipes = {file: validate(compose(file, overrides), where=str(file)) for file in files}
    made_here = {file: run_dir(recipe).absolute() for file, recipe in recipes.items()}
    out, outside = Collection(), dict[str, int]()
    for file, recipe in recipes.items():
        _require_no_hub(recipe)
        _fetch_assets(recipe, progress)
        _require_valid(recipe, made_here)
        moved = {_EXECUTION_ASSETS: ASSETS_DIR}
        assets_dir, waits_for = Path(recipe.execution.assets_dir), set[str]()
        for key, source in _sources(recipe):
            makers = _makers(source.location, made_here)
            if makers:
                waits_for |= {_member(maker) for maker in makers}
                continue
            place = place_of(source, assets_dir, outside)
            out.items += items_of(source, place, assets_dir)
            out.warnings += [
                f"{key}: {file} is packed as the file that a link leads to: {file.resolve()}"
                for file in links_out(source, assets_dir)[:MOST_LINKS_NAMED]
            ]
            moved[key] = place.source
        out.items.append(_text(file, overrides, moved))
        others = sorted(waits_for - {_member(file)})
        out.recipes.append({"file": _member(file), "name": recipe.name, **({"waits_for": others} if others else {})})
        out.warnings += [*_left_out(file, recipe), *_own_packages(file, recipe)]
        out.needs_aligner |= any(STAGES[stage.kind].needs_aligner for stage in recipe.stages.values())
        if recipe.execution.wandb_project is not None:
            out.warnings.append(
                f"{file}: execution.wandb_project needs a network; set it to null, or WANDB_MODE=offline."
            )
    return out


def _sources(recipe: Recipe) -> Iterator[tuple[str, Source]]:
    """Yield (key of the recipe, source) for everything that its stages read from outside the run."""
    for name, stage in recipe.stages.items():
        for source in sources_of(stage):
            yield f"stages.{name}.{source.key}", source


def _makers(source: str, made_here: Mapping[Path, Path]) -> list[Path]:
    """Return the recipes of the bundle whose run makes the source.

    Args:
        made_here: recipe -> folder of its run.
    """
    if source.startswith((ASSET, HUB)):
        return []
    path = user_path(source).absolute()
    return [file for file, run in made_here.items() if path.is_relative_to(run)]


def _require_valid(recipe: Recipe, made_here: Mapping[Path, Path]) -> None:
    made = [f"{key} = {source.location}:" for key, source in _sources(recipe) if _makers(source.location, made_here)]
    require_valid(make_plan(recipe), ignored=tuple(made))


def _require_no_hub(recipe: Recipe) -> None:
    """Refuse tasks without offline data, because lm-eval fetches their data while they run."""
    wrong = [
        f"stages.{name}.{task.key} = {task.name}: set stages.{name}.{task.source_key}, or leave the task out"
        for name, stage in recipe.stages.items()
        for task in STAGES[stage.kind].tasks(stage)
        if task.runs and not task.source
    ]
    if wrong:
        raise PlanError(
            "Tasks of the recipe fetch their data from the hub while they run:\n"
            + "\n".join(f"  - {w}" for w in wrong),
            where=recipe.name,
            allowed="asset:offline-eval-tasks, or a folder with TASK/validation.arrow",
        )


def _fetch_assets(recipe: Recipe, progress: Progress) -> None:
    """Fetch the assets of a recipe. Existing ones are verified."""
    sources = [source.location for _, source in _sources(recipe)]
    named = {location.removeprefix(ASSET) for location in sources if location.startswith(ASSET)}
    known = [name for name in assets.ASSETS if name in named - BUILT_IN.keys()]
    assets.fetch(known, Path(recipe.execution.assets_dir), progress)


def _member(file: Path) -> str:
    return f"{RECIPES}/{recipe_name(require_recipe(file))}.yaml"


def _text(file: Path, overrides: Sequence[str], moved: Mapping[str, str]) -> Item:
    """Return the self-contained recipe. It contains neither the command line nor the variables of this site."""
    text = f"# Made by `minitron bundle` of nemo-minitron {__version__}.\n"
    text += write_out(file, overrides, moved)
    return Item(_member(file), text.encode(), "recipe")


def _own_packages(file: Path, recipe: Recipe) -> Iterator[str]:
    """Yield the packages of others whose functions the stages call: rewards, and kinds of stage."""
    distributions = packages_distributions()
    for name, stage in recipe.stages.items():
        for function in (STAGES[stage.kind].run, *STAGES[stage.kind].functions(stage)):
            package = function.partition(":")[0].partition(".")[0]
            named = ", ".join(sorted({*distributions.get(package, ())})) or f"the module {package}"
            if package not in (*sys.stdlib_module_names, __name__.partition(".")[0]):
                yield (
                    f"{file}: not in the bundle: {named}, whose function {function} stages.{name} calls. Install it on "
                    "the other machine."
                )


def _left_out(file: Path, recipe: Recipe) -> Iterator[str]:
    execution = recipe.execution
    keys = [f"cluster.environment.{name}" for name in (execution.cluster.environment if execution.cluster else {})]
    keys += ["notify_command"] if execution.notify_command else []
    if keys:
        listed = ", ".join(f"execution.{key}" for key in keys)
        yield f"{file}: not in the bundle, as it may be secret: {listed}. Set it on the other machine."
