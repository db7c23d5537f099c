"""The site of `cluster=NAME`: its file becomes a part of the recipe, after all bases and before the overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.config.extends import Chain, first_lines, load_mapping
from nemo_minitron.config.outside import EXECUTION
from nemo_minitron.config.overrides import CLUSTER
from nemo_minitron.errors import ConfigError
from nemo_minitron.system.files import user_path
from nemo_minitron.system.places import SUFFIXES, configs_dirs, with_suffix


def split_cluster(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the site of `cluster=NAME`, if any, and the other overrides."""
    chosen = [text.split("=", 1)[1] for text in overrides if text.startswith(f"{CLUSTER}=")]
    return (chosen[-1] if chosen else None), [text for text in overrides if not text.startswith(f"{CLUSTER}=")]


def add_site(site: str, file: Path, chain: Chain) -> None:
    """Append a site to the chain of a recipe, so that its keys replace those of the recipe's own `execution.cluster`.

    `${...}` is kept, because a bundle contains the recipe as it is written, without values of environment variables.

    Raises:
        ConfigError: there is no such site, or its file cannot be read.
    """
    found = _find(site, file)
    keys = _keys(found)
    if not all(map(_may_hold_site, chain.bodies)):
        return  # validation reports the value in the place of the mapping
    chain.entries.append(len(chain.bodies))
    chain.files.append(found)
    chain.bodies.append({EXECUTION: {CLUSTER: keys}})


def _find(site: str, file: Path) -> Path:
    """Return the file of a site, given by its name in configs/cluster/ or by its path."""
    folders = [folder / CLUSTER for folder in configs_dirs(file)]
    candidates = [folder / f"{site}{suffix}" for folder in folders for suffix in SUFFIXES]
    found = next((path for path in map(with_suffix, [*candidates, user_path(site)]) if path is not None), None)
    if found is None or not site:
        known = sorted({path.stem for folder in folders for path in folder.glob("*.y*ml")})
        raise ConfigError(
            f"There is no cluster {site}.",
            allowed=", ".join(known) or None,
            next_step=f"Copy a file of {folders[-1]} to configs/cluster/ and edit it, or give the path of a file: "
            "cluster=path/to/site.yaml.",
        )
    return found


def _keys(found: Path) -> dict[str, Any]:
    """Return the keys of a site as they are written, with references to each other that hold inside of a recipe."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    written = load_mapping(found, CLUSTER)
    try:
        OmegaConf.to_container(OmegaConf.create(written), resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError("The cluster could not be read: " + first_lines(error), where=str(found)) from error
    names = "|".join(re.escape(str(key)) for key in written)
    reference = re.compile(
        rf"(?<!\\)(\$\{{\s*(?:oc\.(?:select|dict\.keys|dict\.values):\s*)?)(?=(?:{names})\s*[.}}\[,])"
    )
    return {str(key): _moved(value, reference) for key, value in written.items()}


def _moved(value: Any, reference: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return reference.sub(rf"\1{EXECUTION}.{CLUSTER}.", value)
    if isinstance(value, dict):
        return {key: _moved(inner, reference) for key, inner in value.items()}
    return [_moved(inner, reference) for inner in value] if isinstance(value, list) else value


def _may_hold_site(body: Mapping[str, Any]) -> bool:
    execution = body.get(EXECUTION, {})
    if isinstance(execution, dict):
        execution = execution.get(CLUSTER) or {}
    return isinstance(execution, dict) or str(execution).startswith("${")
