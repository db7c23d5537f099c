"""Recipe file + overrides -> one plain dict. The only place that knows Hydra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.config.schema import Recipe
from nemo_minitron.errors import ConfigError

RECIPES, CONFIGS = "recipes", "configs"


def compose(recipe: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe with its defaults list and apply overrides such as `stages.distill.lr=1e-4`.

    Any key of the schema can be overridden, whether the recipe mentions it or not; `group=choice`
    and Hydra's own `~key` and `+key` work as in Hydra.

    Raises:
        ConfigError: no such file, bad YAML, an unknown config group or a malformed override.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = require_recipe(recipe)
    search = f"hydra.searchpath=[file://{configs_dir(file)}]"
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(file.parent), version_base="1.3", job_name="minitron"):
            composed = hydra_compose(file.stem, overrides=[search, *map(_lenient, overrides)])
        out = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(
            "The recipe could not be composed: " + _first_lines(error),
            where=str(recipe),
            next_step="Overrides look like stages.distill.lr=1e-4; config groups are the folders of configs/.",
        ) from error
    assert isinstance(out, dict)
    out.setdefault("name", recipe_name(file))
    return {str(key): value for key, value in out.items()}


def require_recipe(recipe: Path) -> Path:
    """The absolute path of an existing recipe file; `.yaml` may be left out."""
    for candidate in (recipe, recipe.with_name(recipe.name + ".yaml")):
        if candidate.is_file():
            return candidate.resolve()
    near = sorted(str(p) for p in recipe.parent.glob("*.yaml")) if recipe.parent.is_dir() else []
    raise ConfigError(
        f"There is no recipe {recipe}.",
        allowed=", ".join(near) or None,
        next_step="See recipes/README.md for the recipes that come with the package.",
    )


def recipe_name(file: Path) -> str:
    """The recipe's path below the recipes folder, without .yaml."""
    parts = file.with_suffix("").parts
    # The last of this name: the checkout itself may be called so.
    folders = [number for number, part in enumerate(parts[:-1]) if part == RECIPES]
    below = parts[folders[-1] + 1 :] if folders else parts[-1:]
    return "/".join(below)


def configs_dir(file: Path) -> Path:
    """The configs folder beside the recipes folder; the package's own when there is none."""
    for parent in file.parents:
        if (parent / CONFIGS).is_dir():
            return parent / CONFIGS
    return Path(__file__).resolve().parents[2] / CONFIGS


def _lenient(override: str) -> str:
    """Let plain `a.b=1` set keys that only the schema knows; the schema refuses the wrong ones, by name."""
    key = override.split("=", 1)[0]
    if "=" in override and key.split(".")[0] in Recipe.model_fields and "@" not in key:
        return f"++{override}"
    return override


def _first_lines(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
