"""Recipes that extend other recipes: the chain of bases is merged into one defaults list.

Without this, Hydra would place a base of another folder below a key with that folder's name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.errors import ConfigError
from nemo_minitron.system.files import user_path
from nemo_minitron.system.places import configs_dirs, nearest_recipes, recipe_roots, with_suffix

SELF, GLOBAL, OPTIONAL, OVERRIDE = "_self_", "_global_", "optional ", "override "
_HEADER = re.compile(r"\A\s*#\s*@package\s+(\S+)")
_NEXT = "Name a base as in `defaults: [smollm2_135m/width, _self_]` or by its path, and a group as in `- /data: NAME`."


@dataclass
class Chain:
    """A recipe with all its bases, the innermost base first."""

    files: list[Path] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Content of each file without its defaults list."""
    entries: list[int | str | dict[str, Any]] = field(default_factory=list)
    """The merged defaults list; a number is the index of a file, in place of its body."""
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Group -> the `override` entry of the outermost recipe that has one."""
    places: list[Path] = field(default_factory=list)
    """Search path for configs, in order of precedence."""


def read_chain(file: Path) -> Chain:
    """Read a recipe and all recipes that it extends.

    Raises:
        ConfigError: a file cannot be read, a base does not exist, or recipes extend each other in a cycle.
    """
    chain = Chain()
    _add(file, (), chain)
    outermost_first = list(reversed(chain.files))
    parents = [one.parent for one in outermost_first]
    configs = [folder for one in outermost_first for folder in configs_dirs(one)]
    roots = [folder for one in outermost_first for folder in recipe_roots(one)]
    shipped = configs_dirs(Path("/"))[-1:]
    own = [folder for folder in configs if folder not in shipped]
    chain.places = list(dict.fromkeys([*parents, *own, *shipped, *roots]))
    return chain


def _add(file: Path, users: tuple[Path, ...], chain: Chain) -> None:
    body = load_mapping(file, "recipe")
    entries = _entries(body.pop("defaults", None), file)
    if "hydra" in body:
        raise ConfigError("hydra: unknown key of a recipe.", where=str(file))
    if users:
        # The name of a base belongs to its own run.
        body.pop("name", None)
    for entry in entries:
        if entry == SELF:
            chain.entries.append(len(chain.files))
            chain.files.append(file)
            chain.bodies.append(body)
        elif isinstance(entry, dict) and next(iter(entry)).startswith(OVERRIDE):
            continue
        else:
            _add_entry(entry, file, users, chain)
    for entry in entries:
        if isinstance(entry, dict) and next(iter(entry)).startswith(OVERRIDE):
            group = next(iter(entry)).removeprefix(OVERRIDE).removeprefix(OPTIONAL).strip().removeprefix("/")
            chain.overrides[group] = entry


def _add_entry(entry: str | dict[str, Any], file: Path, users: tuple[Path, ...], chain: Chain) -> None:
    name, optional = _name_of_base(entry)
    base = None if name is None else _find_base(name, file, users)
    if name is not None and base is None and isinstance(entry, str) and not _is_config(name, file):
        if optional:
            return
        raise ConfigError(
            f"The recipe extends {name}, which does not exist.",
            where=str(file),
            allowed=", ".join(nearest_recipes(name.strip("/"))),
            next_step=_NEXT,
        )
    if base is None:
        chain.entries.append(entry)
    elif base not in chain.files:
        _add(base, (*users, file), chain)


def _name_of_base(entry: str | dict[str, Any]) -> tuple[str | None, bool]:
    """Return the name of the base that an entry may refer to, and whether it is optional; None: it is a config."""
    text = entry if isinstance(entry, str) else next(iter(entry))
    optional = text.startswith(OPTIONAL)
    name, _, package = text.removeprefix(OPTIONAL).strip().rpartition("@") if "@" in text else (text, "", "")
    name = name.removeprefix(OPTIONAL).strip()
    if package not in ("", GLOBAL) or not name:
        return None, optional
    if isinstance(entry, dict):
        option = next(iter(entry.values()))
        if package != GLOBAL or not isinstance(option, str) or not option:
            return None, optional
        name = f"{name}/{option}"
    return (None if "${" in name else name), optional


def _find_base(name: str, file: Path, users: Sequence[Path]) -> Path | None:
    """Find the recipe that a name in `file` refers to; return None if it is not a recipe.

    Raises:
        ConfigError: the recipe extends itself.
    """
    absolute = name.startswith("/")
    bare = name.strip("/")
    candidates = [user_path(name)] if absolute or name.startswith("~") else [file.parent / name]
    candidates += [root / bare for root in recipe_roots(file)]
    own = False
    for candidate in candidates:
        found = with_suffix(candidate)
        if found is None or _package_of(found) not in (None, GLOBAL):
            continue
        found = found.resolve()
        if found == file:
            # A user's recipe may have the same name as the shipped recipe that it extends.
            own = True
            continue
        if found in users:
            cycle = [*users[users.index(found) :], file, found]
            raise ConfigError(
                "The recipe extends itself: " + " -> ".join(str(one) for one in cycle) + ".", where=str(file)
            )
        return found
    if own:
        raise ConfigError(f"The recipe extends itself: {name}.", where=str(file))
    return None


def _is_config(name: str, file: Path) -> bool:
    bare = name.strip("/")
    return any(with_suffix(folder / f"{bare}.yaml") is not None for folder in [file.parent, *configs_dirs(file)])


def _package_of(file: Path) -> str | None:
    """Return X of a header `# @package X`, which, as for Hydra, must be at the top of the file."""
    try:
        found = _HEADER.match(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def _entries(defaults: Any, file: Path) -> list[Any]:
    """Check the defaults list, and append `_self_` unless the list contains it."""
    if defaults is None:
        return [SELF]
    if not isinstance(defaults, list):
        raise ConfigError(f"defaults = {defaults!r}: not a list.", where=str(file), next_step=_NEXT)
    for number, entry in enumerate(defaults):
        if not _is_entry(entry):
            raise ConfigError(
                f"defaults.{number} = {entry!r}: neither a name nor GROUP: NAME.", where=str(file), next_step=_NEXT
            )
    if defaults.count(SELF) > 1:
        raise ConfigError(f"defaults: contains {SELF} more than once.", where=str(file))
    return defaults if SELF in defaults else [*defaults, SELF]


def _is_entry(entry: Any) -> bool:
    if isinstance(entry, str):
        return bool(entry.strip())
    if not isinstance(entry, dict) or len(entry) != 1:
        return False
    ((group, option),) = entry.items()
    names = option if isinstance(option, list) else [option]
    return isinstance(group, str) and bool(group.strip()) and all(one is None or isinstance(one, str) for one in names)


def load_mapping(file: Path, what: str) -> dict[str, Any]:
    """Read a YAML file without resolving `${...}`.

    Args:
        what: kind of the file, for messages.

    Raises:
        ConfigError: the file cannot be read, or is not a mapping of names to values.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        found = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except RecursionError:
        raise ConfigError(f"The {what} is nested too deeply.", where=str(file)) from None
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError) as error:
        raise ConfigError(f"The {what} could not be read: {first_lines(error)}", where=str(file)) from error
    if not isinstance(found, dict):
        raise ConfigError(f"A {what} must be a mapping of keys to values.", where=str(file))
    for key in found:
        if not isinstance(key, str):
            raise ConfigError(f"{key!r}: a key of a {what} must be a text.", where=str(file), next_step="Quote it.")
    return {str(key): value for key, value in found.items()}


def first_lines(error: Exception) -> str:
    """Return the first lines of a library's error and of its cause as one line; Hydra's reasons are often the cause."""
    causes = [error, *([error.__cause__] if error.__cause__ is not None else [])]
    lines = [line.strip() for one in causes for line in str(one).splitlines() if line.strip()]
    return " ".join(lines[: 3 * len(causes)]) or type(error).__name__
