"""The launchers by name: those of this package, and those that other packages add.

Another package adds a launcher with an entry point in the group `nemo_minitron.launchers` whose name is the launcher's
and whose value is a `base.Launcher`. Its module is imported only when the launcher is requested by name.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.errors import EnvironmentProblem, PlanError
from nemo_minitron.launch.base import Launcher

GROUP = "nemo_minitron.launchers"
BUILT_IN = {
    "local": "nemo_minitron.launch.local.launcher",
    "docker": "nemo_minitron.launch.docker.launcher",
    "slurm": "nemo_minitron.launch.slurm.launcher",
}
"""Name of a launcher -> the module that defines it as LAUNCHER."""
CLUSTER = "slurm"
"""Launcher that inspects the cluster where a recipe's own launcher has no scheduler."""


def names() -> list[str]:
    """Return the names of all installed launchers."""
    return sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=GROUP))})


def find(name: str) -> Launcher | None:
    """Return the launcher of this name, or None if no installed package has it.

    Raises:
        EnvironmentProblem: its package cannot be imported or does not provide a launcher.
    """
    if name in BUILT_IN:
        launcher: Launcher = import_module(BUILT_IN[name]).LAUNCHER
        return launcher
    for entry in entry_points(group=GROUP, name=name):
        where = f"entry point {entry.name} = {entry.value} of the group {GROUP}"
        try:
            found = entry.load()
        except Exception as error:
            raise EnvironmentProblem(
                f"The launcher {name} cannot be imported: {type(error).__name__}: {error}",
                where=where,
                next_step="Repair or remove the package that provides it.",
            ) from error
        if isinstance(found, Launcher):
            return found
        raise EnvironmentProblem(
            f"The launcher {name} is a {type(found).__name__}.",
            where=where,
            allowed="an instance of nemo_minitron.launch.base.Launcher",
            next_step="Repair or remove the package that provides it.",
        )
    return None


def get(name: str) -> Launcher:
    """Return the launcher of this name.

    Raises:
        PlanError: no installed package has it.
        EnvironmentProblem: as `find`.
    """
    found = find(name)
    if found is None:
        raise PlanError(
            f"There is no launcher {name}.",
            where="execution.launcher",
            allowed=", ".join(names()),
            next_step=f"Install the package that provides it in the entry-point group {GROUP}.",
        )
    return found


def of_recipe(recipe: Recipe) -> Launcher:
    """Return the launcher of a recipe. `launcher=local` with a container runtime is the launcher for containers."""
    name, cluster = recipe.execution.launcher, recipe.execution.cluster
    has_containers = cluster is not None and cluster.container.runtime != "none"
    return get("docker" if name == "local" and has_containers else name)
