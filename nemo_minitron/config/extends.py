"""Recipes that extend recipes: the files of a chain of bases -> one defaults list and their contents, in order.

Hydra alone would put a base in another folder below a key of that folder's name.
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
_NEXT = "A base is named as in `defaults: [smollm2_135m/width, _self_]`, or by its path; a group as in `- /data: NAME`."


@dataclass
class Chain:
    """A recipe with all its bases, the innermost base first."""

    files: list[Path] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """What each file holds beside its defaults list."""
    entries: list[int | str | dict[str, Any]] = field(default_factory=list)
    """The joint defaults list; a number stands for the body of that file."""
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Group -> the `override` entry that counts: that of the outermost recipe."""
    places: list[Path] = field(default_factory=list)
    """Where configs are looked for, the first match counts."""


def read_chain(file: Path) -> Chain:
    """Read a recipe and all that it extends.

    Raises:
        ConfigError: a file that cannot be read, a base that is not there, or bases in a circle.
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
        raise ConfigError("hydra: a recipe has no such key.", where=str(file))
    if users:
        # A base's name is the name of its own run.
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
            f"The recipe extends {name}, and there is no such recipe.",
            where=str(file),
            allowed=", ".join(nearest_recipes(name.strip("/"))),
            next_step=_NEXT,
        )
    if base is None:
        chain.entries.append(entry)
    elif base not in chain.files:
        _add(base, (*users, file), chain)


def _name_of_base(entry: str | dict[str, Any]) -> tuple[str | None, bool]:
    """(the name of the base that an entry may stand for, whether it is optional); no name: a config, surely."""
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
    """The recipe that a name in `file` stands for; None: it is no recipe.

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
            # A user's recipe may have the name of the shipped one that it extends.
            own = True
            continue
        if found in users:
            circle = [*users[users.index(found) :], file, found]
            raise ConfigError(
                "The recipe extends itself: " + " -> ".join(str(one) for one in circle) + ".", where=str(file)
            )
        return found
    if own:
        raise ConfigError(f"The recipe extends itself: {name}.", where=str(file))
    return None


def _is_config(name: str, file: Path) -> bool:
    bare = name.strip("/")
    return any(with_suffix(folder / f"{bare}.yaml") is not None for folder in [file.parent, *configs_dirs(file)])


def _package_of(file: Path) -> str | None:
    """What a line `# @package X` says; as for Hydra, only at the very top."""
    try:
        found = _HEADER.match(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def _entries(defaults: Any, file: Path) -> list[Any]:
    """The defaults list, checked, with `_self_` at its end unless it stands somewhere."""
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
        raise ConfigError(f"defaults: {SELF} stands there twice.", where=str(file))
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
    """The content of a YAML file, with `${...}` as it is written.

    Args:
        what: the kind of file, for messages.

    Raises:
        ConfigError: it cannot be read, or is not a mapping of names to values.
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
        raise ConfigError(f"A {what} is a mapping of keys to values.", where=str(file))
    for key in found:
        if not isinstance(key, str):
            raise ConfigError(f"{key!r}: a key of a {what} is a text.", where=str(file), next_step="Put it in quotes.")
    return {str(key): value for key, value in found.items()}


def first_lines(error: Exception) -> str:
    """The gist of a library's error on one line; where Hydra names only the override that failed, its cause as well."""
    causes = [error, *([error.__cause__] if error.__cause__ is not None else [])]
    lines = [line.strip() for one in causes for line in str(one).splitlines() if line.strip()]
    return " ".join(lines[: 3 * len(causes)]) or type(error).__name__
