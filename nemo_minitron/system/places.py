"""Search for recipes and configs, in the user's folders first and then in those shipped with the package."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from nemo_minitron.errors import ConfigError
from nemo_minitron.system.files import user_path

RECIPES, CONFIGS, CONSTRAINTS = "recipes", "configs", "constraints"
SUFFIXES = (".yaml", ".yml")
SHIPPED = "_shipped"
"""Folder in the wheel for top-level folders of the repository; setup.py copies them there."""
NEAREST = 5
"""Maximum number of similar names in a message about an unknown name."""


def shipped_dir(name: str) -> Path:
    """Return the folder `recipes`, `configs` or `constraints` of the package, in the wheel or in a checkout."""
    inside = Path(str(files("nemo_minitron"))) / SHIPPED / name
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / name


def shipped_recipes() -> list[str]:
    """List the names of the shipped recipes, such as `toy/width`, sorted."""
    folder = shipped_dir(RECIPES)
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def require_recipe(recipe: Path) -> Path:
    """Return the absolute path of a recipe from a path, with or without suffix, or the name of a shipped recipe.

    The search order is the path itself, ./recipes, and the shipped recipes. `recipes/toy/width.yaml` also finds the
    shipped recipe, so that the commands in the documentation work without a checkout.

    Raises:
        ConfigError: there is no such recipe, or it is a folder.
        EnvironmentProblem: the home folder of `~` is unknown.
    """
    path = user_path(recipe)
    for folder in (Path(), Path(RECIPES), *_shipped_roots(recipe)):
        found = with_suffix(folder / path)
        if found is not None:
            return found.resolve()
    if _is_dir(recipe):
        raise ConfigError(f"{recipe} is a folder.", allowed=_listed(_beside(recipe)), next_step="Choose one recipe.")
    raise ConfigError(
        f"There is no recipe {recipe}.",
        allowed=_listed([*_beside(recipe.parent), *nearest_recipes(str(recipe))]),
        next_step="`minitron recipes` lists the recipes shipped with the package; use their names, e.g. toy/width.",
    )


def require_shipped_recipe(name: str) -> Path:
    """Return the file of a recipe shipped with the package.

    Raises:
        ConfigError: there is no recipe with this name.
    """
    for root in _shipped_roots(Path(name)):
        found = with_suffix(root / name)
        if found is not None:
            return found
    raise ConfigError(f"No recipe {name} comes with the package.", allowed=_listed(nearest_recipes(name)))


def with_suffix(path: Path) -> Path | None:
    """Find the file for a path with or without its YAML suffix; None: there is none."""
    if not path.name:
        return None
    for suffix in ("", *SUFFIXES):
        candidate = path.parent / f"{path.name}{suffix}"
        try:
            if candidate.is_file():
                return candidate
        except OSError:  # not a valid file name
            return None
    return None


def nearest_recipes(name: str) -> list[str]:
    """List the shipped recipes with similar names; all of them if none is similar."""
    known = shipped_recipes()
    bare = name.removeprefix(f"{RECIPES}/")
    for suffix in SUFFIXES:
        bare = bare.removesuffix(suffix)
    near = [other for other in known if (bare and bare in other) or bare.rpartition("/")[2] == other.rpartition("/")[2]]
    return near or get_close_matches(bare, known, n=NEAREST, cutoff=0.6) or known


def recipe_name(file: Path) -> str:
    """Return the default name of a recipe: its path below the recipes folder, without the suffix.

    Characters that a name cannot contain, such as spaces, are replaced by hyphens.
    """
    parts = [*file.parts[:-1], file.stem if file.suffix in SUFFIXES else file.name]
    # Use the last folder of this name, because the checkout itself may have the same name.
    folders = [number for number, part in enumerate(parts[:-1]) if part == RECIPES]
    below = parts[folders[-1] + 1 :] if folders else parts[-1:]
    return "/".join(_as_name(part) for part in below)


def recipe_roots(file: Path) -> list[Path]:
    """List the folders in which a recipe's base recipes are searched, nearest first."""
    own = [parent for parent in file.parents if parent.name == RECIPES][:1]
    return _distinct([*own, Path(RECIPES).absolute(), shipped_dir(RECIPES)])


def configs_dirs(file: Path) -> list[Path]:
    """List the config folders of a recipe: next to its recipes folder, in the working folder, and in the package."""
    beside = [parent / CONFIGS for parent in file.parents if _is_dir(parent / CONFIGS)][:1]
    shipped = shipped_dir(CONFIGS)
    own = [folder for folder in beside if folder != shipped]
    return _distinct([*own, Path(CONFIGS).absolute(), shipped])


def _shipped_roots(recipe: Path) -> Iterator[Path]:
    """Yield the folders in which a relative path can name a shipped recipe."""
    if not recipe.is_absolute() and ".." not in recipe.parts:
        shipped = shipped_dir(RECIPES)
        yield shipped
        if recipe.parts[:1] == (RECIPES,):
            yield shipped.parent


def _distinct(folders: list[Path]) -> list[Path]:
    return list({folder.resolve(): None for folder in folders if _is_dir(folder)})


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _beside(folder: Path) -> list[str]:
    if not _is_dir(folder):
        return []
    return sorted(str(path) for path in folder.iterdir() if path.suffix in SUFFIXES)


def _listed(names: list[str]) -> str | None:
    return ", ".join(names) or None


def _as_name(part: str) -> str:
    text = unicodedata.normalize("NFC", part)
    kept = "".join(sign if sign in "._-" or _is_letter(sign) else "-" for sign in text)
    return re.sub("-+", "-", kept).strip("-_.") or "recipe"


def _is_letter(sign: str) -> bool:
    category = unicodedata.category(sign)
    return category[0] in "LM" or category == "Nd"
