"""Check that values of environment variables stay in `execution`; reports, model cards and bundles show the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nemo_minitron.errors import ConfigError

EXECUTION, VARIABLE = "execution", "oc.env"
_PRIVATE = ("cluster", "notify_command")
"""Keys of `execution` to which no other section may refer, because they hold commands and environment variables."""


def require_public_values(composed: Any, where: str) -> None:
    """Reject a recipe that uses environment variables or `execution.cluster` in a section that is published.

    Otherwise a recipe by someone else could write the user's tokens into files that the user publishes.

    Raises:
        ConfigError: a key uses such a value; the message names it.
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
        with _variables_blocked() as blocked:
            try:
                node = found[key]
                if OmegaConf.is_config(node):
                    OmegaConf.to_container(node, resolve=True)
            except OmegaConfBaseException as error:
                if blocked:
                    raise _refusal(str(getattr(error, "full_key", None) or key), str(key), blocked[0], where) from None
                # Other errors are reported when the whole recipe is resolved.


@contextmanager
def _variables_blocked() -> Iterator[list[str]]:
    """Block reading environment variables in this context, and yield a list of those that the recipe tried to read."""
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    blocked: list[str] = []

    def refuse(name: str, *_: Any) -> str:
        blocked.append(name)
        raise ValueError(name)

    OmegaConf.register_new_resolver(VARIABLE, refuse, replace=True)
    try:
        yield blocked
    finally:
        OmegaConf.register_new_resolver(VARIABLE, oc.env, replace=True)


def _refusal(full_key: str, section: str, name: str, where: str) -> ConfigError:
    key = full_key if full_key.split(".")[0].split("[")[0] == section else section
    if name.startswith(f"{EXECUTION}."):
        what = f"{key} takes its value from {name}, which may hold secrets."
    else:
        what = f"{key} takes its value from the environment variable {name}."
    return ConfigError(
        f"{what} Only {EXECUTION} may use environment variables, because the rest of a recipe is published.",
        where=where,
        next_step=f'To publish the value anyway, set it on the command line: {key}="$NAME"',
    )
