"""Composition of a recipe file and overrides into one dict, by Hydra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nemo_minitron.config.extends import GLOBAL, SELF, Chain, first_lines, read_chain
from nemo_minitron.config.keys import value_kind
from nemo_minitron.config.outside import require_public_values
from nemo_minitron.config.overrides import KEY, for_hydra, require_form, unknown_key
from nemo_minitron.config.site import add_site, split_cluster
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.system.bounded import bounded
from nemo_minitron.system.disclosure import portable_recipe
from nemo_minitron.system.places import configs_dirs, recipe_name, require_recipe

_PRIMARY, _BODIES = "minitron_recipe", "minitron_recipes"
"""Names in Hydra's config store, which no file in a recipe's folder may have."""
_NO_FILES = "nemo_minitron.config"


def compose(recipe: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe with its defaults list and apply overrides such as `stages.distill.lr=1e-4`.

    Any key of the schema can be overridden, even if the recipe does not contain it. `group=choice`, `~key` and `+key`
    work as in Hydra. Texts need no quotes except those of the shell.

    Raises:
        ConfigError: the file is missing or not valid YAML, a config group is unknown, or an override is malformed.
    """
    return _compose(recipe, overrides)[1]


def write_out(recipe: Path, overrides: Sequence[str], changes: Mapping[str, str]) -> str:
    """Return the composed recipe as a self-contained YAML text, without a defaults list.

    `${...}` is kept, so that later overrides still reach the values that refer to them. Values that may be secret are
    removed (`disclosure.portable_recipe`), because the text may be published.

    Args:
        changes: key -> new value, for keys that the recipe contains.
    """
    from omegaconf import OmegaConf

    as_written, resolved = _compose(recipe, overrides)
    return OmegaConf.to_yaml(OmegaConf.create(portable_recipe(_changed(as_written, resolved, changes, ""))))


def _changed(written: Any, resolved: Any, changes: Mapping[str, str], key: str) -> Any:
    if key in changes:
        return changes[key]
    if isinstance(written, str) and any(other.startswith(f"{key}.") for other in changes):
        written = resolved  # `${...}` in place of a section that contains a changed key
    if isinstance(written, dict):
        return {name: _changed(written[name], resolved[name], changes, f"{key}.{name}".lstrip(".")) for name in written}
    if isinstance(written, list):
        return [_changed(*pair, changes, f"{key}.{i}") for i, pair in enumerate(zip(written, resolved, strict=True))]
    return written


def _compose(recipe: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the composed recipe twice: with `${...}` as written, and resolved."""
    require_form(recipe, overrides)
    file = require_recipe(recipe)
    with bounded(str(recipe)):
        return _compose_file(recipe, file, overrides)


def _compose_file(recipe: Path, file: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    chain = read_chain(file)
    site, overrides = split_cluster(overrides)
    if site is not None:
        add_site(site, file, chain)
    GlobalHydra.instance().clear()
    try:
        # Everything is in the store, so this package, which has no YAML, stands for the folder of the primary config.
        # `initialize` would look for that folder in the sources of the whole call stack, which takes 20 ms.
        with _stored(chain), initialize_config_module(_NO_FILES, job_name="minitron", version_base="1.3"):
            composed = hydra_compose(_PRIMARY, overrides=[for_hydra(text) for text in overrides])
        require_public_values(composed, str(recipe))
        as_written, resolved = (OmegaConf.to_container(composed, resolve=resolve) for resolve in (False, True))
    except RecursionError:
        raise ConfigError("The recipe is nested too deeply, or refers to itself.", where=str(recipe)) from None
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError) as error:
        raise _not_composed(recipe, file, chain, overrides, error) from error
    return _with_name(as_written, file), _with_name(resolved, file)


@contextmanager
def _stored(chain: Chain) -> Iterator[None]:
    """Add a chain of recipes to Hydra's config store, a global of the process, for the duration of the context."""
    from hydra.core.config_store import ConfigStore

    defaults: list[Any] = [SELF]
    defaults += [f"/{_BODIES}/{entry}" if isinstance(entry, int) else entry for entry in chain.entries]
    defaults += chain.overrides.values()
    # Escape folder names that look like an interpolation.
    places = [f"file://{folder}".replace("${", "\\${") for folder in chain.places]
    primary = {"defaults": defaults, "hydra": {"searchpath": places}}
    store = ConfigStore.instance()
    before, store.repo = store.repo, dict(store.repo)
    try:
        store.store(name=_PRIMARY, node=primary)
        for number, body in enumerate(chain.bodies):
            store.store(group=_BODIES, name=str(number), node=body, package=GLOBAL)
        yield
    finally:
        store.repo = before


def _with_files(text: str, recipe: Path, chain: Chain) -> str:
    """Replace the names in the config store with those of files in a message of Hydra."""
    for number, file in enumerate(chain.files):
        text = text.replace(f"{_BODIES}/{number}", str(file))
    return text.replace(_PRIMARY, str(recipe))


def _not_composed(recipe: Path, file: Path, chain: Chain, overrides: Sequence[str], error: Exception) -> ConfigError:
    """Return the error to raise: about an override with an unknown key if there is one, else Hydra's message."""
    if overrides:
        try:
            written = _compose(recipe, ())[1].get("stages")
            stages = list(written) if isinstance(written, dict) else []
        except MinitronError:
            # The recipe itself cannot be composed, so report its error and not one about the overrides.
            stages = []
        folders = (*configs_dirs(file), file.parent)
        groups = sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})
        unknown = unknown_key(overrides, groups, stages) if stages else None
        if unknown is not None:
            return unknown
    next_step = "Overrides look like stages.distill.lr=1e-4; config groups are the folders of configs/."
    if "Interpolation key" in str(error):
        next_step = (
            "${a.b} refers to another key of the recipe; in execution, ${oc.env:HOME} to an environment variable."
        )
    return ConfigError(
        "The recipe could not be composed: " + _with_files(first_lines(error), file, chain),
        where=str(recipe),
        allowed=", ".join(getattr(error, "options", None) or ()) or None,
        next_step=next_step,
    )


def _with_name(out: Any, file: Path) -> dict[str, Any]:
    assert isinstance(out, dict)
    out.setdefault("name", recipe_name(file))
    return {str(key): value for key, value in out.items()}


def from_dotlist(texts: Sequence[str], root: type[BaseModel]) -> dict[str, Any]:
    """Convert texts of the form `a.b=1` into a nested dict.

    Args:
        root: schema of the keys. Values of keys that hold text are taken literally; others are parsed as YAML.

    Raises:
        ConfigError: a text is malformed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    found = OmegaConf.create({})
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not KEY.fullmatch(key):
            raise ConfigError(f"{text}: does not have the form KEY=VALUE.", next_step="For example: lr=1e-6")
        try:
            parsed = value if value_kind(key, root) == "text" else OmegaConf.from_dotlist([f"value={value}"])["value"]
            # Keep the text as it is, because YAML would remove ` #` and everything after it.
            OmegaConf.update(found, key, value if isinstance(parsed, str) else parsed, force_add=True)
        except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{text} could not be read: " + first_lines(error)) from error
    try:
        out = OmegaConf.to_container(found, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError("A setting could not be read: " + first_lines(error)) from error
    assert isinstance(out, dict)
    return {str(key): value for key, value in out.items()}
