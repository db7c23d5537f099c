"""Values of the environment stay in `execution`: all else of a recipe stands in reports, model cards and bundles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nemo_minitron.errors import ConfigError

EXECUTION, VARIABLE = "execution", "oc.env"
_PRIVATE = ("cluster", "notify_command")
"""Keys of `execution` to which no other section may refer: commands and variables stand in them."""


def require_public_values(composed: Any, where: str) -> None:
    """Refuse a recipe that takes values of the environment, or of `execution.cluster`, to where they are published.

    A recipe of somebody else could otherwise write a token of yours into the files that you pass on.

    Raises:
        ConfigError: naming the key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    found = composed.copy()
    OmegaConf.set_struct(found, False)
    execution = found._get_node(EXECUTION)
    if OmegaConf.is_dict(execution):
        for key in set(_PRIVATE) & set(execution):
            execution[key] = f"${{{VARIABLE}:{EXECUTION}.{key}}}"
    for key in found:
        if key == EXECUTION:
            continue
        with _asked_for() as asked:
            try:
                node = found[key]
                if OmegaConf.is_config(node):
                    OmegaConf.to_container(node, resolve=True)
            except OmegaConfBaseException as error:
                if asked:
                    raise _refusal(str(getattr(error, "full_key", None) or key), str(key), asked[0], where) from None
                # Anything else is told in its own words when the whole recipe is resolved.


@contextmanager
def _asked_for() -> Iterator[list[str]]:
    """No variable can be read; those that were asked for."""
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    asked: list[str] = []

    def refuse(name: str, *_: Any) -> str:
        asked.append(name)
        raise ValueError(name)

    OmegaConf.register_new_resolver(VARIABLE, refuse, replace=True)
    try:
        yield asked
    finally:
        OmegaConf.register_new_resolver(VARIABLE, oc.env, replace=True)


def _refusal(full_key: str, section: str, name: str, where: str) -> ConfigError:
    key = full_key if full_key.split(".")[0].split("[")[0] == section else section
    if name.startswith(f"{EXECUTION}."):
        what = f"{key} takes its value from {name}, which may hold secrets."
    else:
        what = f"{key} takes its value from the variable {name} of the environment."
    return ConfigError(
        f"{what} Values from the environment may stand in {EXECUTION} only: the rest of a recipe is published.",
        where=where,
        next_step=f'If you want it to be published, say so yourself, on the command line: {key}="$NAME"',
    )
