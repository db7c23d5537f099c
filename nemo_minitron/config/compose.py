"""Recipe file + overrides -> one plain dict. The only place that knows Hydra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.config.schema import Recipe
from nemo_minitron.errors import ConfigError

RECIPES, CONFIGS, CLUSTER = "recipes", "configs", "cluster"
SHORT = {"launcher": "execution.launcher", CLUSTER: "execution.cluster"}
"""First words of overrides that stand for a longer key."""


def compose(recipe: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe with its defaults list and apply overrides such as `stages.distill.lr=1e-4`.

    Any key of the schema can be overridden, whether the recipe mentions it or not; `group=choice`
    and Hydra's own `~key` and `+key` work as in Hydra.

    Raises:
        ConfigError: no such file, bad YAML, an unknown config group or a malformed override.
    """
    return _compose(recipe, overrides)[1]


def write_out(recipe: Path, overrides: Sequence[str], changes: Mapping[str, str]) -> str:
    """The recipe as one YAML text that needs no configs: its defaults list and the overrides are carried out.

    `${...}` stays, so that an override of the text still reaches all that follows it.

    Args:
        changes: key -> value to write instead of what stands there, for keys that are there.
    """
    from omegaconf import OmegaConf

    as_written, resolved = _compose(recipe, overrides)
    return OmegaConf.to_yaml(OmegaConf.create(_changed(as_written, resolved, changes, "")))


def _changed(written: Any, resolved: Any, changes: Mapping[str, str], key: str) -> Any:
    if key in changes:
        return changes[key]
    if isinstance(written, str) and any(other.startswith(f"{key}.") for other in changes):
        written = resolved  # `${...}` that stands for a section in which something changes
    if isinstance(written, dict):
        return {name: _changed(written[name], resolved[name], changes, f"{key}.{name}".lstrip(".")) for name in written}
    if isinstance(written, list):
        return [_changed(*pair, changes, f"{key}.{i}") for i, pair in enumerate(zip(written, resolved, strict=True))]
    return written


def _compose(recipe: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The composed recipe, with `${...}` as written and with its values."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = require_recipe(recipe)
    site, overrides = _split_cluster(overrides)
    search = f"hydra.searchpath=[file://{configs_dir(file)}]"
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(file.parent), version_base="1.3", job_name="minitron"):
            composed = hydra_compose(file.stem, overrides=[search, *map(_lenient, overrides)])
        texts = (OmegaConf.to_container(composed, resolve=resolve) for resolve in (False, True))
        as_written, resolved = (_with_name_and_site(text, file, site) for text in texts)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(
            "The recipe could not be composed: " + _first_lines(error),
            where=str(recipe),
            next_step="Overrides look like stages.distill.lr=1e-4; config groups are the folders of configs/.",
        ) from error
    return as_written, resolved


def _with_name_and_site(out: Any, file: Path, site: str | None) -> dict[str, Any]:
    assert isinstance(out, dict)
    out.setdefault("name", recipe_name(file))
    if site is not None:
        execution = out.setdefault("execution", {})
        execution["cluster"] = _over(_read_cluster(site, configs_dir(file)), execution.get("cluster") or {})
    return {str(key): value for key, value in out.items()}


def _split_cluster(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """(the site of `cluster=NAME`, the other overrides)."""
    chosen = [text.split("=", 1)[1] for text in overrides if text.startswith(f"{CLUSTER}=")]
    return (chosen[-1] if chosen else None), [text for text in overrides if not text.startswith(f"{CLUSTER}=")]


def _read_cluster(site: str, configs: Path) -> dict[str, Any]:
    """The site's file, by its name in configs/cluster/ or by its path."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    own = configs / CLUSTER / f"{site}.yaml"
    file = next((path for path in (own, Path(site)) if path.is_file()), None)
    if file is None:
        raise ConfigError(
            f"There is no cluster {site}.",
            allowed=", ".join(sorted(path.stem for path in (configs / CLUSTER).glob("*.yaml"))) or None,
            next_step=f"Copy one of {configs / CLUSTER} and change it, or name a file: cluster=path/to/site.yaml.",
        )
    try:
        found = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise ConfigError("The cluster could not be read: " + _first_lines(error), where=str(file)) from error
    if not isinstance(found, dict):
        raise ConfigError("A cluster is a mapping of keys to values.", where=str(file))
    return {str(key): value for key, value in found.items()}


def _over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, section by section."""
    nested = {
        key: _over(base[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **changes, **nested}


def from_dotlist(texts: Sequence[str]) -> dict[str, Any]:
    """`a.b=1` texts -> a nested dict.

    Raises:
        ConfigError: one of them is malformed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for text in texts:
        if not text.partition("=")[1] or text.startswith("="):
            raise ConfigError(f"{text}: not of the form KEY=VALUE.", next_step="For example: lr=1e-6")
    try:
        found = OmegaConf.to_container(OmegaConf.from_dotlist(list(texts)), resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError("A setting could not be read: " + _first_lines(error)) from error
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


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
    first = override.split("=", 1)[0].split(".")[0]
    if first in SHORT:
        override = SHORT[first] + override[len(first) :]
    key = override.split("=", 1)[0]
    if "=" in override and key.split(".")[0] in Recipe.model_fields and "@" not in key:
        return f"++{override}"
    return override


def _first_lines(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
