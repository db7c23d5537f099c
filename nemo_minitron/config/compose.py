"""Recipe file + overrides -> one plain dict. The only place that knows Hydra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nemo_minitron.config.keys import value_kind
from nemo_minitron.config.overrides import CLUSTER, KEY, for_hydra, require_form, unknown_key
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.files import user_path

RECIPES, CONFIGS = "recipes", "configs"


def compose(recipe: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe with its defaults list and apply overrides such as `stages.distill.lr=1e-4`.

    Any key of the schema can be overridden, whether the recipe mentions it or not; `group=choice`
    and Hydra's own `~key` and `+key` work as in Hydra. Texts need no quotes but the shell's.

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

    require_form(recipe, overrides)
    file = require_recipe(recipe)
    site, overrides = _split_cluster(overrides)
    search = f"hydra.searchpath=[file://{configs_dir(file)}]"
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(file.parent), version_base="1.3", job_name="minitron"):
            composed = hydra_compose(file.stem, overrides=[search, *map(for_hydra, overrides)])
        texts = (OmegaConf.to_container(composed, resolve=resolve) for resolve in (False, True))
        as_written, resolved = (_with_name_and_site(text, file, site) for text in texts)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        raise _not_composed(recipe, file, overrides, error) from error
    return as_written, resolved


def _not_composed(recipe: Path, file: Path, overrides: Sequence[str], error: Exception) -> ConfigError:
    """The message, about an override whose key is unknown where there is one."""
    if overrides:
        try:
            stages = list(_compose(recipe, ())[1].get("stages") or {})
        except MinitronError:
            # The recipe itself cannot be composed: its error is the one to show.
            stages = []
        folders = (configs_dir(file), file.parent)
        groups = sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})
        unknown = unknown_key(overrides, groups, stages) if stages else None
        if unknown is not None:
            return unknown
    next_step = "Overrides look like stages.distill.lr=1e-4; config groups are the folders of configs/."
    if "Interpolation key" in str(error):
        next_step = "${a.b} is another key of the recipe; ${oc.env:HOME} is a variable of the environment."
    return ConfigError(
        "The recipe could not be composed: " + _first_lines(error), where=str(recipe), next_step=next_step
    )


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
    file = next((path for path in (own, user_path(site)) if path.is_file()), None)
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


def from_dotlist(texts: Sequence[str], root: type[BaseModel]) -> dict[str, Any]:
    """`a.b=1` texts -> a nested dict.

    Args:
        root: the schema of the keys. Where it has text, the value is taken as it is; elsewhere as in YAML.

    Raises:
        ConfigError: one of them is malformed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    found = OmegaConf.create({})
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not KEY.fullmatch(key):
            raise ConfigError(f"{text}: not of the form KEY=VALUE.", next_step="For example: lr=1e-6")
        try:
            parsed = value if value_kind(key, root) == "text" else OmegaConf.from_dotlist([f"value={value}"])["value"]
            # YAML would drop what follows ` #` from a text.
            OmegaConf.update(found, key, value if isinstance(parsed, str) else parsed, force_add=True)
        except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{text} could not be read: " + _first_lines(error)) from error
    try:
        out = OmegaConf.to_container(found, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError("A setting could not be read: " + _first_lines(error)) from error
    assert isinstance(out, dict)
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


def _first_lines(error: Exception) -> str:
    """The error's own words; where Hydra only names the override that failed, those of its cause as well."""
    causes = [error, *([error.__cause__] if error.__cause__ is not None else [])]
    lines = [line.strip() for one in causes for line in str(one).splitlines() if line.strip()]
    return " ".join(lines[: 3 * len(causes)]) or type(error).__name__
